"""Accounting without weights: parameters, bytes, and what a state needs at any length."""

import math

from respike.checkpoint.families import expected_tensors
from respike.config import ModelConfig

REPORT_LENGTHS = (1_024, 8_192, 65_536, 1_048_576)
"""Context lengths, in tokens, at which state bytes are reported."""


def num_parameters(config: ModelConfig) -> int:
    """Weights of the model; a tied output matrix counts once."""
    return sum(math.prod(shape) for _, shape in expected_tensors(config))


def state_bytes(config: ModelConfig, num_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes the state of one sequence needs after ``num_tokens`` tokens.

    Args:
        config: The model.
        num_tokens: Tokens seen.
        bytes_per_value: 2 for bf16 keys and values, 4 for f32.
    """
    total = 0
    for _, part in config.mixers():
        slots = num_tokens if part.mixer == "full" else part.window_tokens + part.sink_tokens
        total += 2 * len(part.groups) * config.head_dim * slots
    return total * bytes_per_value


def growth_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes each further token adds to the state: 0 for a constant-memory model."""
    return 2 * len(config.softmax_groups()) * config.head_dim * bytes_per_value
