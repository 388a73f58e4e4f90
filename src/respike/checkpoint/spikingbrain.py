"""SpikingBrain-7B as its makers release it: what its config means, and its tensor names.

Source: Pan et al., arXiv:2509.05276, section 2, and the released ``hf_7B_model``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from respike.config import (
    GlaMemory,
    LayerConfig,
    LinearMixer,
    ModelConfig,
    SpikeBands,
    SpikeConfig,
    WindowMixer,
)
from respike.errors import CheckpointError, UnsupportedError

FAMILY = "gla_swa"
"""Their ``model_type``."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "swish",
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "gate_low_rank_dim": 16,
    "gate_logit_normalizer": 16,
}
"""What a released config leaves out; the last two stand only in the released code."""

END_OF_TEXT, END_OF_TURN = 151_643, 151_645
"""Their config ends a text at the first alone; the chat template of the SFT ends a turn at the
second. Both are Qwen2.5's."""

MODEL_NAMES = {"model.embed_tokens": "model.embeddings"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.o_proj",
    "self_attn.mixers.0.memory.gate_down": "attn.gk_proj.0",
    "self_attn.mixers.0.memory.gate_up": "attn.gk_proj.1",
    "self_attn.mixers.0.norm": "attn.g_norm",
    "post_attention_layernorm": "mlp_norm",
}
"""Our name of a module to theirs; modules that are not here are called the same."""


def with_defaults(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Their config in the words of the other families, every field filled in.

    Args:
        raw: The parsed ``config.json``.
        where: Its path, for messages.

    Raises:
        UnsupportedError: It asks for short convolutions, which no released model has.
    """
    full = DEFAULTS | dict(raw)
    if full.get("use_short_conv"):
        raise UnsupportedError(f"{where}: use_short_conv is true; respike has no convolutions")
    vocab = full["vocab_size"]
    known = [e for e in (END_OF_TEXT, END_OF_TURN) if isinstance(vocab, int) and e < vocab]
    eos = full.get("eos_token_id")
    given = eos if isinstance(eos, list) else [] if eos is None else [eos]
    full["eos_token_id"] = [*given, *(e for e in known if e not in given)]
    if known:
        full.setdefault("bos_token_id", END_OF_TEXT)
    full["rms_norm_eps"] = full["norm_eps"]
    return full


def hybrid_layers(
    raw: Mapping[str, Any], num_layers: int, num_groups: int, context_tokens: int, where: str
) -> tuple[LayerConfig, ...]:
    """Windows at ``attn_layers`` (if not given, the odd ones), gated linear attention elsewhere.

    Args:
        raw: From `with_defaults`.
        num_layers: Layers of the model.
        num_groups: KV groups of each.
        context_tokens: Trained length.
        where: The config's path, for messages.

    Raises:
        CheckpointError: ``attn_layers`` or ``sliding_window`` cannot be.
    """
    at, back = raw.get("attn_layers"), raw["sliding_window"]
    at = list(range(1, num_layers, 2)) if at is None else at
    if not isinstance(at, list):
        raise CheckpointError(f"{where}: attn_layers is {str(at)[:60]!r}, expected a list")
    for index in at:
        if type(index) is not int or not 0 <= index < num_layers:
            raise CheckpointError(
                f"{where}: attn_layers names layer {str(index)[:60]}, "
                f"the model has layers 0 to {num_layers - 1}"
            )
    if type(back) is not int or back < 1:
        raise CheckpointError(
            f"{where}: sliding_window is {str(back)[:60]!r}, expected a count of tokens"
        )
    groups = tuple(range(num_groups))
    # Their FlashAttention call takes (sliding_window, 0) and their vLLM plug-in adds one: a query
    # sees that many keys before its own. Ours counts its own. (Their decoding cache: one fewer.)
    window = WindowMixer(
        groups=groups,
        window_tokens=back + 1,
        sink_tokens=0,
        sink_reach_tokens=context_tokens,
    )
    memory = GlaMemory(
        feature="relu",
        gate_rank=raw["gate_low_rank_dim"],
        gate_normalizer=raw["gate_logit_normalizer"],
    )
    softmax = LayerConfig(mixers=(window,))
    linear = LayerConfig(mixers=(LinearMixer(groups=groups, memory=memory),))
    windows = set(at)
    return tuple(softmax if i in windows else linear for i in range(num_layers))


def their_name(name: str) -> str:
    """A tensor's name in a released checkpoint, from ours."""
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", module)
    if layer is None:
        return f"{MODEL_NAMES.get(module, module)}.{kind}"
    return f"{layer[1]}{LAYER_NAMES.get(layer[2], layer[2])}.{kind}"


def their_config(config: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` as theirs, of a model that `hybrid_layers` could have described."""
    kinds = [layer.mixers[0] for layer in config.layers]
    windows = {part.window_tokens for part in kinds if part.mixer == "window"}
    return {
        "architectures": ["GLAswaForCausalLM"],
        "model_type": FAMILY,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "attn_layers": [i for i, part in enumerate(kinds) if part.mixer == "window"],
        "attn_mode": "chunk",
        "use_short_conv": False,
        "hidden_act": "swish",
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": max(windows, default=DEFAULTS["sliding_window"] + 1) - 1,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


# ---- W8ASpike: rounded weights, and neurons in front of them -----------------------------------

SCALES = ".weight_quantizer.scales"
"""After a weight's module: what its groups of inputs are multiples of, (O, groups, 1)."""
THRESHOLDS = 3.0
"""Of the neurons, in a token's mean magnitude."""
ROUNDED_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOT_ROUNDED = "down_proj"
"""It has scales, but its released forward takes weights and inputs as they are."""


def is_quantised(names: Iterable[str]) -> bool:
    """Whether a checkpoint with these tensors is the W8ASpike release."""
    return any(name.endswith((SCALES, ".attn.gk_proj.weight")) for name in names)


def as_quantised(config: ModelConfig) -> ModelConfig:
    """The config of the W8ASpike release, from what its ``config.json`` says.

    Gates are full matrices, and neurons stand in front of all linear layers but ``down_proj`` and
    the head. Of what the release rounds beyond that (the gate's input, and in windows queries, keys
    and values after rotation) nothing is rounded here.
    """
    layers = []
    for layer in config.layers:
        (part,) = layer.mixers
        if part.mixer == "linear":
            memory = part.memory.model_copy(update={"gate_rank": None})
            layer = layer.model_copy(
                update={"mixers": (part.model_copy(update={"memory": memory}),)}
            )
        layers.append(layer)
    band = 1 / (2 * THRESHOLDS)
    bands = SpikeBands(qkv=band, o=band, mlp=band, down=None)
    spikes = SpikeConfig(
        neuron="adaptive", k=THRESHOLDS, weights="float", layers=(bands,) * len(layers)
    )
    return config.model_copy(update={"layers": tuple(layers), "spikes": spikes})


def their_quantised_name(name: str) -> str:
    """As `their_name`, in the W8ASpike release."""
    return their_name(name).replace(".attn.gk_proj.1.", ".attn.gk_proj.")


def check_scales(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Every weight of a linear layer has scales that fit it, and nothing else has.

    Raises:
        CheckpointError: One is missing, left over, or does not fit.
    """
    rounded = {
        name.removesuffix(".weight")
        for name in shapes
        if name.endswith(".weight") and name.split(".")[-2] in (*ROUNDED_LAYER, "gk_proj")
    }
    found = {name.removesuffix(SCALES) for name in shapes if name.endswith(SCALES)}
    for module in sorted(rounded ^ found):
        what = "missing" if module in rounded else "of nothing"
        raise CheckpointError(f"{where}: tensor {module + SCALES!r} is {what}")
    for module in sorted(found):
        (rows, columns), scales = shapes[module + ".weight"], shapes[module + SCALES]
        fits = len(scales) == 3 and (scales[0], scales[2]) == (rows, 1)
        if not fits or scales[1] < 1 or columns % scales[1]:
            raise CheckpointError(
                f"{where}: tensor {module + SCALES!r} has shape {scales}, "
                f"which does not fit a weight of {(rows, columns)}"
            )


def rounded_weight(weight: Tensor, scales: Tensor, where: str) -> Tensor:
    """What the released forward multiplies with: each group as multiples of its scale, unlimited.

    Args:
        weight: (O, I).
        scales: (O, groups, 1); a group is I / groups inputs in a row.
        where: The file and the scales' name, for errors.

    Raises:
        CheckpointError: A scale is not a number above 0.
    """
    if not (scales > 0).all() or not scales.isfinite().all():
        raise CheckpointError(f"{where}: scales are numbers above 0, some here are not")
    groups = weight.float().view(len(weight), scales.shape[1], -1)
    scales = scales.float()
    return ((groups / scales).round() * scales).view_as(weight).to(weight.dtype)
