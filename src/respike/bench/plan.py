"""`respike plan` as one function: what a conversion would need, counted from a config alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from respike.account import (
    BITS,
    flops_per_token,
    growth_bytes_per_token,
    moved_bytes_per_token,
    num_active_parameters,
    num_embedding_parameters,
    num_parameters,
    sharded_bytes,
    state_parts,
)
from respike.bench.machine import processor
from respike.bench.predict import predict
from respike.bench.shapes import SHAPES, shape_config
from respike.checkpoint import open_checkpoint
from respike.config import ModelConfig
from respike.errors import UsageError, did_you_mean
from respike.recipe import apply_recipe, load_recipe

ASSUMED = (
    "layers of each kind were timed here with random weights, where a text begins and deep in it, "
    "and scaled: between and beyond, chunks of softmax cost more in proportion to what is before "
    "them, all others the same; of experts only as many as a token passes; nothing else runs"
)


def plan(  # noqa: PLR0913 - one for each option of the verb
    recipe: str,
    target: str,
    lengths: Sequence[int],
    *,
    weights: str,
    threads: int,
    cache_folder: Path | None,
    overrides: Sequence[str] = (),
    ranks: Sequence[int] = (),
    fresh: bool = False,
) -> dict[str, Any]:
    """Count, and predict.

    Args:
        recipe: A built-in's name or a file.
        target: A name of `respike.bench.shapes.SHAPES`, or a model on disk.
        lengths: Tokens to read.
        weights: How they are stored: bf16, int8 or int4.
        threads: Of the prediction.
        cache_folder: For measurements of this machine; None predicts nothing.
        overrides: Changes of the recipe, as `respike.load_recipe` takes them.
        ranks: Numbers of devices that share the model.
        fresh: Measure it again.

    Raises:
        UsageError: There is no such target.
        RecipeError: There is no such recipe, or it does not fit.
    """
    read = load_recipe(recipe, overrides)
    source = _config(target)
    config = apply_recipe(read, source)
    timed = None
    if cache_folder is not None:
        options = {"weights": None if weights == "bf16" else weights}
        timed = predict(config, lengths, threads, options, cache_folder, fresh=fresh)
    return {
        "recipe": read.name,
        "target": target,
        "weights": weights,
        "parameters": num_parameters(config),
        "new_parameters": num_parameters(config) - num_parameters(source),
        "active_parameters": num_active_parameters(config),
        "embedding_parameters": num_embedding_parameters(config),
        "weight_bytes": int(num_parameters(config) * BITS[weights] / 8),
        "softmax_groups": len(config.softmax_groups()),
        "kv_groups": config.num_hidden_layers * config.num_key_value_heads,
        "growth_bytes_per_token": growth_bytes_per_token(config),
        "machine": None if timed is None else {"processor": processor(), "threads": threads},
        "read_bytes_per_second": timed and timed["read_bytes_per_second"],
        "assumed": timed and ASSUMED,
        "choices": read.choices,
        "sharding": [{"ranks": n, **sharded_bytes(config, n)} for n in ranks],
        "rows": [_row(config, source, n, weights, timed) for n in lengths],
    }


def _config(target: str) -> ModelConfig:
    if target in SHAPES:
        return shape_config(target)
    if not Path(target).exists():
        raise UsageError(
            f"--target {target}: neither a model on disk nor one of {', '.join(SHAPES)}",
            hint=did_you_mean(target, SHAPES),
        )
    return open_checkpoint(target).config


def _row(
    config: ModelConfig,
    source: ModelConfig,
    length: int,
    weights: str,
    timed: dict[str, Any] | None,
) -> dict[str, Any]:
    moved = moved_bytes_per_token(config, length, weights)
    flops = flops_per_token(config, length)
    row: dict[str, Any] = {
        "context_tokens": length,
        "state_bytes": sum(state_parts(config, length).values()),
        "state_parts": state_parts(config, length),
        "original_state_bytes": sum(state_parts(source, length).values()),
        "flops_per_token": sum(flops.values()),
        "flops_parts": flops,
        "original_flops_per_token": sum(flops_per_token(source, length).values()),
        "moved_bytes_per_token": moved,
        "original_moved_bytes_per_token": moved_bytes_per_token(source, length, weights),
    }
    if timed is not None:
        row["read_seconds"] = timed["seconds"][str(length)]
        row["decode_tokens_per_second_at_most"] = timed["read_bytes_per_second"] / moved
    return row
