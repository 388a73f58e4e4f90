"""What it means to refuse a folder: one line that names it, before time or memory is spent."""

import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from respike.checkpoint import open_checkpoint
from respike.errors import CheckpointError, RespikeError


@contextmanager
def cheap() -> Iterator[None]:
    """What happens inside takes little time and memory."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 << 20
    assert time.perf_counter() - began < 5.0


def refused(
    folder: Path, *words: str | Path, error: type[RespikeError] = CheckpointError
) -> RespikeError:
    with cheap(), pytest.raises(error) as caught:
        open_checkpoint(folder)
    return one_line(caught.value, *words)


def one_line(error: RespikeError, *words: str | Path) -> RespikeError:
    message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    for word in words:
        assert str(word) in message
    return error


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in raw.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return path
