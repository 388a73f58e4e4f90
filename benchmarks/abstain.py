"""When is an answer not in the document? What tells, and how well; the thresholds `ask` uses.

python benchmarks/abstain.py MODEL --out FILE [--fit 24] [--test 24] [--tokens 400,1000]

Half of the cases of benchmarks/records.py have the fact that is asked for, half have a decoy of the
same kind only. Signals: evidence (nats a token by which the document makes the answer's beginning
likelier), confidence (mean log-probability of its tokens), focus (share of the document's attention
in its best passage). For each: the area under the ROC curve. The thresholds of evidence and
confidence with the best balanced accuracy are chosen on the `--fit` documents, and what they and
those in use make of others is measured on the `--test` documents, of other draws; the result holds
both. It is written after every case, and a run that was interrupted goes on.
"""

import argparse
import io
import json
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from records import STYLES, make_case
from resultfile import rows_before, write

from respike.bench.machine import provenance
from respike.device import dtype_name, set_threads
from respike.documents import Source, read
from respike.documents.judging import JUDGED_TOKENS, LEAST, judge, without_document
from respike.documents.passages import Attention, observing
from respike.documents.prompt import after_document
from respike.evaluation.stats import wilson
from respike.generation import stream
from respike.loading import Model, load

SIGNALS = ("evidence", "confidence", "focus")
JUDGED = ("evidence", "confidence")
"""Those with thresholds."""
SETS = {"fit": 0, "test": 1_000_000}
"""Where each set's draws begin."""

Rows = list[dict[str, Any]]


def measure(model: Model, tokens: int, number: int, present: bool) -> dict[str, Any]:
    def count(text: str) -> int:
        return len(model.tokenizer.encode(text, bos=False))

    style, depth = STYLES[number % 2], (number * 0.37) % 1
    case = make_case("single" if present else "absent", style, tokens, depth, number, count)
    reading = read(model, [Source("x", stream=io.BytesIO(case.text.encode()))])
    prompt = after_document(model.tokenizer, [{"role": "user", "content": case.question}])
    look = Attention(reading.begin_token, reading.num_tokens)
    text = stream(model, prompt, max_tokens=JUDGED_TOKENS, state=reading.state)
    with observing(model.decoder, look):
        said = "".join(text)
    result = text.result
    verdict = judge(LEAST, result.logprobs, without_document(model, prompt, result.tokens))
    peaks = look.peaks(1)
    return {
        "tokens": reading.num_tokens,
        "correct": present and case.correct(said, abstained=False),
        "evidence": verdict.evidence,
        "confidence": verdict.confidence,
        "focus": peaks[0][2] if peaks else 0.0,
    }


def area(rows: Rows, signal: str) -> float:
    """Chance that a present fact's signal is above an absent one's; ties count half."""
    inside = [row[signal] for row in rows if row["present"]]
    outside = [row[signal] for row in rows if not row["present"]]
    wins = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    return wins / (len(inside) * len(outside))


def rates(rows: Rows, least: dict[str, float]) -> dict[str, Any]:
    """Shares of present facts kept and of absent ones refused, with their intervals."""
    found: dict[str, Any] = {}
    for name, present in (("kept_present", True), ("refused_absent", False)):
        some = [row for row in rows if row["present"] == present]
        good = sum(all(row[n] >= v for n, v in least.items()) == present for row in some)
        found |= {f"{name}_frac": good / len(some), f"{name}_95": wilson(good, len(some))}
    return found


def best_thresholds(rows: Rows) -> dict[str, float]:
    """Of `JUDGED`, by balanced accuracy; of equals the lowest, which refuse least."""
    choices = []
    for signal in JUDGED:
        values = sorted({row[signal] for row in rows})
        choices.append([values[0], *((a + b) / 2 for a, b in pairwise(values))])

    def goodness(pair: tuple[float, ...]) -> tuple[float, ...]:
        found = rates(rows, dict(zip(JUDGED, pair, strict=True)))
        return (found["kept_present_frac"] + found["refused_absent_frac"], *(-t for t in pair))

    return dict(zip(JUDGED, max(product(*choices), key=goodness), strict=True))


def summary(rows: Rows) -> dict[str, Any]:
    """What the file says above its rows."""
    sets = {name: [row for row in rows if row["set"] == name] for name in SETS}
    chosen, test = best_thresholds(sets["fit"]), sets["test"]
    present = [row for row in test if row["present"]]
    return {
        "area": {signal: area(test, signal) for signal in SIGNALS},
        "answered_right_frac": sum(row["correct"] for row in present) / len(present),
        "chosen": {"least": chosen, "fit": rates(sets["fit"], chosen), "test": rates(test, chosen)},
        "in_use": {"least": vars(LEAST), "test": rates(test, vars(LEAST))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--fit", type=int, default=24, help="documents with the fact")
    parser.add_argument("--test", type=int, default=24, help="likewise")
    parser.add_argument("--tokens", default="400,1000")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    set_threads(options.threads)
    model = load(options.model, weights=options.weights)
    lengths = [int(n) for n in options.tokens.split(",")]
    asked = {
        "fingerprint": model.fingerprint[:12], "weights": options.weights, "tokens": lengths,
        "dtype": dtype_name(model.decoder.embedding.dtype),
    }  # fmt: skip
    head = {"model": Path(options.model).name, **provenance(), "asked": asked}
    before = {(r["set"], r["number"], r["present"]): r for r in rows_before(options.out, asked)}
    rows: Rows = []
    for name, first in SETS.items():
        for number in range(first, first + getattr(options, name)):
            for present in (True, False):
                row = before.get((name, number, present))
                if row is None:
                    row = {"set": name, "number": number, "present": present}
                    row |= measure(model, lengths[number // 2 % len(lengths)], number, present)
                    print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
                write(options.out, head | {"rows": rows})
    told = summary(rows)
    write(options.out, head | told | {"rows": rows})
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
