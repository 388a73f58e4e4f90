"""What a conversion would do, as data: nothing is read but headers, nothing is written."""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from respike.account import REPORT_LENGTHS, growth_bytes_per_token, num_parameters, state_bytes
from respike.checkpoint import Checkpoint, Folder, open_checkpoint, read_json
from respike.checkpoint.families import expected_tensors, mixer_of
from respike.config import AnyMemory, LayerConfig, Mixer, ModelConfig, SpikeConfig, full_layers
from respike.conversion.derive import Origin, origin
from respike.device import dtype_name, get_dtype
from respike.models.engine import engine_layers
from respike.recipe import Recipe, apply_recipe, load_recipe

ALONE_NORM = re.compile(r"self_attn\.mixers\.\d+\.norm\.weight$")
"""Of a memory without softmax."""


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor of the source.

    Attributes:
        name: Its name.
        shape: Its shape; empty for a dropped one.
        action: copy (same bits), cast (another dtype), derive (made of one of the source's), new
            (the source has none), or drop.
        reason: Why it is new, derived or dropped; empty otherwise.
        origin: What it is derived of.
    """

    name: str
    shape: tuple[int, ...]
    action: Literal["copy", "cast", "derive", "new", "drop"]
    reason: str = ""
    origin: Origin | None = None


@dataclass(frozen=True)
class Plan:
    """A conversion, decided in every detail."""

    source: Checkpoint
    recipe: Recipe
    config: ModelConfig
    tensors: tuple[TensorPlan, ...]

    @property
    def weight_bytes(self) -> int:
        """Size of the converted weights."""
        return num_parameters(self.config) * get_dtype(self.recipe.weights).itemsize

    @property
    def new(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the source does not have."""
        return {t.name: t.shape for t in self.tensors if t.action == "new"}

    @property
    def origins(self) -> dict[str, Origin]:
        """What each tensor is made of that is derived of one of the source's."""
        return {t.name: t.origin for t in self.tensors if t.origin}

    @property
    def calibrates(self) -> bool:
        """Far memories are to be fitted on text, so `respike.convert` needs one."""
        fitted = any(name.endswith(".beta") for name in self.new)
        return fitted and self.recipe.far.calibration_tokens > 0

    @property
    def measures(self) -> bool:
        """Norms of memories are to begin as large as the source's attention is on text."""
        merged = any(name.endswith("beside.softmax_norm.weight") for name in self.new)
        alone = any(ALONE_NORM.search(name) for name in self.new)
        recipe = self.recipe
        return (merged and recipe.beside.start == "measured") or (
            alone and recipe.linear.start == "measured"
        )

    def summary(self) -> dict[str, Any]:
        """The figures, for the report and for ``--json``."""
        config, before = self.config, self.source.config
        groups = config.num_hidden_layers * config.num_key_value_heads
        kept = len(config.softmax_groups())
        lengths = {
            str(n): {"original": state_bytes(before, n), "converted": state_bytes(config, n)}
            for n in REPORT_LENGTHS
        }
        actions = [t.action for t in self.tensors]
        return {
            "source": {
                "name": self.source.path.resolve().name,
                "family": before.family,
                "only_full_softmax": before.layers
                == full_layers(before.num_hidden_layers, before.num_key_value_heads),
                "retied": config.tie_word_embeddings and not before.tie_word_embeddings,
                "healed": _was_healed(self.source),
                "stored_as": dict(Counter(self.source.stored_as.values()).most_common()),
                "license": self.source.license,
            },
            "recipe": self.recipe.name,
            "weights": self.recipe.weights,
            "parameters": num_parameters(config),
            "new_parameters": num_parameters(config) - num_parameters(before),
            "weight_bytes": self.weight_bytes,
            "kv_groups": groups,
            "softmax_groups": kept,
            "softmax_groups_frac": kept / groups,
            "state_bytes_bf16": lengths,
            "growth_bytes_per_token_bf16": growth_bytes_per_token(config),
            "engine_layers": engine_layers(config),
            "tensors": {a: actions.count(a) for a in ("copy", "cast", "derive", "new", "drop")},
            "dropped": {t.name: t.reason for t in self.tensors if t.action == "drop"},
            "layers": [{"layers": where, "mixers": what} for where, what in layer_table(config)],
        }


def _was_healed(source: Checkpoint) -> bool:
    """Whether its weights, or those it was converted from, are trained ones."""
    report = source.path / "report.json"
    if not isinstance(source, Folder) or not report.is_file():
        return False
    facts = read_json(report)
    return "healing" in facts or bool(facts.get("source", {}).get("healed"))


def layer_table(config: ModelConfig) -> list[tuple[str, str]]:
    """(layers, mixers) with equal neighbours merged, such as ("3-7", "window 256 + 4 sinks")."""
    rows = []
    for text, run in groupby(enumerate(config.layers), key=lambda x: describe(x[1])):
        indices = [i for i, _ in run]
        span = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
        rows.append((span, text))
    return rows


def describe(layer: LayerConfig) -> str:
    """A layer's mixers in words, and its MLP if there is more than one."""
    parts = []
    for part in layer.mixers:
        groups = ",".join(map(str, part.groups))
        where = f" (groups {groups})" if len(layer.mixers) > 1 else ""
        parts.append(f"{_words(part)}{where}")
    text = ", ".join(parts)
    if layer.beside is not None:
        text += f" beside {', '.join(_words(part) for part in layer.beside.mixers)}"
        text += f", {layer.beside.merge} of norms"
    if layer.moe is not None:
        shared = f" + {layer.moe.shared}" if layer.moe.shared else ""
        text += f"; {layer.moe.experts}{shared} experts, {layer.moe.router} top-{layer.moe.chosen}"
    return text


def _words(part: Mixer) -> str:
    if part.mixer == "blocks":
        of = f"best {part.top_blocks} blocks of {part.block_tokens}"
        whose = " by head" if part.by_head else ""
        cache = ", int8" if part.cache == "int8" else ""
        decode = ", dense decoding" if part.dense_decode else ""
        near = f"window {part.window_tokens} + {part.sink_tokens} sinks"
        return f"{of}{whose} + {near}{cache}{decode}"
    memory = "" if part.memory is None else _memory_words(part.memory)
    if part.mixer == "linear":
        return memory
    near = "full"
    if part.mixer == "window":
        near = f"window {part.window_tokens} + {part.sink_tokens} sinks"
    return f"{near} + {memory}" if memory else near


def _memory_words(memory: AnyMemory) -> str:
    if memory.kind == "far":
        kept = f"{memory.kept_tokens} kept tokens + " if memory.kept_tokens else ""
        return f"{kept}far memory of {memory.features}"
    if memory.kind == "sse":
        of = f"{memory.chosen} of {memory.partitions} partitions"
        return f"sparse gated delta ({of}, {memory.gate} gate)"
    return {"gla": "gated linear", "tied": "tied-gate linear", "delta": "gated delta"}[memory.kind]


def plan(source: str | Path, recipe: Recipe) -> Plan:
    """Decide what converting ``source`` by ``recipe`` would do.

    Args:
        source: A model folder or ``.gguf`` file.
        recipe: From `respike.load_recipe`.

    Raises:
        CheckpointError: The source cannot be used.
        RecipeError: The recipe does not fit it.
    """
    checkpoint = open_checkpoint(source)
    config = apply_recipe(recipe, checkpoint.config)
    kept, kinds = dict(expected_tensors(config)), checkpoint.stored_as
    stored = recipe.weights.upper()
    as_is = isinstance(checkpoint, Folder)  # GGUF is dequantised, and may order rows otherwise
    tensors = []
    for name, shape in kept.items():
        if name in kinds and not _remade(name, checkpoint.config, config):
            as_stored = as_is and kinds[name] == stored
            tensors.append(TensorPlan(name, shape, "copy" if as_stored else "cast"))
        elif made := origin(name, recipe, checkpoint.config, config):
            tensors.append(TensorPlan(name, shape, "derive", made.words, made))
        else:
            tensors.append(TensorPlan(name, shape, "new", "its part is new"))
    taken = {t.origin.name for t in tensors if t.origin}
    for name in kinds:
        if name in kept:
            continue
        retied = name == "lm_head.weight"
        reason = (
            "tied: the embedding serves as output matrix" if retied
            else "experts are made of it" if name in taken
            else "its attention is gone" if ".beside." in name
            else "its mixer is gone" if mixer_of(checkpoint.config, name)
            else "follows from the config"
        )  # fmt: skip
        tensors.append(TensorPlan(name, (), "drop", reason))
    return Plan(checkpoint, recipe, config, tuple(tensors))


def plan_as_it_is(source: Checkpoint, spikes: SpikeConfig | None = None) -> Plan:
    """A conversion that keeps every mixer and every tensor in the dtype it is stored in.

    The recipe is that of the source folder, if respike wrote it, else ``identity``.

    Args:
        source: From `respike.checkpoint.open_checkpoint`.
        spikes: Neurons of the new model; None: the source's.
    """
    made = source.path / "recipe.yaml"
    ours = isinstance(source, Folder) and source.raw_config.get("model_type") == "respike"
    weights = dtype_name(source.stored_dtype)
    recipe = load_recipe(str(made) if ours else "identity", [f"weights={weights}"])
    kinds, as_is = source.stored_as, isinstance(source, Folder)
    tensors = [
        TensorPlan(name, shape, "copy" if as_is and kinds.get(name) == weights.upper() else "cast")
        for name, shape in expected_tensors(source.config)
    ]
    kept = {tensor.name for tensor in tensors}
    dropped = [
        TensorPlan(name, (), "drop", "tied: the embedding serves as output matrix")
        for name in kinds
        if name not in kept and name == "lm_head.weight"
    ]
    config = source.config
    if spikes is not None:
        config = config.model_copy(update={"spikes": spikes})
    return Plan(source, recipe, config, (*tensors, *dropped))


def _remade(name: str, before: ModelConfig, after: ModelConfig) -> bool:
    """The tensor belongs to a mixer that the source has otherwise or not at all."""
    mine, theirs = mixer_of(after, name), mixer_of(before, name)
    return mine is not None and (theirs is None or mine[1] != theirs[1])
