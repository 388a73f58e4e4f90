"""How large the source's attention outputs are: where norms of new memories begin.

The norms of two merged branches give every token of every layer an output of the same size, which
the source's layers do not have: with weights of one the text is noise. A weight as large as the
layer's mean output keeps most of what the source says (figures: docs/log.md). So it is with the
norm of a memory that stands alone, on the scale of a head's output. The source is read and run
layer by layer, so this needs the memory of one layer.

Letters: T tokens, D model width.
"""

import torch
from torch import Tensor

from respike.checkpoint import Checkpoint
from respike.checkpoint.families import expected_tensors
from respike.config import ModelConfig
from respike.errors import UnsupportedError
from respike.layers.span import Span
from respike.models.build import frequencies
from respike.models.decoder import DecoderLayer
from respike.recipe import Recipe


@torch.no_grad()
def attention_sizes(source: Checkpoint, tokens: Tensor) -> tuple[list[float], list[float]]:
    """For each layer the mean over tokens of the root mean square of its attention's output.

    The first list is of what joins the residual, the second of the heads before the output matrix.

    Args:
        source: The original.
        tokens: Token ids (T,).

    Raises:
        UnsupportedError: The source has merged branches or learned sinks itself.
    """
    config = source.config
    if config.learned_sinks or any(layer.beside for layer in config.layers):
        raise UnsupportedError(
            "measuring a source with learned sinks, or with an attention beside another",
            hint="set beside.start=ones and linear.start=ones",
        )
    count = len(tokens)
    x = source.read("model.embed_tokens.weight")[tokens][None].float()
    start, valid = torch.zeros(1, dtype=torch.int64), torch.tensor([count])
    turns = frequencies(config.rope, config.head_dim)
    span = Span(start, valid, count, turns, x.dtype, x.device)
    sizes, heads = [], []
    for index in range(config.num_hidden_layers):
        layer = _layer(source, index)
        normed, attention = layer.input_layernorm(x), layer.self_attn
        state = layer.init_state(1, x)
        read, _ = attention.mix(normed, attention.project(normed), span, state)
        mixed = attention.o_proj(read.flatten(2))
        heads.append(float(read.square().mean(-1).sqrt().mean()))
        sizes.append(float(mixed.square().mean(-1).sqrt().mean()))
        x = layer.add_mixed(x, mixed)
    return sizes, heads


def _layer(source: Checkpoint, index: int) -> DecoderLayer:
    """One layer of the source with its weights, float32."""
    with torch.device("meta"):
        layer = DecoderLayer(source.config, source.config.layers[index])
    prefix = f"model.layers.{index}."
    weights = {
        name.removeprefix(prefix): source.read(name).float()
        for name, _ in expected_tensors(source.config)
        if name.startswith(prefix)
    }
    layer.load_state_dict(weights, strict=True, assign=True)
    return layer.requires_grad_(False).eval()


def measured_norms(
    recipe: Recipe, config: ModelConfig, sizes: list[float], heads: list[float]
) -> dict[str, Tensor]:
    """The norms of merges and of memories that stand alone in the converted model, by name.

    Args:
        recipe: Says how large softmax and memories are to be, in units of what the source had, and
            which of them are measured.
        config: Of the converted model.
        sizes: From `attention_sizes`.
        heads: Likewise.
    """
    found = {}
    for index, (layer, size) in enumerate(zip(config.layers, sizes, strict=True)):
        for place, part in enumerate(layer.mixers):
            if part.mixer == "linear" and recipe.linear.start == "measured":
                weight = torch.full((config.head_dim,), recipe.linear.scale * heads[index])
                found[f"model.layers.{index}.self_attn.mixers.{place}.norm.weight"] = weight
        if layer.beside is None or recipe.beside.start != "measured":
            continue
        unit = 2 * size if layer.beside.merge == "mean" else size
        scales = {"softmax": recipe.beside.softmax_scale, "memory": recipe.beside.memory_scale}
        for name, scale in scales.items():
            weight = torch.full((config.hidden_size,), scale * unit)
            found[f"model.layers.{index}.beside.{name}_norm.weight"] = weight
    return found
