"""Many streams at once, some of whose clients go away or send nonsense: nothing is lost.

The server is a process of its own. Five minutes are marked slow.
"""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving import pico_model

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import load

STREAMS = 32
PREFIX_MIB = 16
"""Full within seconds, so that what grows afterwards is something else."""


def run_load(folder: Path, seconds: float) -> dict[str, Any]:
    pico_model(folder)
    command = [
        sys.executable, "-m", "respike", "serve", str(folder), "--port", "0", "--threads", "1",
        "--max-streams", str(STREAMS), "--prefix-mib", str(PREFIX_MIB),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            address = server.stderr.readline().rsplit(" at ", 1)[1].strip()
            load.wait_for(address)
            found = asyncio.run(load.load(address, server.pid, STREAMS, seconds, True))
        finally:
            server.terminate()
        shown = server.stderr.read()
    assert "error" not in shown, shown
    return found


def check(found: dict[str, Any]) -> None:
    assert found["answers"] >= STREAMS // 2
    assert found["lost"] == 0
    assert found["server_errors"] == 0
    assert found["known_prompts_bytes"]["end"] <= PREFIX_MIB << 20


def test_a_few_seconds_of_load(tmp_path: Path) -> None:
    check(run_load(tmp_path, 3.0))


@pytest.mark.slow
def test_five_minutes_of_load_and_memory_is_flat(tmp_path: Path) -> None:
    found = run_load(tmp_path, 300.0)
    check(found)
    assert found["clients_that_left"] > 50
    assert found["bad_requests"] > 50
    memory = found["resident_bytes"]
    assert memory["end"] < 1.1 * memory["middle"]
