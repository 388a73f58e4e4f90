"""Are answers about documents right? By kind, length and depth, beside what else one could do.

python benchmarks/documents.py ORIGINAL CONVERTED... [--lengths 1000,4000] [--kinds single,multi]
    [--cases 10] [--out FILE]

Contenders, all asked the same about the cases of benchmarks/records.py:

    original             the source, the whole document before it
    original, last N     the source, the last N tokens of the document (--truncate)
    BM25 + original      the source, the three paragraphs that share most with the question
    CONVERTED            each folder, the whole document before it

Exact match, with 95 % Wilson intervals. An absent fact counts when the answer is "not found in the
document" by the thresholds of `respike ask`; a present one that is so refused counts as wrong.
"""

import argparse
import io
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import KINDS, STYLES, Case, make_case

from respike.bench.machine import provenance
from respike.device import set_threads
from respike.documents import Source, read
from respike.documents.asking import ask
from respike.evaluation.stats import wilson
from respike.loading import Model, load

BEST_PARAGRAPHS = 3
K1, B = 1.5, 0.75
ANSWER_TOKENS = 24

Shorten = Callable[[Model, Case], str]


def whole(_: Model, case: Case) -> str:
    return case.text


def last(count: int) -> Shorten:
    def cut(model: Model, case: Case) -> str:
        ids = model.tokenizer.encode(case.text, bos=False)
        return model.tokenizer.decode(ids[-count:])

    return cut


def bm25(_: Model, case: Case) -> str:
    """The paragraphs that score highest, in the order of the document."""
    paragraphs = case.text.split("\n\n")
    words = [re.findall(r"\w+", p.lower()) for p in paragraphs]
    mean = sum(map(len, words)) / len(words)
    scores = [0.0] * len(paragraphs)
    for term in set(re.findall(r"\w+", case.question.lower())):
        having = sum(term in w for w in words)
        rarity = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
        for i, w in enumerate(words):
            count = Counter(w)[term]
            scores[i] += rarity * count * (K1 + 1) / (count + K1 * (1 - B + B * len(w) / mean))
    best = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:BEST_PARAGRAPHS])
    return "\n\n".join(paragraphs[i] for i in best)


def answered(model: Model, case: Case, shorten: Shorten) -> dict[str, Any]:
    text = shorten(model, case)
    began = time.perf_counter()
    reading = read(model, [Source("x", stream=io.BytesIO(text.encode()))])
    read_seconds = time.perf_counter() - began
    asking = ask(model, reading, case.question, max_tokens=ANSWER_TOKENS)
    "".join(asking)
    answer = asking.answer
    said = answer.text if answer.found else answer.withheld
    return {
        "correct": case.correct(said, abstained=not answer.found),
        "right_if_not_refused": bool(case.answers) and case.correct(said, abstained=False),
        "refused": not answer.found,
        "evidence_found": any(f[:30] in p.text for f in case.facts for p in answer.passages),
        "tokens": reading.num_tokens,
        "read_seconds": read_seconds,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["contender"], row["kind"], row["length"]), []).append(row)
    for (contender, kind, length), some in groups.items():
        right = sum(r["correct"] for r in some)
        found.append({
            "contender": contender, "kind": kind, "length": length, "n": len(some),
            "exact_frac": right / len(some), "exact_95": wilson(right, len(some)),
            "unrefused_exact_frac": sum(r["right_if_not_refused"] for r in some) / len(some),
            "refused_frac": sum(r["refused"] for r in some) / len(some),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original")
    parser.add_argument("converted", nargs="+")
    parser.add_argument("--lengths", default="1000,4000")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--truncate", type=int, default=512)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    set_threads(options.threads)
    contenders: list[tuple[str, str, Shorten]] = [
        ("original", options.original, whole),
        (f"original, last {options.truncate}", options.original, last(options.truncate)),
        ("BM25 + original", options.original, bm25),
        *((Path(path).name, path, whole) for path in options.converted),
    ]
    models: dict[str, Model] = {}
    rows: list[dict[str, Any]] = []
    for name, path, shorten in contenders:
        model = models.setdefault(path, load(path, weights=options.weights))

        def count(text: str, model: Model = model) -> int:
            return len(model.tokenizer.encode(text, bos=False))

        for length in map(int, options.lengths.split(",")):
            for kind in options.kinds.split(","):
                for number in range(options.cases):
                    depth = (number + 0.5) / options.cases
                    style = STYLES[number % 2]
                    case = make_case(kind, style, length, depth, number, count)
                    row = {"contender": name, "kind": kind, "style": style, "length": length,
                           "depth_frac": depth}  # fmt: skip
                    rows.append(row | answered(model, case, shorten))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {
        "original": Path(options.original).name, "weights": options.weights, **provenance(),
        "fingerprints": {p: m.fingerprint[:12] for p, m in models.items()},
        "summary": summary(rows), "rows": rows,
    }  # fmt: skip
    for line in result["summary"]:
        low, high = line["exact_95"]
        print(f"{line['contender']:24} {line['kind']:14} {line['length']:7} "
              f"{line['exact_frac']:4.0%} ({low:.0%} to {high:.0%}), n {line['n']}")  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
