"""Shapes of well-known models, with random weights made on the spot: speed needs no others.

Numbers from the models' public config.json files.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from respike.checkpoint.families import expected_tensors, mixer_of
from respike.config import ModelConfig, RopeConfig, full_layers
from respike.conversion.initial import initial_tensor
from respike.errors import UsageError, did_you_mean
from respike.recipe import Recipe, apply_recipe

Family = Literal["llama", "qwen2", "qwen3"]
OPEN_BETA = -1.0
"""Every head of a random far memory takes part: a shut one would cost nothing."""
BLOCK = 1 << 20
"""Random numbers repeat after this many: filling gigabytes takes seconds, not minutes."""


@dataclass(frozen=True)
class Shape:
    """What differs between the models."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    theta: float
    trained_tokens: int
    tied: bool

    def config(self) -> ModelConfig:
        """With full softmax everywhere."""
        return ModelConfig(
            family=self.family,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head_dim,
            rms_norm_eps=1e-5 if self.family == "llama" else 1e-6,
            rope=RopeConfig(theta=self.theta),
            max_position_embeddings=self.trained_tokens,
            tie_word_embeddings=self.tied,
            qkv_bias=self.family == "qwen2",
            o_bias=False,
            qk_norm=self.family == "qwen3",
            bos_token_id=0,
            eos_token_ids=(),
            layers=full_layers(self.layers, self.groups),
        )


SHAPES = {
    "smollm2-135m": Shape("llama", 49152, 576, 1536, 30, 9, 3, 64, 1e5, 8192, True),
    "qwen2.5-0.5b": Shape("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 1e6, 32768, True),
    "qwen2.5-1.5b": Shape("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, 1e6, 32768, True),
    "qwen2.5-7b": Shape("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 1e6, 32768, False),
    "qwen3-4b": Shape("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 5e6, 262144, True),
}


def shape_config(name: str) -> ModelConfig:
    """The config called ``name``.

    Raises:
        UsageError: No shape has this name.
    """
    if name not in SHAPES:
        raise UsageError(
            f"no shape {name!r}, expected one of {', '.join(SHAPES)}",
            hint=did_you_mean(name, SHAPES),
        )
    return SHAPES[name].config()


@dataclass
class RandomCheckpoint:
    """What `respike.loading.load_decoder` needs of a checkpoint, without files."""

    config: ModelConfig
    recipe: Recipe
    stored_dtype: torch.dtype = torch.bfloat16
    spread: float = 0.02
    noise: Tensor = field(init=False)
    shapes: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = dict(expected_tensors(self.config))
        generator = torch.Generator().manual_seed(0)
        self.noise = (self.spread * torch.randn(BLOCK, generator=generator)).to(self.stored_dtype)

    def read(self, name: str) -> Tensor:
        """A tensor of noise, of ones for a norm, or a mixer's own start with its gates open."""
        shape = self.shapes[name]
        if name.endswith(".beta"):
            return torch.full(shape, OPEN_BETA)
        routes = name.endswith("mlp.gate.weight") and self.recipe.moe
        if mixer_of(self.config, name) is not None or routes:
            return initial_tensor(name, shape, self.config, self.recipe)
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        count = math.prod(shape)
        return self.noise.repeat(-(-count // BLOCK))[:count].view(shape)


def random_checkpoint(source: ModelConfig, recipe: Recipe) -> RandomCheckpoint:
    """``source`` converted by ``recipe``, with random weights; for `load_decoder`."""
    return RandomCheckpoint(apply_recipe(recipe, source), recipe)
