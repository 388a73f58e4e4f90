"""A long text read once, then asked about: time against the estimate, memory, state, answers.

python benchmarks/reading.py MODEL [--tokens 1000000] [--out FILE] [--weights int8]

Ten facts stand at even depths in filler of benchmarks/records.py. `respike read` is a process of
its own, whose memory is sampled; then each fact is asked for.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import FILLER, MATTERS, THINGS

from respike.bench.machine import provenance
from respike.device import set_threads
from respike.documents import load_model_of, load_reading
from respike.documents.asking import ask

FACTS = 10
SETTLED_TOKENS = 32_768
"""Memory is compared with what it was after so many."""


def write_text(path: Path, tokens: int, count: Any) -> list[dict[str, Any]]:
    """Filler with facts at depths 0.05, 0.15 ...; returns question, answer and depth of each."""
    rng = random.Random(tokens)
    numbers = [str(n) for n in rng.sample(range(1001, 9999), FACTS)]
    facts = [
        {"question": f"What is the {thing}?", "answer": number, "depth_frac": (i + 0.5) / FACTS,
         "line": f"The {thing} is {number} crowns.\n\n"}
        for i, (thing, number) in enumerate(zip(THINGS["contract"], numbers, strict=True))
    ]  # fmt: skip
    waiting, have, clause = list(facts), 0, 1
    with path.open("w", encoding="utf-8") as file:
        while have < tokens:
            if waiting and have >= waiting[0]["depth_frac"] * tokens:
                file.write(str(waiting.pop(0)["line"]))
            lines = " ".join(rng.sample(FILLER["contract"], 3))
            text = f"Clause {clause}. {lines.format(a=rng.choice(MATTERS['contract']))}\n\n"
            file.write(text)
            have, clause = have + count(text), clause + 1
    return facts


def resident_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith("VmRSS")), 0)


def read(model: str, text: Path, state: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "respike", "read", model, str(text), "-o", str(state), "--json",
        "--weights", options.weights, "--threads", str(options.threads),
    ]  # fmt: skip
    memory: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            memory.append(resident_bytes(process.pid))
            time.sleep(0.2)
        assert process.stdout is not None
        facts: dict[str, Any] = json.loads(process.stdout.read())
    # The reading's share of the samples, at the end of the run.
    reading = memory[-max(1, round(facts["seconds"] / 0.2)) :]
    settled = reading[min(len(reading) - 1, len(reading) * SETTLED_TOKENS // facts["tokens"])]
    names = ("tokens", "seconds", "state_bytes", "file_bytes", "growth_bytes_per_token")
    return {name: facts[name] for name in names} | {
        "estimate": facts["estimate"],
        "peak_bytes": max(memory),
        "peak_over_settled_frac": max(reading) / settled,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.threads = set_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        text, state = Path(folder) / "long.txt", Path(folder) / "long.state"
        # SmolLM2 has about 6.1 characters of this text in a token; the estimate says it exactly.
        facts = write_text(text, options.tokens, lambda line: len(line) / 6.1)
        result: dict[str, Any] = {"model": Path(options.model).name} | provenance()
        result["read"] = read(options.model, text, state, options)
        began = time.perf_counter()
        model = load_model_of(state, options.model)
        reading = load_reading(state, model)
        result["load_seconds"] = time.perf_counter() - began
        result["answers"] = []
        for fact in facts:
            began, first = time.perf_counter(), 0.0
            asking = ask(model, reading, fact["question"], max_tokens=24, least=None)
            for _ in asking:
                first = first or time.perf_counter() - began
            said = asking.answer.text
            result["answers"].append({
                "depth_frac": fact["depth_frac"], "exact": fact["answer"] in said.replace(",", ""),
                "first_token_seconds": first, "said": said,
                "passage_found": any(fact["answer"] in p.text for p in asking.answer.passages),
            })  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
