"""Accounting without weights: parameters, bytes, and what a state needs at any length."""

import math
from collections.abc import Iterator

from respike.checkpoint.families import LEARNED_SINKS, expected_tensors
from respike.config import AnyMemory, BlockMixer, Mixer, ModelConfig

REPORT_LENGTHS = (1_024, 8_192, 65_536, 1_048_576)
"""Context lengths, in tokens, at which state bytes are reported."""

MEMORY_BYTES = 4
"""Bytes of a number in a linear memory: it is kept in float32 whatever the model's dtype."""

PLACE_BYTES = 12
"""Bytes of a kept token's worth and position."""

SCALE_BYTES = 4
"""Bytes of the scale of a key or value that is cached in int8."""


def num_parameters(config: ModelConfig) -> int:
    """Weights of the model; a tied output matrix counts once."""
    return sum(math.prod(shape) for _, shape in expected_tensors(config))


def state_parts(config: ModelConfig, num_tokens: int, bytes_per_value: int = 2) -> dict[str, int]:
    """Bytes the state of one sequence needs after ``num_tokens`` tokens, and what for.

    Args:
        config: The model.
        num_tokens: Tokens seen, learned sinks not counted.
        bytes_per_value: 2 for bf16 keys and values, 4 for f32.

    Returns:
        ``softmax``: keys, values and summaries that grow with the sequence. ``window``: those of
        windows, sinks and kept tokens. ``memory``: memories. The last two are the same at every
        length.
    """
    pair = 2 * config.head_dim * bytes_per_value
    num_tokens += config.learned_sinks
    parts = {"softmax": 0, "window": 0, "memory": 0}
    for _, part in config.mixers():
        groups = len(part.groups)
        if part.mixer == "full":
            parts["softmax"] += groups * pair * num_tokens
        if part.mixer == "blocks":
            row, summary = _block_bytes(part, config.head_dim, bytes_per_value)
            count = num_tokens // part.summary_tokens
            parts["softmax"] += groups * (row * num_tokens + summary * count)
            continue
        if part.mixer == "window":
            parts["window"] += groups * pair * (part.window_tokens + part.sink_tokens)
            row = 3 * config.head_dim * bytes_per_value + PLACE_BYTES
            parts["window"] += groups * row * kept_tokens(part)
        if part.memory is not None:
            values = memory_values(part.memory, config.head_dim)
            parts["memory"] += groups * MEMORY_BYTES * values
    return parts


def state_bytes(config: ModelConfig, num_tokens: int, bytes_per_value: int = 2) -> int:
    """The sum of `state_parts`."""
    return sum(state_parts(config, num_tokens, bytes_per_value).values())


def kept_tokens(part: Mixer) -> int:
    """Tokens that each KV group of a mixer keeps as they are behind its window."""
    if part.mixer == "window" and part.memory is not None and part.memory.kind == "far":
        return part.memory.kept_tokens
    return 0


def memory_values(memory: AnyMemory, head_dim: int) -> int:
    """Numbers one KV group's memory holds."""
    if memory.kind == "far":
        return memory.features * (head_dim + 1)
    copies = 1 + memory.partitions if memory.kind == "sse" else 1
    return copies * head_dim * head_dim


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


BITS = {"f32": 32.0, "bf16": 16.0, "f16": 16.0, "int8": 8.5, "int4": 4.5}
"""Of a stored weight; int8 and int4 with a float16 scale for each 32."""


def loaded_bytes(config: ModelConfig, weights: str, bytes_per_value: int = 2) -> int:
    """Bytes of the weights in memory when the native engine runs them.

    The embedding keeps its dtype, and is the output matrix too only on disk: in memory that is a
    packed one, with int4 in int8.

    Args:
        config: The model.
        weights: ``stored``, int8 or int4.
        bytes_per_value: Of the dtype it computes in.
    """
    head = config.vocab_size * config.hidden_size
    rest = num_parameters(config) - head * (1 if config.tie_word_embeddings else 2)
    bits = 8 * bytes_per_value if weights == "stored" else BITS[weights]
    head_bits = BITS["int8"] if weights == "int4" else bits
    return round(head * bytes_per_value + (rest * bits + head * head_bits) / 8)


def moved_bytes_per_token(config: ModelConfig, num_tokens: int, weights: str = "bf16") -> int:
    """Bytes a decoding step must move after ``num_tokens`` tokens, if no cache holds any.

    Every weight but those of an embedding that is only looked up and of experts that are not
    passed, the whole state, and memories once more, as they are written too (of partitions only the
    chosen ones).

    Args:
        config: The model.
        num_tokens: Tokens seen.
        weights: A key of `BITS`.
    """
    read = num_active_parameters(config)
    if not config.tie_word_embeddings:
        read -= config.vocab_size * config.hidden_size
    parts = state_parts(config, num_tokens)
    parts["softmax"] -= unseen_bytes(config, num_tokens)
    for _, part in config.mixers():
        if part.mixer != "blocks" and part.memory is not None and part.memory.kind == "sse":
            idle = part.memory.partitions - part.memory.chosen
            parts["memory"] -= len(part.groups) * MEMORY_BYTES * idle * config.head_dim**2
    return int(read * BITS[weights] / 8) + sum(parts.values()) + parts["memory"]


def unseen_bytes(config: ModelConfig, num_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that a step after ``num_tokens`` leaves alone: blocks not chosen."""
    unseen = 0
    for _, part in config.mixers():
        if part.mixer == "blocks":
            row, _ = _block_bytes(part, config.head_dim, bytes_per_value)
            unseen += len(part.groups) * row * (num_tokens - _seen_tokens(part, num_tokens))
    return unseen


def _seen_tokens(part: Mixer, num_tokens: int) -> int:
    """Tokens whose keys a softmax looks at for the token that has ``num_tokens`` before it."""
    if part.mixer == "linear":
        return 0
    if part.mixer == "full":
        return num_tokens
    seen = part.window_tokens + part.sink_tokens + kept_tokens(part)
    if part.mixer == "blocks":
        seen += part.top_blocks * part.block_tokens
    return min(num_tokens, seen)


def flops_per_token(config: ModelConfig, num_tokens: int) -> dict[str, int]:
    """Multiplications and additions of the token that has ``num_tokens`` before it.

    Returns:
        ``linear``: matrices of the layers. ``head``: the output matrix, where logits are asked
        for. ``softmax``: scores and sums over what is attended. ``memory``: reading and writing.
    """
    parts = {"linear": 0, "head": 2 * config.vocab_size * config.hidden_size}
    parts |= {"softmax": 0, "memory": 0}
    ends = ("embed_tokens.weight", "lm_head.weight", LEARNED_SINKS)
    for name, shape in expected_tensors(config):
        if len(shape) == 2 and not name.endswith(ends):
            parts["linear"] += 2 * math.prod(shape)
    parts["linear"] -= 2 * _idle_parameters(config)
    for part, heads in _parts(config):
        groups = len(part.groups)
        seen = _seen_tokens(part, num_tokens + 1)
        parts["softmax"] += 4 * heads * config.head_dim * seen
        if part.mixer == "blocks":
            summaries = num_tokens // part.summary_tokens
            parts["softmax"] += 2 * heads * config.head_dim * summaries
            continue
        if part.memory is None:
            continue
        values = memory_values(part.memory, config.head_dim)
        if part.memory.kind == "sse":  # the others are not touched
            values = (1 + part.memory.chosen) * values // (1 + part.memory.partitions)
        passes = {"delta": 2, "sse": 2}.get(part.memory.kind, 1)  # these read before they write
        parts["memory"] += 2 * values * (heads + passes * groups)
        if part.memory.kind == "far":
            parts["memory"] += 2 * part.memory.features * config.head_dim * (heads + groups)
    return parts


def _parts(config: ModelConfig) -> Iterator[tuple[Mixer, int]]:
    """Every mixer of the model and how many query heads it serves."""
    for layer in config.layers:
        for part in layer.mixers:
            yield part, len(part.groups) * config.heads_per_group
        if layer.beside is not None:
            share = config.num_attention_heads // layer.beside.num_key_value_heads
            for memory in layer.beside.mixers:
                yield memory, len(memory.groups) * share


def _idle_parameters(config: ModelConfig) -> int:
    """Weights of the experts that a token does not pass."""
    expert = 3 * config.hidden_size * config.intermediate_size
    routed = (layer.moe for layer in config.layers if layer.moe)
    return expert * sum(moe.experts - moe.chosen for moe in routed)


def num_active_parameters(config: ModelConfig) -> int:
    """Weights that one token meets: all but the experts it does not pass."""
    return num_parameters(config) - _idle_parameters(config)


def num_embedding_parameters(config: ModelConfig) -> int:
    """Weights of the embedding and, if it is another matrix, the head."""
    matrix = config.vocab_size * config.hidden_size
    return matrix if config.tie_word_embeddings else 2 * matrix


def largest_unit_parameters(config: ModelConfig) -> int:
    """Weights of the layer, or of the embedding, that has most: what is gathered at a time."""
    units: dict[str, int] = {}
    for name, shape in expected_tensors(config):
        layer = name.split(".")[2] if name.startswith("model.layers.") else name
        units[layer] = units.get(layer, 0) + math.prod(shape)
    return max(units.values())


TRAINING_BYTES = 16
"""Of a parameter in float32: itself, its gradient, and two moments of Adam."""


def sharded_bytes(config: ModelConfig, ranks: int) -> dict[str, int]:
    """What each of ``ranks`` devices holds of a model whose layers FSDP2 shards.

    Returns:
        ``run``: its share of the weights in bf16. ``train``: its share of weights, gradients and
        moments in float32. ``gathered``: the largest layer whole, in bf16, beside either; twice
        that while the next one is fetched. Activations and states come on top.
    """
    count = num_parameters(config)
    return {
        "run": math.ceil(2 * count / ranks),
        "train": math.ceil(TRAINING_BYTES * count / ranks),
        "gathered": 2 * largest_unit_parameters(config) if ranks > 1 else 0,
    }
