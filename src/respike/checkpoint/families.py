"""Source families: what a foreign ``config.json`` means, and which tensors must be there.

Adding a family whose layers are llama-shaped is one entry in `FAMILIES`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from respike.checkpoint import spikingbrain, spikingbrain2
from respike.config import (
    LayerConfig,
    Mixer,
    ModelConfig,
    RopeConfig,
    SseMemory,
    WindowMixer,
    full_layers,
)
from respike.errors import CheckpointError, UnsupportedError, did_you_mean

Json = Mapping[str, Any]

MIXER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(self_attn|beside)\.mixers\.(\d+)\.(.+)")
"""Names of the tensors that mixers add to those of their source."""
LEARNED_SINKS = "model.learned_sinks"

NO_COMPUTE = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "dtype",
        "initializer_range", "output_attentions", "output_hidden_states", "pad_token_id",
        "pretraining_tp", "return_dict", "tokenizer_class", "torch_dtype", "transformers_version",
        "use_cache", "layer_types", "max_window_layers", "sliding_window",
    }
)  # fmt: skip
"""Keys of a ``config.json`` that say nothing about what a model computes; the last three do so
with ``use_sliding_window``, and are read then."""

PLAIN = ("llama", "qwen2", "qwen3")
"""Families whose configs are read as they are, without defaults of ours."""

FAMILIES: dict[str, Callable[[Json], dict[str, bool]]] = {
    # model_type -> which optional parts of a layer it has. Yi and R1-Distill-Llama are llama.
    "llama": lambda raw: {
        "qkv_bias": bool(raw.get("attention_bias", False)),
        "o_bias": bool(raw.get("attention_bias", False)),
        "qk_norm": False,
    },
    "qwen2": lambda _: {"qkv_bias": True, "o_bias": False, "qk_norm": False},
    "qwen3": lambda raw: {
        "qkv_bias": bool(raw.get("attention_bias", False)),
        "o_bias": bool(raw.get("attention_bias", False)),
        "qk_norm": True,
    },
    spikingbrain.FAMILY: lambda _: {"qkv_bias": True, "o_bias": False, "qk_norm": False},
    spikingbrain2.FAMILY: lambda raw: {
        "qkv_bias": bool(raw["attention_bias"]),
        "o_bias": False,
        "qk_norm": bool(raw["qk_norm"]),
    },
}


def config_from_json(raw: Json, where: str) -> ModelConfig:
    """A `ModelConfig` from a ``config.json``, ours or one of a known family.

    Args:
        raw: The parsed file.
        where: Its path, for messages.

    Raises:
        CheckpointError: A field is missing or cannot be.
        UnsupportedError: A family or feature respike does not know.
    """
    try:
        if raw.get("model_type") == "respike":
            return ModelConfig.model_validate(dict(raw))
        return _foreign(raw, where)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        got = "" if path == "" else f" (got {str(first['input'])[:60]!r})"
        reason = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{where}: {path + ': ' if path else ''}{reason}{got}") from error
    except KeyError as error:
        raise CheckpointError(f"{where}: key {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{where}: malformed: {error}") from error


class Noted(dict[str, Any]):
    """A ``config.json`` that notes which of its keys are asked for."""

    def __init__(self, raw: Json) -> None:
        super().__init__(raw)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """As of a dict."""
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self.asked.add(key)
        return super().get(key, default)

    def unread(self) -> tuple[str, ...]:
        """Keys that nobody asked for and that may change what the model computes."""
        return tuple(sorted(self.keys() - self.asked - NO_COMPUTE))


def _foreign(raw: Json, where: str) -> ModelConfig:
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise UnsupportedError(
            f"{where}: model_type {family[:60]!r} is not one of {', '.join(FAMILIES)}",
            hint=did_you_mean(family, FAMILIES),
        )
    if family == spikingbrain.FAMILY:
        raw = spikingbrain.with_defaults(raw, where)
    if family == spikingbrain2.FAMILY:
        raw = spikingbrain2.with_defaults(raw, where)
    if raw.get("mlp_bias"):
        raise UnsupportedError(f"{where}: mlp_bias is true; respike has no biases in the MLP")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedError(f"{where}: hidden_act {str(raw['hidden_act'])[:60]!r} is not 'silu'")
    heads = int(raw["num_attention_heads"])
    groups = int(raw.get("num_key_value_heads") or heads)
    num_layers, context = int(raw["num_hidden_layers"]), int(raw["max_position_embeddings"])
    eos = raw.get("eos_token_id")
    # Validated with one layer first, so that a hostile layer count meets its limit, not memory.
    fields: dict[str, Any] = {
        "family": family,
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["intermediate_size"],
        "num_hidden_layers": raw["num_hidden_layers"],
        "num_attention_heads": raw["num_attention_heads"],
        "num_key_value_heads": groups,
        "head_dim": raw.get("head_dim") or int(raw["hidden_size"]) // max(heads, 1),
        "rms_norm_eps": raw["rms_norm_eps"],
        "rope": _rope(raw, where),
        "max_position_embeddings": raw["max_position_embeddings"],
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        **FAMILIES[family](raw),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
    }
    if not (0 < num_layers <= 1024 and 0 < groups <= 4096):
        raise CheckpointError(
            f"{where}: num_hidden_layers {num_layers} or num_key_value_heads {groups} "
            "is out of range (1..1024, 1..4096)"
        )
    if family == spikingbrain.FAMILY:
        layers = spikingbrain.hybrid_layers(raw, num_layers, groups, context, where)
    elif family == spikingbrain2.FAMILY:
        layers = spikingbrain2.hybrid_layers(raw, where)
    else:
        layers = _layers(raw, num_layers, groups, context)
    return ModelConfig(**fields, layers=layers)


def _layers(raw: Json, num_layers: int, groups: int, context: int) -> tuple[LayerConfig, ...]:
    """All full, but for sources that are born with sliding windows (some qwen2 and qwen3)."""
    layers = full_layers(num_layers, groups)
    if not raw.get("use_sliding_window") or not raw.get("sliding_window"):
        return layers
    window = WindowMixer(
        groups=tuple(range(groups)),
        window_tokens=int(raw["sliding_window"]),
        sink_tokens=0,
        sink_reach_tokens=context,
    )
    first = int(raw.get("max_window_layers", 0))
    kinds = raw.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
    ]
    slides = LayerConfig(mixers=(window,))
    return tuple(
        slides if kind == "sliding_attention" else full
        for kind, full in zip(kinds, layers, strict=True)
    )


def _rope(raw: Json, where: str) -> RopeConfig:
    # transformers 5 writes rope_parameters; before, rope_theta and rope_scaling stood apart.
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    part = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise UnsupportedError(f"{where}: partial_rotary_factor {str(part)[:20]} is not 1")
    theta: Any = scaling.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=scaling["factor"])
    if kind == "llama3":
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        return RopeConfig(theta=theta, kind="llama3", **{name: scaling[name] for name in names})
    raise UnsupportedError(
        f"{where}: rotary scaling {str(kind)[:60]!r} is not one of default, linear, llama3"
    )


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor a model of this shape has, in the order it is stored."""
    width, vocab = config.hidden_size, config.vocab_size
    yield "model.embed_tokens.weight", (vocab, width)
    if config.learned_sinks:
        yield LEARNED_SINKS, (config.learned_sinks, width)
    for i, layer in enumerate(config.layers):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", (width,)
        yield from _attention_tensors(config, layer.mixers, prefix + "self_attn.")
        if layer.beside is not None:
            inner = config.beside(layer)
            yield from _attention_tensors(inner, layer.beside.mixers, prefix + "beside.")
            yield prefix + "beside.softmax_norm.weight", (width,)
            yield prefix + "beside.memory_norm.weight", (width,)
        yield prefix + "post_attention_layernorm.weight", (width,)
        yield from _mlp_tensors(config, layer, prefix + "mlp.")
    yield "model.norm.weight", (width,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (vocab, width)


Tensors = Iterator[tuple[str, tuple[int, ...]]]


def _attention_tensors(config: ModelConfig, mixers: Iterable[Mixer], prefix: str) -> Tensors:
    width, head = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield f"{prefix}{name}_proj.weight", (rows, width)
        if config.qkv_bias:
            yield f"{prefix}{name}_proj.bias", (rows,)
    yield prefix + "o_proj.weight", (width, q)
    if config.o_bias:
        yield prefix + "o_proj.bias", (width,)
    if config.qk_norm:
        yield prefix + "q_norm.weight", (head,)
        yield prefix + "k_norm.weight", (head,)
    for j, part in enumerate(mixers):
        for name, shape in mixer_tensors(config, part):
            yield f"{prefix}mixers.{j}.{name}", shape


def _mlp_tensors(config: ModelConfig, layer: LayerConfig, prefix: str) -> Tensors:
    width, inner = config.hidden_size, config.intermediate_size
    mlps = [prefix]
    if layer.moe is not None:
        yield prefix + "gate.weight", (layer.moe.experts, width)
        mlps = [f"{prefix}experts.{e}." for e in range(layer.moe.experts)]
        mlps += [f"{prefix}shared_experts.{s}." for s in range(layer.moe.shared)]
    for name in mlps:
        yield name + "gate_proj.weight", (inner, width)
        yield name + "up_proj.weight", (inner, width)
        yield name + "down_proj.weight", (width, inner)


def mixer_tensors(config: ModelConfig, part: Mixer) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a mixer adds to those of its source."""
    head, width, groups = config.head_dim, config.hidden_size, len(part.groups)
    if part.mixer == "blocks" or part.memory is None:
        return
    memory = part.memory
    if memory.kind == "far":
        heads, features = groups * config.heads_per_group, memory.features
        yield "key_weight", (groups, features, head)
        yield "key_bias", (groups, features)
        yield "query_weight", (heads, features, head)
        yield "beta", (heads,)
        yield "log2_half_life", (groups,)
        if memory.kept_tokens:
            yield "keep_weight", (groups, head)
            yield "keep_log2_half_life", (groups,)
        return
    norms = ("norm",) if part.mixer == "linear" else ("window_norm", "memory_norm")
    for name in norms:
        yield f"{name}.weight", (head,)
    if memory.kind == "gla":
        if memory.gate_rank is not None:
            yield "memory.gate_down.weight", (memory.gate_rank, width)
        yield "memory.gate_up.weight", (groups * head, memory.gate_rank or width)
        yield "memory.gate_up.bias", (groups * head,)
    if memory.kind == "delta":
        yield "memory.a_proj.weight", (groups, width)
        yield "memory.b_proj.weight", (groups, width)
        yield "memory.A_log", (groups,)
        yield "memory.dt_bias", (groups,)
    if memory.kind == "sse":
        yield from _sse_tensors(config, memory, groups)


def _sse_tensors(config: ModelConfig, memory: SseMemory, groups: int) -> Tensors:
    width, head = config.hidden_size, config.head_dim
    for name, count in (("q", groups * config.heads_per_group), ("k", groups)):
        yield f"memory.{name}_down.weight", (memory.rank, width)
        yield f"memory.{name}_up.weight", (count * head, memory.rank)
    yield "memory.a_proj.weight", (2 * groups, width)
    yield "memory.b_proj.weight", (2 * groups, width)
    yield "memory.A_log", (2 * groups,)
    yield "memory.dt_bias", (2 * groups,)
    yield "memory.router.weight", (memory.partitions, width)


def mixer_of(config: ModelConfig, name: str) -> tuple[str, Mixer] | None:
    """(name within its mixer, the mixer) of a tensor that a mixer added; None of any other."""
    match = MIXER_TENSOR.fullmatch(name)
    if match is None:
        return None
    i, j, rest = int(match[1]), int(match[3]), match[4]
    if i >= len(config.layers):
        return None
    layer = config.layers[i]
    mixers: tuple[Mixer, ...] = layer.mixers
    if match[2] == "beside":
        mixers = layer.beside.mixers if layer.beside else ()
    return (rest, mixers[j]) if j < len(mixers) else None


NEW_SUFFIXES = ("beside.softmax_norm.weight", "beside.memory_norm.weight", "mlp.gate.weight")
"""Merges' norms, and routers of experts."""


def is_new(config: ModelConfig, name: str) -> bool:
    """Whether conversion made the tensor, and not from one of the source's: gates, norms, sinks.

    The projections beside a layer's and experts are copies, and so not new.
    """
    if name == LEARNED_SINKS or name.endswith(NEW_SUFFIXES):
        return True
    return mixer_of(config, name) is not None


IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors old exporters wrote although they follow from the config."""


def foreign_names(raw: Json, config: ModelConfig) -> dict[str, str]:
    """Our name of a tensor to that in a folder with this ``config.json``; empty if all agree."""
    named: Callable[[str], str] | None = {
        spikingbrain.FAMILY: spikingbrain.their_name,
        spikingbrain2.FAMILY: lambda name: spikingbrain2.their_name(name, config),
    }.get(str(raw.get("model_type")))
    return {name: named(name) for name, _ in expected_tensors(config)} if named else {}


def account_tensors(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Check a checkpoint's tensors against its config, by name and shape, before any is read.

    Args:
        config: What the checkpoint says it is.
        shapes: Shape of every tensor it holds, by the checkpoint's own names.
        where: The checkpoint, for messages.
        names: Our names to the checkpoint's. None: they are the same.

    Raises:
        CheckpointError: One is missing, unexpected, or of the wrong shape; the message names it.
    """
    expected = {(names or {}).get(n, n): shape for n, shape in expected_tensors(config)}
    missing = [name for name in expected if name not in shapes]
    extra = [
        name for name in shapes if name not in expected and not name.endswith(IGNORED_SUFFIXES)
    ]
    if config.tie_word_embeddings:
        # Some exporters store the tied matrix twice; it is dropped, with that reason, by `convert`.
        extra = [name for name in extra if name != "lm_head.weight"]
    if missing:
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} is missing "
            f"({len(missing)} missing, {len(extra)} extra; "
            f"the config asks for {config.num_hidden_layers} layers)"
        )
    if extra:
        raise CheckpointError(
            f"{where}: tensor {extra[0][:100]!r} belongs to nothing the config names "
            f"({len(extra)} such tensors)"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {shapes[name]}, the config says {shape}"
            )
