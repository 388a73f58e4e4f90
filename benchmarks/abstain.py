"""When is an answer not in the document? What tells, and how well; the threshold `ask` uses.

python benchmarks/abstain.py MODEL [--cases 40] [--tokens 400,1000] [--out FILE]

Half of the cases of benchmarks/records.py have the fact that is asked for, half have not. Signals:
evidence (nats a token by which the document makes the answer's beginning likelier), confidence
(mean log-probability of its tokens), focus (share of the document's attention in its best passage).
For each: the area under the ROC curve, and the threshold with the best balanced accuracy, chosen on
even cases and measured on odd ones.
"""

import argparse
import io
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from records import STYLES, make_case

from respike.bench.machine import provenance
from respike.device import set_threads
from respike.documents import Source, read
from respike.documents.asking import JUDGED_TOKENS, LEAST, evidence
from respike.documents.passages import Attention, observing
from respike.documents.prompt import after_document
from respike.evaluation.stats import wilson
from respike.generation import stream
from respike.loading import Model, load

SIGNALS = ("evidence", "confidence", "focus")


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
    peaks = look.peaks(1)
    return {
        "present": present,
        "tokens": reading.num_tokens,
        "correct": present and case.correct(said, abstained=False),
        "evidence": evidence(model, prompt, result.tokens, result.logprobs),
        "confidence": sum(result.logprobs) / max(1, len(result.logprobs)),
        "focus": peaks[0][2] if peaks else 0.0,
    }


def area(rows: list[dict[str, Any]], signal: str) -> float:
    """Chance that a present fact's signal is above an absent one's; ties count half."""
    inside = [row[signal] for row in rows if row["present"]]
    outside = [row[signal] for row in rows if not row["present"]]
    wins = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    return wins / (len(inside) * len(outside))


def rates(rows: list[dict[str, Any]], signal: str, threshold: float) -> tuple[float, float]:
    """(share of present facts kept, share of absent ones refused)."""
    inside = [row[signal] >= threshold for row in rows if row["present"]]
    outside = [row[signal] < threshold for row in rows if not row["present"]]
    return sum(inside) / len(inside), sum(outside) / len(outside)


def judge(rows: list[dict[str, Any]], signal: str) -> dict[str, Any]:
    fitted, tested = rows[0::4] + rows[1::4], rows[2::4] + rows[3::4]
    values = sorted({row[signal] for row in fitted})
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    best = max(middles, key=lambda t: (sum(rates(fitted, signal, t)), -t))
    kept, refused = rates(tested, signal, best)
    return {
        "area": area(rows, signal), "threshold": best,
        "kept_present_frac": kept, "refused_absent_frac": refused, "tested": len(tested),
    }  # fmt: skip


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the thresholds of `respike ask` make of all cases; they were chosen on such cases."""
    least = vars(LEAST)
    passed = [all(row[name] >= value for name, value in least.items()) for row in rows]
    found: dict[str, Any] = {"least": least}
    for name, present in (("kept_present", True), ("refused_absent", False)):
        good = [
            p == present for p, row in zip(passed, rows, strict=True) if row["present"] == present
        ]
        found |= {f"{name}_frac": sum(good) / len(good), f"{name}_95": wilson(sum(good), len(good))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--tokens", default="400,1000")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    set_threads(options.threads)
    model = load(options.model, weights=options.weights)
    rows = []
    for number in range(options.cases):
        lengths = [int(n) for n in options.tokens.split(",")]
        for present in (True, False):
            rows.append(measure(model, lengths[number // 2 % len(lengths)], number, present))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    present = [row for row in rows if row["present"]]
    result = {
        "model": Path(options.model).name, "fingerprint": model.fingerprint[:12],
        "weights": options.weights, **provenance(), "cases": len(rows), "tokens": options.tokens,
        "correct_frac": sum(row["correct"] for row in present) / len(present),
        "signals": {signal: judge(rows, signal) for signal in SIGNALS},
        "together": together(rows), "rows": rows,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(
        json.dumps([result["signals"], result["together"]], indent=1),
        f"\ncorrect {result['correct_frac']:.2f}",
    )
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
