"""What new tensors hold before any training: keep everything, add nothing."""

import hashlib
import math

import torch
from torch import Tensor

from respike.checkpoint.families import LEARNED_SINKS, mixer_of
from respike.config import ModelConfig
from respike.recipe import Recipe

KEPT_HALF_LIFE_TOKENS = 1024
"""Of kept tokens' worth, without calibration."""
SINK_SPREAD = 0.02
"""Of learned sinks that begin at random: as embeddings of most models began."""


def initial_tensor(
    full_name: str, shape: tuple[int, ...], config: ModelConfig, recipe: Recipe
) -> Tensor:
    """The start of one tensor that is added to the source, float32.

    Gates forget slowly and do not depend on the input yet; norms have weight one; a far memory is
    shut. What must differ between units is random, from a seed of where it stands.

    Args:
        full_name: Of a tensor that the source does not have.
        shape: Its shape.
        config: Of the converted model.
        recipe: Whose options say how long memories last.
    """
    found = mixer_of(config, full_name)
    if found is None:
        return _beyond_mixers(full_name, shape, recipe)
    name, part = found
    if name in ("key_weight", "query_weight"):
        # Keys and queries of a group begin with the same prototypes.
        where = full_name.removesuffix(name)
        prototypes = _random(where, (len(part.groups), *shape[1:])) / math.sqrt(config.head_dim)
        return prototypes.repeat_interleave(shape[0] // len(part.groups), 0)
    if name == "beta":
        return torch.full(shape, -torch.inf)
    if name == "keep_log2_half_life":
        return torch.full(shape, math.log2(KEPT_HALF_LIFE_TOKENS))
    if name == "log2_half_life":
        tokens = recipe.far.half_life_tokens
        return torch.full(shape, math.log2(tokens))
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(("_down.weight", "router.weight")):  # what follows a down is zero
        return _random(full_name, shape) / math.sqrt(config.hidden_size)
    if name == "memory.gate_up.bias":
        # sigmoid(bias) ** (1 / normalizer) == 2 ** (-1 / half life)
        halvings = recipe.gla.gate_normalizer / recipe.gla.half_life_tokens
        return torch.full(shape, -_inverse_softplus(halvings * math.log(2)))
    if name == "memory.dt_bias":
        # softplus(bias) == ln 2 / half life, with A_log zero
        is_sse = part.mixer != "blocks" and part.memory is not None and part.memory.kind == "sse"
        half_life = (recipe.sse if is_sse else recipe.delta).half_life_tokens
        return torch.full(shape, _inverse_softplus(math.log(2) / half_life))
    return torch.zeros(shape)


def _beyond_mixers(full_name: str, shape: tuple[int, ...], recipe: Recipe) -> Tensor:
    """Norms of a merge, routers of experts, sinks."""
    if full_name.endswith("beside.softmax_norm.weight"):
        return torch.full(shape, recipe.beside.softmax_scale)
    if full_name.endswith("beside.memory_norm.weight"):
        return torch.full(shape, recipe.beside.memory_scale)
    if full_name.endswith("mlp.gate.weight"):
        assert recipe.moe is not None
        return _random(full_name, shape) * recipe.moe.router_spread
    assert full_name == LEARNED_SINKS, full_name
    return _random(full_name, shape) * SINK_SPREAD


def _inverse_softplus(y: float) -> float:
    """``log(exp(y) - 1)``, for y too large for ``exp`` too."""
    return y + math.log(-math.expm1(-y))


def _random(seed: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal, the same on every machine."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
