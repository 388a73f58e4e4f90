"""What a GGUF file's keys mean: its `ModelConfig`, and its tensor names in Hugging Face's words."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from annotated_types import Le
from pydantic import ValidationError
from torch import Tensor

from respike.config import ModelConfig, RopeConfig, full_layers
from respike.errors import CheckpointError, UnsupportedError, did_you_mean
from respike.gguf_vocab import end_token_ids

FAMILIES: dict[str, Literal["llama", "qwen2", "qwen3"]] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""``general.architecture`` to our family."""

MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
HEAD_NAMES = {"lm_head.weight": "output.weight"}
LAYER_NAMES = {
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
}
QKV_BIAS_NAMES = {
    "model.layers.{}.self_attn.q_proj.bias": "blk.{}.attn_q.bias",
    "model.layers.{}.self_attn.k_proj.bias": "blk.{}.attn_k.bias",
    "model.layers.{}.self_attn.v_proj.bias": "blk.{}.attn_v.bias",
}
QK_NORM_NAMES = {
    "model.layers.{}.self_attn.q_norm.weight": "blk.{}.attn_q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "blk.{}.attn_k_norm.weight",
}


@runtime_checkable
class Readable(Protocol):
    """What is needed of a `respike.checkpoint.gguf.GgufFile`."""

    path: Path
    metadata: dict[str, Any]

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The file's tensors by their GGUF names."""

    def read(self, name: str) -> Tensor:
        """One tensor as float32."""


class _Keys:
    """The keys of one architecture, each asked for with its type."""

    def __init__(self, file: Readable, arch: str) -> None:
        self.file = file
        self.arch = arch

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}")

    def number(self, key: str, default: int | float | None = None) -> int | float:
        value = default if (found := self.get(key)) is None else found
        if value is None:
            raise CheckpointError(f"{self.file.path}: key `{self.arch}.{key}` is missing")
        if isinstance(value, np.ndarray | list):
            raise UnsupportedError(
                f"{self.file.path}: key `{self.arch}.{key}` differs by layer; one value is expected"
            )
        if type(value) not in (int, float):
            raise CheckpointError(
                f"{self.file.path}: key `{self.arch}.{key}` is {str(value)[:40]!r}, "
                "expected a number"
            )
        if not math.isfinite(value):
            raise CheckpointError(f"{self.file.path}: key `{self.arch}.{key}` is {value}")
        # float32 9.999999747378752e-06 was 1e-05 before it was written
        return value if type(value) is int else float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        value = default if (found := self.get(key)) is None else found
        if not isinstance(value, str):
            raise CheckpointError(
                f"{self.file.path}: key `{self.arch}.{key}` is {str(value)[:40]!r}, expected text"
            )
        return value

    def count(self, key: str, field: str, default: int | None = None) -> int:
        """A count, held to the bound of the `ModelConfig` field it will fill."""
        value = self.number(key, default)
        limits = ModelConfig.model_fields[field].metadata
        most = next(int(str(limit.le)) for limit in limits if isinstance(limit, Le))
        if type(value) is not int or not 0 < value <= most:
            raise CheckpointError(
                f"{self.file.path}: key `{self.arch}.{key}` is {value}, expected 1 to {most}"
            )
        return value


def gguf_config(file: Readable) -> ModelConfig:
    """The model a GGUF file holds, with full attention in every layer.

    Raises:
        CheckpointError: A key is missing or out of range.
        UnsupportedError: Another architecture, or an option of this one that we do not compute.
    """
    arch = file.metadata.get("general.architecture")
    if arch is None:
        raise CheckpointError(f"{file.path}: key `general.architecture` is missing")
    if not isinstance(arch, str) or arch not in FAMILIES:
        raise UnsupportedError(
            f"{file.path}: architecture {str(arch)[:40]!r}; known are {', '.join(FAMILIES)}",
            hint=did_you_mean(str(arch)[:40], FAMILIES),
        )
    keys = _Keys(file, arch)
    num_heads = keys.count("attention.head_count", "num_attention_heads")
    num_groups = keys.count("attention.head_count_kv", "num_key_value_heads", num_heads)
    num_layers = keys.count("block_count", "num_hidden_layers")
    hidden = keys.count("embedding_length", "hidden_size")
    head_dim = keys.count("attention.key_length", "head_dim", hidden // num_heads)
    _refuse_unknown(keys, head_dim)
    try:
        return ModelConfig(
            family=FAMILIES[arch],
            vocab_size=_vocab_size(keys),
            hidden_size=hidden,
            intermediate_size=keys.count("feed_forward_length", "intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_groups,
            head_dim=head_dim,
            rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope=_rope(keys, head_dim),
            max_position_embeddings=keys.count("context_length", "max_position_embeddings"),
            tie_word_embeddings="output.weight" not in file.tensors,
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            o_bias=False,
            qk_norm=arch == "qwen3",
            bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=end_token_ids(file.metadata),
            layers=full_layers(num_layers, num_groups),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{file.path}: {where} {first['msg']}".replace("\n", " ")) from None


def _vocab_size(keys: _Keys) -> int:
    tokens = keys.file.metadata.get("tokenizer.ggml.tokens")
    known = len(tokens) if isinstance(tokens, list) else None
    return keys.count("vocab_size", "vocab_size", known)


def _refuse_unknown(keys: _Keys, head_dim: int) -> None:
    """Options that change the numbers and that the decoder does not compute."""
    reasons = {
        "expert_count": keys.number("expert_count", 0) != 0,
        "rope.dimension_count": keys.number("rope.dimension_count", head_dim) != head_dim,
        "attention.value_length": keys.number("attention.value_length", head_dim) != head_dim,
        "attention.sliding_window": keys.number("attention.sliding_window", 0) != 0,
        "rope.scaling.type": keys.text("rope.scaling.type", "none") not in ("none", "linear"),
    }
    for key, refused in reasons.items():
        if refused:
            raise UnsupportedError(
                f"{keys.file.path}: key `{keys.arch}.{key}` is {str(keys.get(key))[:40]!r}, "
                "which this version does not compute"
            )
    for name in ("blk.0.attn_output.bias", "rope_factors_long.weight"):
        if name in keys.file.tensors:
            raise UnsupportedError(
                f"{keys.file.path}: tensor `{name}` is not something this version computes with"
            )


def _rope(keys: _Keys, head_dim: int) -> RopeConfig:
    theta = keys.number("rope.freq_base", 10000.0)
    if theta <= 0:
        raise CheckpointError(f"{keys.file.path}: key `{keys.arch}.rope.freq_base` is {theta}")
    # llama.cpp: linear if nothing is said, a factor of 0 is none, and files of 2023 call it scale.
    linear = keys.text("rope.scaling.type", "linear") == "linear"
    scale = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    factor = (scale or 1.0) if linear else 1.0
    if "rope_freqs.weight" in keys.file.tensors:
        factors = keys.file.read("rope_freqs.weight").flatten()
        if len(factors) != head_dim // 2 or not (factors > 0).all():
            raise CheckpointError(
                f"{keys.file.path}: tensor `rope_freqs.weight` has {len(factors)} values, "
                f"expected {head_dim // 2}, all above 0"
            )
        if factor != 1.0:
            raise UnsupportedError(
                f"{keys.file.path}: both rope.scaling.factor and `rope_freqs.weight` are given"
            )
        return RopeConfig(theta=theta, kind="factors", factors=tuple(factors.tolist()))
    if factor != 1.0:
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    return RopeConfig(theta=theta)


def gguf_tensor_map(config: ModelConfig) -> dict[str, str]:
    """GGUF's name of every tensor of ``config``, keyed by Hugging Face's."""
    layer = LAYER_NAMES | (QKV_BIAS_NAMES if config.qkv_bias else {})
    layer |= QK_NORM_NAMES if config.qk_norm else {}
    names = MODEL_NAMES | ({} if config.tie_word_embeddings else HEAD_NAMES)
    for i, (ours, theirs) in itertools.product(range(config.num_hidden_layers), layer.items()):
        names[ours.format(i)] = theirs.format(i)
    return names


def unpermute(tensor: Tensor, name: str, config: ModelConfig, path: Path) -> Tensor:
    """Rows of q and k in Hugging Face's order: each head's two rotary halves, one after the other.

    llama.cpp's converter interleaves the halves, for the architecture ``llama`` only.

    Raises:
        CheckpointError: The tensor has not the rows that ``config`` gives it.
    """
    part = name.split(".")[-2]
    if config.family != "llama" or part not in ("attn_q", "attn_k"):
        return tensor
    num_heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    if tensor.shape[0] != num_heads * config.head_dim:
        raise CheckpointError(
            f"{path}: tensor `{name}` has {tensor.shape[0]} rows, "
            f"expected {num_heads} heads of {config.head_dim}"
        )
    pairs = tensor.reshape(num_heads, config.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
