"""What reading will need here: time, memory and disk, before it starts."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from respike.account import loaded_bytes, state_bytes
from respike.bench.predict import predict
from respike.config import ModelConfig
from respike.documents.sources import Piece, Source
from respike.errors import UsageError
from respike.tokenizer import Tokenizer

BASE_BYTES = 450 << 20
"""Interpreter, torch and buffers, and a layer that is being packed, beside weights and state."""
SLACK_FRAC = 0.25
"""Growing caches are allocated ahead by this share, see `respike.layers.storage.capacity`."""
INDEX_BYTES = 5
"""Of a token in a state file, beside the state: its id, and its share of the index."""
SAMPLE_PIECES = 4
"""Pieces of a source that are tokenized to learn how many bytes a token has."""


@dataclass(frozen=True)
class Estimate:
    """Estimates, all of them; None where the length is not known.

    Attributes:
        tokens: Of all sources.
        seconds: To read them, after the model is loaded.
        state_bytes: Of the state after the last token.
        memory_bytes: Of the process at its largest.
        disk_bytes: Of the state file; while reading, twice this.
    """

    tokens: int | None
    seconds: float | None
    state_bytes: int | None
    memory_bytes: int | None
    disk_bytes: int | None

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def count_tokens(sources: Sequence[Source], tokenizer: Tokenizer) -> int | None:
    """About how many tokens sources have: from their sizes and a sample; None for stdin."""
    if any(source.stream is not None for source in sources):
        return None
    return sum(_count(source, tokenizer) for source in sources)


def _count(source: Source, tokenizer: Tokenizer) -> int:
    sampled, sample_bytes, total = 0, 0, 0
    # Of plain text the size is known; of all else only what its reader gets out of it.
    known = source.path.stat().st_size if source.path and source.is_plain_file else None
    for number, piece in enumerate(source.pieces()):
        size = _size(piece)
        total += size
        if number < SAMPLE_PIECES:
            sampled += len(tokenizer.encode(piece.text, bos=False))
            sample_bytes += size
        elif known is not None:
            total = known
            break
    return round(sampled * total / sample_bytes) if sample_bytes else 0


def _size(piece: Piece) -> int:
    return len(piece.text.encode())


def estimate(
    config: ModelConfig,
    tokens: int | None,
    already: int,
    threads: int,
    options: Mapping[str, Any],
    cache_folder: Path,
) -> Estimate:
    """What it takes to read ``tokens`` after ``already`` others.

    Args:
        config: Of the model.
        tokens: None: nobody knows.
        already: In the state that is gone on from.
        threads: As it will run.
        options: dtype and weights, as `respike.load` takes them.
        cache_folder: Where measurements of this machine are kept.
    """
    if tokens is None:
        return Estimate(None, None, None, None, None)
    lengths = sorted({max(1, already), already + tokens})
    found = predict(config, lengths, threads, options, cache_folder)["seconds"]
    seconds = found[str(lengths[-1])] - (found[str(lengths[0])] if already else 0.0)
    values = 4 if options.get("dtype") == "f32" else 2
    state = state_bytes(config, already + tokens, values)
    weights = options.get("weights") or "stored"
    memory = BASE_BYTES + loaded_bytes(config, weights, values) + state * (1 + SLACK_FRAC)
    disk = state + INDEX_BYTES * (already + tokens)
    return Estimate(tokens, seconds, state, round(memory), disk)


def check_disk(path: Path, found: Estimate) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        UsageError: It has not.
    """
    if found.disk_bytes is None:
        return
    free = shutil.disk_usage(path.parent).free
    if 2 * found.disk_bytes > free:
        raise UsageError(
            f"{path}: needs about {2 * found.disk_bytes >> 20} MiB of disk while it is written, "
            f"{free >> 20} MiB are free",
            hint="write it to another disk, or convert with a recipe that keeps less",
        )


def available_memory() -> int | None:
    """Bytes that can still be had without swapping, where the system tells."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="ascii").splitlines() if info.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) << 10 if found else None
