"""Accounting without weights: parameters, bytes, and what a state needs at any length."""

import math

from respike.checkpoint.families import expected_tensors
from respike.config import AnyMemory, ModelConfig

REPORT_LENGTHS = (1_024, 8_192, 65_536, 1_048_576)
"""Context lengths, in tokens, at which state bytes are reported."""

MEMORY_BYTES = 4
"""Bytes of a number in a linear memory: it is kept in float32 whatever the model's dtype."""


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
    head = config.head_dim
    total = 0
    for _, part in config.mixers():
        values = 0
        if part.mixer == "full":
            values = 2 * head * num_tokens
        elif part.mixer == "window":
            values = 2 * head * (part.window_tokens + part.sink_tokens)
        each = values * bytes_per_value
        if part.mixer != "full" and part.memory is not None:
            each += MEMORY_BYTES * memory_values(part.memory, head)
        total += len(part.groups) * each
    return total


def memory_values(memory: AnyMemory, head_dim: int) -> int:
    """Numbers one KV group's memory holds."""
    if memory.kind == "far":
        return memory.features * (head_dim + 1)
    return head_dim * head_dim


def growth_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes each further token adds to the state: 0 for a constant-memory model."""
    return 2 * len(config.softmax_groups()) * config.head_dim * bytes_per_value
