"""The program of every measured process; standard library only, as a peer's Python may lack ours.

    python -P child.py MODULE.py

MODULE defines ``prepare(job)``, which returns facts and a function that does the work. A line of
JSON each way, in turn: job in, facts out, "go" in, result out. Then it waits for the end of its
input, so that the parent can look up the peak of its memory.
"""

import json
import os
import runpy
import sys
import time
import traceback
from typing import Any, TextIO


def main() -> None:
    """See the module."""
    began = time.time()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between results
    job = json.loads(sys.stdin.readline()) | {"began": began}
    try:
        facts, run = runpy.run_path(sys.argv[1])["prepare"](job)
        say(out, {"answer": facts})
        if sys.stdin.readline():
            say(out, {"answer": run()})
    except Exception as error:
        text = str(error) if hasattr(error, "hint") else f"{type(error).__name__}: {error}"
        if not hasattr(error, "hint"):
            traceback.print_exc()
        say(out, {"error": text, "hint": getattr(error, "hint", None)})
    sys.stdin.readline()


def say(out: TextIO, value: Any) -> None:
    """One line of JSON."""
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
