"""SpikingBrain2.0 as its makers release it: what its config means, and its tensor names.

Source: arXiv:2604.22575, and the released ``spb2``. The release's own window counts the query's own
token as ours does. The vision-language release has other names and is not read.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from respike.config import (
    BesideConfig,
    BlockMixer,
    FullMixer,
    LayerConfig,
    LinearMixer,
    ModelConfig,
    SseMemory,
    WindowMixer,
)
from respike.errors import CheckpointError, UnsupportedError

FAMILY = "sse_swa_moba"
"""Their ``model_type``."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_heads": 32,
    "head_dim": 128,
    "hidden_act": "swish",
    "max_position_embeddings": 262_144,
    "norm_eps": 1e-6,
    "num_sparse_partition": 4,
    "num_writer": 2,
    "num_reader": 2,
    "swa_dropout": 0.5,
    "tie_word_embeddings": True,
}
ATTN_DEFAULTS: dict[str, Any] = {
    "num_heads": 32,
    "num_kv_heads": 8,
    "qkv_bias": False,
    "qk_norm": True,
    "rope_theta": 5e6,
    "window_size": 128,
    "moba_chunk_size": 1024,
    "moba_topk": 4,
}
UNKNOWN = {
    "use_output_gate": False,
    "use_short_conv": False,
    "allow_neg_eigval": False,
    "sse_qk_relu": False,
    "linear_attn_type": "gdn",
    "expand_v": 1.0,
}
"""What the released models have there; respike knows nothing else."""

MODEL_NAMES = {"model.embed_tokens": "model.embeddings"}
LAYER_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
MEMORY_NAMES = {
    "q_down": "lora_q_proj.0",
    "q_up": "lora_q_proj.1",
    "k_down": "lora_k_proj.0",
    "k_up": "lora_k_proj.1",
    "a_proj": "sse_a_proj",
    "b_proj": "sse_b_proj",
    "router": "sse_e_proj",
}
BESIDE_NAMES = {
    "softmax_norm": "swa_merge_norm",
    "memory_norm": "sse_merge_norm",
    "mixers.0.norm": "sse_o_norm",
}
"""Our name of a module to theirs."""


def with_defaults(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Their config in the words of the other families, every field filled in.

    Args:
        raw: The parsed ``config.json``.
        where: Its path, for messages.

    Raises:
        CheckpointError: ``attn`` is not what it should be.
        UnsupportedError: It asks for a part that no released model has.
    """
    full = DEFAULTS | dict(raw)
    for key, known in UNKNOWN.items():
        if full.get(key, known) != known:
            raise UnsupportedError(f"{where}: {key} is {str(full[key])[:60]!r}, expected {known!r}")
    if full["num_writer"] != full["num_reader"]:
        raise UnsupportedError(f"{where}: num_writer and num_reader differ")
    if not isinstance(full.get("attn"), Mapping):
        raise CheckpointError(f"{where}: attn is missing or not a mapping")
    attn = full["attn"] = ATTN_DEFAULTS | dict(full["attn"])
    if attn["num_heads"] != full["num_heads"]:
        raise UnsupportedError(f"{where}: attn.num_heads is not num_heads")
    full["num_attention_heads"] = full["num_heads"]
    full["num_key_value_heads"] = attn["num_kv_heads"]
    full["rms_norm_eps"] = full["norm_eps"]
    full["rope_theta"], full["attention_bias"] = attn["rope_theta"], attn["qkv_bias"]
    full["qk_norm"] = attn["qk_norm"]
    return full


def hybrid_layers(raw: Mapping[str, Any], where: str) -> tuple[LayerConfig, ...]:
    """MoBA at ``attn.layers``, full softmax at ``attn.full_layers``, elsewhere windows beside SSE.

    Args:
        raw: From `with_defaults`, its counts in range.
        where: The config's path, for messages.

    Raises:
        CheckpointError: One of them names a layer that is not there.
    """
    attn, depth = raw["attn"], int(raw["num_hidden_layers"])
    places = {key: _places(attn, key, depth, where) for key in ("layers", "full_layers")}
    groups = tuple(range(int(raw["num_key_value_heads"])))
    heads, context = int(raw["num_heads"]), int(raw["max_position_embeddings"])
    blocks = int(attn["moba_chunk_size"])
    moba = BlockMixer(
        groups=groups, window_tokens=1, sink_tokens=0, sink_reach_tokens=context,
        block_tokens=blocks, summary_tokens=blocks, top_blocks=max(int(attn["moba_topk"]) - 1, 1),
        reach_tokens=None, cache="model", by_head=True,
    )  # fmt: skip
    window = WindowMixer(
        groups=groups,
        window_tokens=attn["window_size"],
        sink_tokens=0,
        sink_reach_tokens=context,
    )
    memory = SseMemory(
        partitions=raw["num_sparse_partition"],
        chosen=raw["num_writer"],
        rank=raw["head_dim"],
        gate="released",
    )
    sparse = BesideConfig(
        num_key_value_heads=heads,
        mixers=(LinearMixer(groups=tuple(range(heads)), memory=memory),),
        merge="mean",
        softmax_dropout=max(float(raw["swa_dropout"]), 0.0),
    )
    kinds = {
        "full": LayerConfig(mixers=(FullMixer(groups=groups),)),
        "moba": LayerConfig(mixers=(moba,)),
        "sse": LayerConfig(mixers=(window,), beside=sparse),
    }
    names = ("full" if i in places["full_layers"] else "moba" if i in places["layers"] else "sse"
             for i in range(depth))  # fmt: skip
    return tuple(kinds[name] for name in names)


def _places(attn: Mapping[str, Any], key: str, depth: int, where: str) -> set[int]:
    at = attn.get(key) or []
    if not isinstance(at, Sequence) or isinstance(at, str):
        raise CheckpointError(f"{where}: attn.{key} is {str(at)[:60]!r}, expected a list")
    for index in at:
        if type(index) is not int or not 0 <= index < depth:
            raise CheckpointError(
                f"{where}: attn.{key} names layer {str(index)[:60]}, "
                f"the model has layers 0 to {depth - 1}"
            )
    return set(at)


def their_name(name: str, config: ModelConfig) -> str:
    """A tensor's name in a released checkpoint, from ours."""
    match = re.fullmatch(r"(model\.layers\.(\d+)\.)(.+)", name)
    if match is None:
        module, _, kind = name.rpartition(".")
        return f"{MODEL_NAMES.get(module, module)}.{kind}"
    layer, rest = match[1], match[3]
    module, _, kind = rest.rpartition(".")
    if rest.startswith("self_attn."):
        branch = "swa_" if config.layers[int(match[2])].beside else ""
        return f"{layer}attn.{branch}{rest.removeprefix('self_attn.')}"
    if rest.startswith("beside.mixers.0.memory."):
        inner = rest.removeprefix("beside.mixers.0.memory.")
        part, dot, kind = inner.partition(".")
        return f"{layer}attn.{MEMORY_NAMES.get(part, part)}{dot}{kind}"
    if rest.startswith("beside."):
        module = module.removeprefix("beside.")
        return f"{layer}attn.{BESIDE_NAMES.get(module, f'sse_{module}')}.{kind}"
    return f"{layer}{LAYER_NAMES.get(module, module)}.{kind}"


def their_config(config: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` as theirs, of a model that `hybrid_layers` could have described."""
    kinds = [layer.mixers[0] for layer in config.layers]
    beside = next(layer.beside for layer in config.layers if layer.beside)
    memory = beside.mixers[0].memory
    assert memory.kind == "sse"
    moba = next((part for part in kinds if part.mixer == "blocks"), None)
    window = next(part for part in kinds if part.mixer == "window")
    attn = {
        "layers": [i for i, part in enumerate(kinds) if part.mixer == "blocks"],
        "full_layers": [i for i, part in enumerate(kinds) if part.mixer == "full"],
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "rope_theta": config.rope.theta,
        "window_size": window.window_tokens,
        "moba_chunk_size": moba.block_tokens if moba else ATTN_DEFAULTS["moba_chunk_size"],
        "moba_topk": moba.top_blocks + 1 if moba else ATTN_DEFAULTS["moba_topk"],
    }
    return UNKNOWN | {
        "architectures": ["SSESWAMoBAForCausalLM"],
        "model_type": FAMILY,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "num_sparse_partition": memory.partitions,
        "num_writer": memory.chosen,
        "num_reader": memory.chosen,
        "swa_dropout": beside.softmax_dropout,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn": attn,
    }
