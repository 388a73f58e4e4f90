"""Accounting without weights: parameters, bytes, and what a state needs at any length."""

import math

from respike.checkpoint.families import expected_tensors
from respike.config import AnyMemory, BlockMixer, ModelConfig

REPORT_LENGTHS = (1_024, 8_192, 65_536, 1_048_576)
"""Context lengths, in tokens, at which state bytes are reported."""

MEMORY_BYTES = 4
"""Bytes of a number in a linear memory: it is kept in float32 whatever the model's dtype."""


SCALE_BYTES = 4
"""Bytes of the scale of a key or value that is cached in int8."""


def num_parameters(config: ModelConfig) -> int:
    """Weights of the model; a tied output matrix counts once."""
    return sum(math.prod(shape) for _, shape in expected_tensors(config))


def state_parts(config: ModelConfig, num_tokens: int, bytes_per_value: int = 2) -> dict[str, int]:
    """Bytes the state of one sequence needs after ``num_tokens`` tokens, and what for.

    Args:
        config: The model.
        num_tokens: Tokens seen.
        bytes_per_value: 2 for bf16 keys and values, 4 for f32.

    Returns:
        ``softmax``: keys, values and summaries that grow with the sequence. ``window``: those of
        windows and sinks. ``memory``: memories. The last two are the same at every length.
    """
    pair = 2 * config.head_dim * bytes_per_value
    parts = {"softmax": 0, "window": 0, "memory": 0}
    for _, part in config.mixers():
        groups = len(part.groups)
        if part.mixer == "full":
            parts["softmax"] += groups * pair * num_tokens
            continue
        if part.mixer == "blocks":
            row, summary = _block_bytes(part, config.head_dim, bytes_per_value)
            count = num_tokens // part.summary_tokens
            parts["softmax"] += groups * (row * num_tokens + summary * count)
            continue
        if part.mixer == "window":
            parts["window"] += groups * pair * (part.window_tokens + part.sink_tokens)
        if part.memory is not None:
            values = memory_values(part.memory, config.head_dim)
            parts["memory"] += groups * MEMORY_BYTES * values
    return parts


def state_bytes(config: ModelConfig, num_tokens: int, bytes_per_value: int = 2) -> int:
    """The sum of `state_parts`."""
    return sum(state_parts(config, num_tokens, bytes_per_value).values())


def memory_values(memory: AnyMemory, head_dim: int) -> int:
    """Numbers one KV group's memory holds."""
    if memory.kind == "far":
        return memory.features * (head_dim + 1)
    return head_dim * head_dim


def _block_bytes(part: BlockMixer, head_dim: int, bytes_per_value: int) -> tuple[int, int]:
    """Bytes that one KV group of block-sparse softmax keeps of a token, and of a summary."""
    summary = head_dim * bytes_per_value
    if part.cache == "int8":
        return 2 * (head_dim + SCALE_BYTES), summary
    return 2 * summary, summary


def growth_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes each further token adds to the state, rounded up: 0 for a constant-memory model."""
    total = 0.0
    for _, part in config.mixers():
        if part.mixer == "full":
            total += len(part.groups) * 2 * config.head_dim * bytes_per_value
        elif part.mixer == "blocks":
            row, summary = _block_bytes(part, config.head_dim, bytes_per_value)
            total += len(part.groups) * (row + summary / part.summary_tokens)
    return math.ceil(total)
