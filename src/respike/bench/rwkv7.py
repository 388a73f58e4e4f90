"""A recurrent rival that llama.cpp runs: an RWKV-7 of about a model's size, with random weights.

For timing only. Tensor names and shapes as llama.cpp's loader asks for them (``rwkv7``); ranks of
the low-rank parts as its converter derives them from the width.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from respike.config import ModelConfig

HEAD = 64
CONTEXT_TOKENS = 1 << 22


def _rank(width: int, exponent: float, factor: float) -> int:
    return max(1, round(math.pow(width, exponent) * factor / 32)) * 32


def widths(config: ModelConfig) -> tuple[int, int, int]:
    """(width, MLP width, layers) of an RWKV-7 with about as many parameters in its layers.

    A layer has about ``12 width^2`` of them, so the depth follows from the width, which is that
    of ``config``.
    """
    width = -(-config.hidden_size // HEAD) * HEAD
    kv = 2 * config.num_key_value_heads + 2 * config.num_attention_heads
    per_layer = config.hidden_size * (kv * config.head_dim + 3 * config.intermediate_size)
    layers = max(1, round(config.num_hidden_layers * per_layer / (12.5 * width * width)))
    return width, 4 * width, layers


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape, rows first as numpy has it."""
    width, mlp, layers = widths(config)
    decay, rate = _rank(width, 0.5, 1.8), _rank(width, 0.5, 1.8)
    value, gate = _rank(width, 0.5, 1.3), _rank(width, 0.8, 0.6)
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, width)}
    for name in ("token_embd_norm", "output_norm"):
        found |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    found["output.weight"] = (config.vocab_size, width)
    for i in range(layers):
        block = f"blk.{i}."
        for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
            found |= {f"{block}{name}.weight": (width,), f"{block}{name}.bias": (width,)}
        ranks = {"w": decay, "a": rate, "v": value if i else rate, "g": gate}
        for part, rank in ranks.items():
            if part != "g":
                found[f"{block}time_mix_{part}0.weight"] = (width,)
            found[f"{block}time_mix_{part}1.weight"] = (rank, width)
            found[f"{block}time_mix_{part}2.weight"] = (width, rank)
        found[f"{block}time_mix_lerp_fused.weight"] = (6, 1, 1, width)
        for name in ("k_k", "k_a", "r_k"):
            found[f"{block}time_mix_{name}.weight"] = (width,)
        for name in ("key", "value", "receptance", "output"):
            found[f"{block}time_mix_{name}.weight"] = (width, width)
        found[f"{block}channel_mix_lerp_k.weight"] = (1, 1, width)
        found[f"{block}channel_mix_key.weight"] = (mlp, width)
        found[f"{block}channel_mix_value.weight"] = (width, mlp)
    return found


def write_rwkv7(path: Path, config: ModelConfig) -> Path:
    """Write the GGUF file: matrices in Q8_0, the rest in float32."""
    import gguf

    width, mlp, layers = widths(config)
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(partial, "rwkv7")
    writer.add_name("random rwkv7")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(HEAD)
    writer.add_decay_lora_rank(_rank(width, 0.5, 1.8))
    writer.add_iclr_lora_rank(_rank(width, 0.5, 1.8))
    writer.add_value_residual_mix_lora_rank(_rank(width, 0.5, 1.3))
    writer.add_gate_lora_rank(_rank(width, 0.8, 0.6))
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(0)
    for name, shape in tensors(config).items():
        writer.add_tensor(name, *_values(random, name, shape, gguf))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
    return path


def _values(
    random: np.random.Generator, name: str, shape: tuple[int, ...], gguf: Any
) -> tuple[Any, None, Any]:
    """(data, as it is, type) for `GGUFWriter.add_tensor`."""
    big = len(shape) == 2 and "_norm" not in name
    values = (0.02 * random.standard_normal(shape)).astype(np.float32)
    if not big:
        plain = gguf.GGMLQuantizationType.F32
        return values + (1 if "norm.weight" in name or "_ln.weight" in name else 0), None, plain
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.quantize(values, kind), None, kind
