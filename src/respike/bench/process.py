"""One measurement in a process of its own: clean peak memory, a time limit, no shared fate."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from respike.errors import BackendError

HERE = Path(__file__).resolve().parent
STDERR_CHARACTERS = 300
"""Of what a failed process said last, shown in its error."""


class ChildError(BackendError):
    """A process ended without an answer, or said that it cannot do what was asked."""


class TooSlowError(ChildError):
    """A process was ended at its time limit."""


@dataclass(frozen=True)
class Outcome:
    """What a process measured.

    Attributes:
        facts: About what it runs.
        result: Of the run.
        base_rss_bytes: Memory it held before the run; None where the system does not say.
        peak_rss_bytes: The most it ever held.
        started: When it was started, seconds since the epoch.
    """

    facts: dict[str, Any]
    result: dict[str, Any]
    base_rss_bytes: int | None
    peak_rss_bytes: int | None
    started: float


def run_child(
    module: str,
    job: Mapping[str, Any],
    *,
    python: str = sys.executable,
    threads: int = 1,
    max_seconds: float | None = None,
) -> Outcome:
    """Run ``prepare`` of a module beside this one, and what it returns, in a new process.

    Args:
        module: File name without ``.py``.
        job: Its argument; anything JSON can hold.
        python: The interpreter; a peer may live in another environment.
        threads: What libraries that read OMP_NUM_THREADS may use.
        max_seconds: After this long, loading included, it is ended. None waits.

    Raises:
        TooSlowError: It was ended.
        ChildError: It failed, or died; says what it said last.
    """
    with _started(module, python, threads) as (process, log, started):
        slow = threading.Event()

        def stop() -> None:
            slow.set()
            process.kill()

        timer = threading.Timer(max_seconds, stop) if max_seconds is not None else None
        if timer:
            timer.start()
        try:
            facts = _ask(process, dict(job), log)
            base = memory_bytes(process.pid, "VmRSS")
            result = _ask(process, "go", log)
            peak = memory_bytes(process.pid, "VmHWM")
        except ChildError:
            if slow.is_set():
                raise TooSlowError(f"took more than {max_seconds:.0f} s") from None
            raise
        finally:
            if timer:
                timer.cancel()
    return Outcome(facts, result, base, peak, started)


@contextmanager
def _started(
    module: str, python: str, threads: int
) -> Iterator[tuple[subprocess.Popen[str], Any, float]]:
    """The process, what it writes to stderr, and when it started; gone when the block ends."""
    command = [python, "-P", str(HERE / "child.py"), str(HERE / f"{module}.py")]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        started = time.time()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )
        except OSError as error:
            raise ChildError(f"{python}: cannot be started: {error.strerror}") from error
        try:
            yield process, log, started
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with suppress(BrokenPipeError):  # it died with our words unread
                        pipe.close()
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ask(process: subprocess.Popen[str], value: Any, log: Any) -> Any:
    """Send a line and read the answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(value) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        process.wait()
        raise ChildError(_epitaph(process.returncode, log))
    answer = json.loads(line)
    if "error" in answer:
        raise ChildError(answer["error"], hint=answer.get("hint"))
    return answer["answer"]


def _epitaph(code: int, log: Any) -> str:
    log.seek(0)
    said = " ".join(log.read().split())[-STDERR_CHARACTERS:]
    why = " (-9 means that memory ran out, or that something ended it)" if code == -9 else ""
    return f"its process ended with code {code}{why}" + (f": {said}" if said else "")


def memory_bytes(pid: int, field: str) -> int | None:
    """VmRSS or VmHWM of a process; None where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = (line.split()[1] for line in lines.splitlines() if line.startswith(field))
    value = next(found, None)
    return None if value is None else int(value) * 1024
