"""A long text read once, then asked about: time against the estimate, memory, state, answers.

python benchmarks/reading.py MODEL --out FILE [--tokens 1000000] [--weights int8] [--work FOLDER]

Ten facts stand at even depths in filler of benchmarks/records.py. `respike read` is a process of
its own, whose memory is sampled; then each fact is asked for. The file is written after the reading
and after each answer. With `--work` the text and the state stay there: an interrupted reading is
taken up (its time is then that of the rest, and said to be), a finished one is asked the rest.
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
from resultfile import write

from respike.bench.machine import provenance
from respike.device import dtype_name, set_threads
from respike.documents import Reading, load_model_of, load_reading
from respike.documents.asking import ask
from respike.loading import Model

FACTS = 10
ANSWER_TOKENS = 24
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
            memory += filter(None, [resident_bytes(process.pid)])  # it may just have ended
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


def answered(model: Model, reading: Reading, fact: dict[str, Any]) -> dict[str, Any]:
    began, first = time.perf_counter(), 0.0
    asking = ask(model, reading, fact["question"], max_tokens=ANSWER_TOKENS, least=None)
    for _ in asking:
        first = first or time.perf_counter() - began
    said = asking.answer.text
    return {
        "depth_frac": fact["depth_frac"], "exact": fact["answer"] in said.replace(",", ""),
        "first_token_seconds": first, "said": said,
        "passage_found": any(fact["answer"] in p.text for p in asking.answer.passages),
    }  # fmt: skip


def measure(options: argparse.Namespace, folder: Path) -> None:
    text, state = folder / "long.txt", folder / "long.state"
    # SmolLM2 has about 6.1 characters of this text in a token; the estimate says it exactly.
    facts = write_text(text, options.tokens, lambda line: len(line) / 6.1)
    asked = {"model": Path(options.model).name, "tokens": options.tokens,
             "weights": options.weights, "threads": options.threads}  # fmt: skip
    before = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    same = before.get("asked", {}) | {"dtype": None} == asked | {"dtype": None} and state.exists()
    result = before if same else {"model": asked["model"], **provenance(), "asked": asked}
    if not same:
        result["taken_up"] = state.with_name(f"{state.name}.partial").exists()
        state.unlink(missing_ok=True)
        result |= {"read": read(options.model, text, state, options), "answers": []}
        write(options.out, result)
    began = time.perf_counter()
    model = load_model_of(state, options.model)
    reading = load_reading(state, model)
    result["load_seconds"] = time.perf_counter() - began
    result["asked"]["dtype"] = dtype_name(model.decoder.embedding.dtype)
    for fact in facts[len(result["answers"]) :]:
        result["answers"].append(answered(model, reading, fact))
        write(options.out, result)
    print(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.threads = set_threads(options.threads)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        measure(options, options.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
