"""How long a prompt will take to read here, before it is read.

One layer of each kind the model has, of its true width, with random weights, reads a few chunks;
what that took is scaled to all layers and to any length. A layer whose groups have several mixers
costs their mean by share of groups. Assumed: chunks of softmax cost more in proportion to what is
before them, all others the same; nothing else runs; what does not fit in memory is not foreseen.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from respike import __version__
from respike.bench.fits import fit
from respike.bench.machine import commit, kernel_names, processor, read_bytes_per_second
from respike.bench.ours import load_options
from respike.bench.shapes import RandomCheckpoint
from respike.config import LayerConfig, Mixer, ModelConfig
from respike.device import set_threads
from respike.loading import fast_decoder
from respike.models.decoder import PREFILL_CHUNK_TOKENS
from respike.recipe import load_recipe

BUDGET_SECONDS = 1.5
"""For the chunks of one kind of layer, if they are not slower than that each."""
FEWEST_CHUNKS, MOST_CHUNKS = 3, 16
VOCABULARY = 256
CACHE_FILE = "plan.json"


@dataclass(frozen=True)
class Cost:
    """Seconds of a chunk in a layer, all groups with one mixer: at the start, and more by depth."""

    flat: float
    per_token_before: float

    def of(self, length: int) -> float:
        """Seconds to read ``length`` tokens."""
        chunks = length / PREFILL_CHUNK_TOKENS
        # Half of what is read lies, on average, before a chunk.
        return chunks * (self.flat + self.per_token_before * length / 2)


def predict(
    config: ModelConfig,
    lengths: Sequence[int],
    threads: int,
    options: Mapping[str, Any],
    cache_folder: Path,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Seconds to read each length, and what this machine reads.

    Args:
        config: The model.
        lengths: In tokens.
        threads: As it will run.
        options: As `respike.bench.ours.load_options` takes them.
        cache_folder: Measurements of this machine are kept there.
        fresh: Measure again.
    """
    set_threads(threads)
    cache = _Cache(cache_folder / CACHE_FILE, threads, options, fresh)
    costs: dict[LayerConfig, Cost] = {}
    seconds = dict.fromkeys(lengths, 0.0)
    for layer in config.layers:
        for part in layer.mixers:
            whole = _measurable(config, layer, part)
            if whole not in costs:
                name = _name(config, whole)
                found = cache.get(name, lambda w=whole: _measure(config, w, options))
                costs[whole] = Cost(*found)
            share = len(part.groups) / config.num_key_value_heads
            for length in lengths:
                seconds[length] += share * costs[whole].of(length)
    read = cache.get("read", lambda: [read_bytes_per_second(threads)])[0]
    cache.write()
    return {
        "seconds": {str(length): value for length, value in seconds.items()},
        "read_bytes_per_second": read,
        "layers_measured": len(costs),
    }


def _measurable(config: ModelConfig, layer: LayerConfig, part: Mixer) -> LayerConfig:
    """``layer`` with ``part`` for all groups, and no more experts than a token passes."""
    everyone = tuple(range(config.num_key_value_heads))
    moe = layer.moe and layer.moe.model_copy(update={"experts": layer.moe.chosen})
    mixers = (part.model_copy(update={"groups": everyone}),)
    return layer.model_copy(update={"mixers": mixers, "moe": moe})


def _name(config: ModelConfig, layer: LayerConfig) -> str:
    sizes = (
        config.hidden_size, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim,
    )  # fmt: skip
    return f"{'/'.join(map(str, sizes))} {layer.model_dump_json()}"


def _measure(config: ModelConfig, layer: LayerConfig, options: Mapping[str, Any]) -> list[float]:
    """(flat, per token before) of a layer; see `Cost`."""
    one = config.model_copy(
        update={
            "layers": (layer,),
            "num_hidden_layers": 1,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
            "learned_sinks": 0,
        }
    )
    source = RandomCheckpoint(one, load_recipe("constant"))
    decoder = fast_decoder(source, **load_options(options))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (1, PREFILL_CHUNK_TOKENS), generator=draw)
    times: list[float] = []
    with torch.inference_mode():
        decoder(tokens, logits="none")  # the first call is slow once
        state = decoder.init_state(1)
        while len(times) < FEWEST_CHUNKS or (
            len(times) < MOST_CHUNKS and sum(times) < BUDGET_SECONDS
        ):
            start = time.perf_counter()
            _, state = decoder(tokens, state, logits="none")
            times.append(time.perf_counter() - start)
    (part,) = layer.mixers
    if part.mixer != "full":
        return [median(times[1:]), 0.0]
    points = [(1 + i * PREFILL_CHUNK_TOKENS, t) for i, t in enumerate(times)]
    found = fit(points, 1)
    assert found is not None
    return list(found.coefficients)


class _Cache:
    """Measurements of this machine, by what they depend on."""

    def __init__(self, path: Path, threads: int, options: Mapping[str, Any], fresh: bool) -> None:
        self.path = path
        kernels = sorted(set(kernel_names().values()))
        how = {k: v for k, v in options.items() if v is not None}
        self.key = (
            f"{processor()}, {threads} threads, {', '.join(kernels)}, {how}, "
            f"respike {__version__} {commit()}"
        )
        self.all = {} if fresh else _read_cache(path)
        self.mine = self.all.setdefault(self.key, {})

    def get(self, name: str, measure: Any) -> list[float]:
        """What was measured before, or now."""
        if name not in self.mine:
            self.mine[name] = measure()
        return list(self.mine[name])

    def write(self) -> None:
        """A cache that cannot be written costs seconds and nothing else."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self.all, indent=1), encoding="utf-8")
            partial.replace(self.path)
        except OSError:
            return


def _read_cache(path: Path) -> dict[str, dict[str, list[float]]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
