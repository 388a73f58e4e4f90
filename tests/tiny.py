"""Pico models for the tests: random weights, every dimension different, nothing downloaded.

    model_config, random_decoder    ours, without files and without transformers
    tiny_config, save_tiny          a random transformers model in a folder, with a tokenizer
    write_gguf                      that folder as llama.cpp's converter would write it
    save_spikingbrain               a random SpikingBrain-7B, as its makers release it

Letters: V vocabulary, D width, F MLP width, L layers, H query heads, G KV groups, K head dim.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from respike.checkpoint.families import expected_tensors
from respike.config import (
    AnyMemory,
    BesideConfig,
    BlockMixer,
    DeltaMemory,
    FarMemory,
    FullMixer,
    GlaMemory,
    LayerConfig,
    LinearMemory,
    LinearMixer,
    Mixer,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    SseMemory,
    TiedMemory,
    WindowMixer,
)
from respike.models.decoder import Decoder

V, D, F, L, H, K = 293, 48, 72, 4, 6, 8
GROUPS = {"llama": 3, "qwen2": 3, "qwen3": 2}
HEAD_DIM = {"llama": 8, "qwen2": 8, "qwen3": 20}
CONTEXT = 256
SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.5}


# ---- ours ------------------------------------------------------------------------------------


def full(*groups: int) -> FullMixer:
    return FullMixer(groups=groups)


def window(
    *groups: int,
    tokens: int = 7,
    sinks: int = 3,
    reach: int = CONTEXT,
    memory: AnyMemory | None = None,
) -> WindowMixer:
    return WindowMixer(
        groups=groups,
        window_tokens=tokens,
        sink_tokens=sinks,
        sink_reach_tokens=reach,
        memory=memory,
    )


def blocks(*groups: int, **changes: Any) -> BlockMixer:
    fields: dict[str, Any] = {
        "window_tokens": 6,
        "sink_tokens": 3,
        "sink_reach_tokens": CONTEXT,
        "block_tokens": 4,
        "summary_tokens": 2,
        "top_blocks": 2,
        "reach_tokens": CONTEXT,
        "cache": "model",
    }
    return BlockMixer(groups=groups, **fields | changes)


def linear(*groups: int, memory: LinearMemory) -> LinearMixer:
    return LinearMixer(groups=groups, memory=memory)


MIXED: tuple[tuple[Mixer, ...], ...] = (
    (full(0, 1, 2),),
    (full(1), window(0, 2, reach=16)),
    (window(2, tokens=5, sinks=0), window(0, 1, tokens=9, sinks=2)),
    (window(0, 1, 2, reach=16),),
)
"""Every way to mix: one mixer, two kinds, two of a kind, groups out of order, sinks past reach."""

FAR, TIED = FarMemory(features=5), TiedMemory()
KEEPING = FarMemory(features=5, kept_tokens=6)
GLA = GlaMemory(feature="relu", gate_rank=4, gate_normalizer=16.0)
GLA_AS_IS = GlaMemory(feature="identity", gate_rank=7, gate_normalizer=2.0)
DELTA, DELTA_TO_2 = (DeltaMemory(negative_eigenvalues=to_2) for to_2 in (False, True))
MEMORIES: tuple[tuple[Mixer, ...], ...] = (
    (window(0, 1, 2, reach=16, memory=FAR),),
    (linear(1, memory=GLA), window(2, memory=DELTA), window(0, sinks=2, memory=TIED)),
    (linear(1, memory=TIED), window(0, 2, tokens=5, sinks=0, memory=FAR)),
    (linear(2, memory=DELTA_TO_2), window(1, reach=16, memory=GLA_AS_IS), full(0)),
)
"""Every memory, alone or beside a window, of all groups and of some."""


BLOCKS: tuple[tuple[Mixer, ...], ...] = (
    (blocks(0, 1, 2, sink_reach_tokens=16, reach_tokens=20),),
    (blocks(1, summary_tokens=4, reach_tokens=None), window(0, 2)),
    (full(0), blocks(2, 1, block_tokens=5, summary_tokens=1, top_blocks=1)),
)
"""Block-sparse softmax alone and beside others: every reach, every summary."""


SSE = SseMemory(partitions=3, chosen=2, rank=5, gate="corrected")
SSE_RELEASED = SseMemory(partitions=4, chosen=2, rank=7, gate="released")
EXPERTS = MoeConfig(experts=5, chosen=2, shared=1, router="softmax", normalised=True)
EXPERTS_RAW = MoeConfig(experts=4, chosen=1, shared=2, router="sigmoid", normalised=False)


def beside(*mixers: LinearMixer, merge: Any = "sum", dropout: float = 0.0) -> BesideConfig:
    groups = sum(len(part.groups) for part in mixers)
    return BesideConfig(
        num_key_value_heads=groups, mixers=mixers, merge=merge, softmax_dropout=dropout
    )


BRAINS = (
    LayerConfig(
        mixers=(window(0, 1, 2, sinks=0),),
        beside=beside(linear(*range(6), memory=SSE_RELEASED), merge="mean", dropout=0.5),
    ),
    LayerConfig(mixers=(FullMixer(groups=(0, 2), memory=TIED), window(1, memory=SSE)), moe=EXPERTS),
    LayerConfig(
        mixers=(window(0, 1, 2, reach=16),),
        beside=beside(linear(1, memory=TIED), linear(0, memory=GLA)),
        moe=EXPERTS_RAW,
    ),
    LayerConfig(mixers=(full(0, 1, 2),)),
)
"""Attention beside attention, of as many KV groups as heads or fewer; experts; one plain layer."""


def model_config(
    layers: Sequence[tuple[Mixer, ...] | LayerConfig] = MIXED, **changes: Any
) -> ModelConfig:
    """A llama-like config with these mixers."""
    fields: dict[str, Any] = {
        "family": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": len(layers),
        "num_attention_heads": H,
        "num_key_value_heads": 3,
        "head_dim": K,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(theta=10_000.0),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "qkv_bias": False,
        "o_bias": False,
        "qk_norm": False,
        "bos_token_id": None,
        "eos_token_ids": (),
        "layers": tuple(
            layer if isinstance(layer, LayerConfig) else LayerConfig(mixers=layer)
            for layer in layers
        ),
    }
    return ModelConfig(**fields | changes)


def random_decoder(
    config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Decoder:
    """The config's decoder with random weights, large enough for attention to be sharp."""
    r = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        decoder = Decoder(config)
    weights = {
        name: random_weight(name, shape, r).to(dtype) for name, shape in expected_tensors(config)
    }
    decoder.load_state_dict(weights, strict=True, assign=True)
    return decoder.requires_grad_(False).eval()


AROUND = {"norm.weight": 1.0, "log2_half_life": 4.0, "gate_up.bias": 2.0, "dt_bias": -3.0}
"""Where random weights lie if not around zero: memories are to last longer than a window."""


def random_weight(name: str, shape: tuple[int, ...], r: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=r)
    return next((at for end, at in AROUND.items() if name.endswith(end)), 0.0) + 0.2 * noise


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


# ---- theirs ----------------------------------------------------------------------------------


def tiny_config(family: str, **changes: Any) -> Any:
    """A transformers config: ``changes`` of its fields; ``rope`` is its ``rope_parameters``."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10_000.0, **changes.pop("rope", {})}
    fields: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": GROUPS[family],
        "head_dim": HEAD_DIM[family],
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": family == "qwen2",
        "bos_token_id": token_id("<|begin|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "attn_implementation": "eager",
        "dtype": "float32",
    }
    kind = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}[family]
    return getattr(transformers, kind)(**fields | changes)


def save_tiny(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """Write a random model of ``family`` with a tokenizer into ``folder`` and return it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    r = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, tuple(parameter.shape), r))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder, add_bos=family == "llama")
    return folder


def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    """What transformers makes of the model in ``folder``, in float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return model(tokens).logits


SPIKINGBRAIN = {"model_type": "gla_swa", "sliding_window": 5, "max_position_embeddings": CONTEXT}


def spikingbrain_shapes(attn_layers: Sequence[int] = (1, 3)) -> dict[str, tuple[int, ...]]:
    """Their names and shapes, in three KV groups, as the released code would make them."""
    rank, kv = 16, GROUPS["qwen2"] * K
    shapes: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (V, D)}
    for i in range(L):
        attn = {"q_proj.weight": (H * K, D), "q_proj.bias": (H * K,), "o_proj.weight": (D, H * K)}
        for name in ("k_proj", "v_proj"):
            attn |= {f"{name}.weight": (kv, D), f"{name}.bias": (kv,)}
        if i not in attn_layers:
            attn |= {"gk_proj.0.weight": (rank, D), "gk_proj.1.weight": (kv, rank)}
            attn |= {"gk_proj.1.bias": (kv,), "g_norm.weight": (K,)}
        layer = {f"attn.{name}": shape for name, shape in attn.items()}
        layer |= {"attn_norm.weight": (D,), "mlp_norm.weight": (D,)}
        layer |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D)}
        layer |= {"mlp.down_proj.weight": (D, F)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def spikingbrain_weights(attn_layers: Sequence[int] = (1, 3)) -> dict[str, Tensor]:
    r = torch.Generator().manual_seed(0)
    shapes = spikingbrain_shapes(attn_layers)
    return {name: random_weight(name, shape, r).bfloat16() for name, shape in shapes.items()}


def save_spikingbrain(folder: Path, *, num_shards: int = 3, **changes: Any) -> Path:
    """Write a random SpikingBrain-7B in small as it is released: .bin shards, sparse config."""
    weights = spikingbrain_weights(changes.get("attn_layers", (1, 3)))
    config = SPIKINGBRAIN | {
        "architectures": ["GLAswaForCausalLM"],
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": GROUPS["qwen2"],
        "eos_token_id": token_id("<|im_end|>"),
    }
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    home = {}
    for number in range(num_shards):
        name = f"pytorch_model-{number + 1:05d}-of-{num_shards:05d}.bin"
        shard = OrderedDict((n, weights[n]) for n in list(weights)[number::num_shards])
        torch.save(shard, folder / name)
        home |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": home}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_tokenizer(folder, add_bos=False)
    return folder


# ---- tokenizer -------------------------------------------------------------------------------

MERGES = (
    ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("r", "e"), ("o", "n"),
    ("Ġ", "s"), ("e", "r"), ("n", "d"), ("Ġa", "nd"), ("o", "r"), ("in", "g"),
)  # fmt: skip


def vocabulary() -> list[str]:
    """Special tokens, the 256 bytes, then one token a merge: fewer than V, as many models have."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(a + b for a, b in MERGES)]


def token_id(token: str) -> int:
    return vocabulary().index(token)


def save_tokenizer(folder: Path, *, add_bos: bool) -> None:
    """Write tokenizer.json (byte-level BPE) and tokenizer_config.json (chat template)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if add_bos:
        begin = SPECIAL[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocab[begin])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|begin|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": add_bos,
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


# ---- GGUF ------------------------------------------------------------------------------------

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, *middle, last = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(middle)]}.{last}"


def interleaved(tensor: Tensor, num_heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k: rotary pairs side by side."""
    halves = tensor.view(num_heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def write_gguf(path: Path, folder: Path) -> Path:
    """The model of ``folder`` as one F32 GGUF file, keys and row order as llama.cpp's converter."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    family, rope = config.model_type, config.rope_parameters
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    add_vocabulary(writer, config.vocab_size, add_bos=family == "llama")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[-2]
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = interleaved(tensor, heads[part]) if family == "llama" and part in heads else tensor
        writer.add_tensor(gguf_name(name), rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(config: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One divisor per frequency, from transformers' own scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return (config.rope_parameters["rope_theta"] ** -exponent / scaled).float().numpy()


def add_vocabulary(writer: gguf.GGUFWriter, size: int, *, add_bos: bool) -> None:
    tokens = vocabulary()
    padding = [f"[PAD{i}]" for i in range(len(tokens), size)]
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL)
    kinds += [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL))
    kinds += [gguf.TokenType.UNUSED] * len(padding)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + padding)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(token_id("<|begin|>"))
    writer.add_eos_token_id(token_id("<|im_end|>"))
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)


def save_documents(folder: Path, *, plain: bool = False) -> Path:
    """Forty short documents, no two alike, as JSON Lines and, if asked, all of them as one text."""
    words = (" the", " and", " a", " ing", " she", " sand", " there", " or", " then", " on")
    draw = torch.Generator().manual_seed(0)
    rows = []
    for number in range(40):
        picks = torch.randint(len(words), (90,), generator=draw).tolist()
        rows.append(f"{number}:" + "".join(words[i] for i in picks))
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    if plain:
        (folder / "plain.txt").write_text("\n".join(rows), encoding="utf-8")
    return folder
