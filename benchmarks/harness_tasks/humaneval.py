"""Runs what a model wrote against HumanEval's tests, in a process of its own with limits.

Limits: 10 s of time, 8 s of processor, 1 GiB of memory, files of at most 1 MB, no new processes, no
network (a network namespace with nothing in it; without one nothing is run), and nobody's rights
if it began with root's. It can still read what everybody may read: no place for secrets.
"""

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

TIME_SECONDS = 10
CHILD = Path(__file__).with_name("confined.py")
NO_CONFINEMENT = 3
"""Exit code of the child if it could not be shut in."""


def passed(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1.0 if the completed function passes the problem's tests."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass_at_1": float(runs(program))}


def runs(program: str, seconds: float = TIME_SECONDS) -> bool:
    """Whether a program comes to its end.

    Raises:
        RuntimeError: It cannot be shut in here, so it was not run.
    """
    token = secrets.token_hex(16)
    command = [sys.executable, "-I", "-S", str(CHILD), token]
    try:
        done = subprocess.run(
            command, input=program, capture_output=True, text=True, errors="replace",
            timeout=seconds, check=False, cwd="/", env={},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == NO_CONFINEMENT and done.stderr.startswith(token):
        raise RuntimeError(f"the program was not run: {done.stderr.removeprefix(token).strip()}")
    # A program that merely exits, even with 0, has not said this.
    return done.stdout.endswith(f"{token}\n")
