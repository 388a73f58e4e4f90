"""Are answers about documents right? By kind and length, beside what else one could do.

python benchmarks/documents.py ORIGINAL NAME=FOLDER... --out FILE [--documents 4096:12,16384:4]
    [--minutes 25]

Contenders, all asked the same about the documents of benchmarks/records.py, which hold a case of
every kind each:

    original             the source, the whole document before it, up to its trained length
    original, last N     the source, the last N tokens of the document (--truncate)
    BM25 + original      the source, the three paragraphs that share most with the question
    NAME                 each converted folder, the whole document before it

A document is read once, and all is asked of that state. Exact match, with 95 % Wilson intervals. An
absent fact counts when the answer is "not found in the document" by the thresholds of `ask`;
a present one that is so refused counts as wrong, and how many would have been right is told beside.
The file is written after every document, a run that was interrupted goes on, and after `--minutes`
no other document is begun.
"""

import argparse
import io
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from records import KINDS, STYLES, Case, make_document
from resultfile import counts, named_folder, rows_before, unique, write

from respike.bench.machine import provenance
from respike.device import dtype_name, set_threads
from respike.documents import Reading, Source, read
from respike.documents.asking import ask
from respike.documents.judging import LEAST
from respike.evaluation.stats import wilson
from respike.loading import Model, load

BEST_PARAGRAPHS = 3
K1, B = 1.5, 0.75
ANSWER_TOKENS = 32

Rows = list[dict[str, Any]]


def last(model: Model, case: Case, count: int) -> str:
    ids = model.tokenizer.encode(case.text, bos=False)
    return model.tokenizer.decode(ids[-count:])


def bm25(_: Model, case: Case) -> str:
    """The paragraphs that score highest, in the order of the document."""
    paragraphs = case.text.split("\n\n")
    words = [Counter(re.findall(r"\w+", p.lower())) for p in paragraphs]
    lengths = [w.total() for w in words]
    mean = sum(lengths) / len(words)
    scores = [0.0] * len(paragraphs)
    for term in set(re.findall(r"\w+", case.question.lower())):
        having = sum(term in w for w in words)
        rarity = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
        for i, (w, length) in enumerate(zip(words, lengths, strict=True)):
            count = w[term]
            scores[i] += rarity * count * (K1 + 1) / (count + K1 * (1 - B + B * length / mean))
    best = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:BEST_PARAGRAPHS])
    return "\n\n".join(paragraphs[i] for i in best)


@dataclass(frozen=True)
class Contender:
    """Somebody who is asked.

    Attributes:
        name: In the table.
        model: Who answers.
        shorten: What is read of a document; None: all of it.
        each: Whether that differs from question to question.
        most_tokens: Of a document, for this contender; None: any.
    """

    name: str
    model: Model
    shorten: Callable[[Model, Case], str] | None = None
    each: bool = False
    most_tokens: int | None = None


def contenders(options: argparse.Namespace) -> list[Contender]:
    original = load(options.original, weights=options.weights)
    cut = partial(last, count=options.truncate)
    trained = original.config.max_position_embeddings
    made = [
        Contender("original", original, most_tokens=trained),
        Contender(f"original, last {options.truncate:,}", original, cut),
        Contender("BM25 + original", original, bm25, each=True),
    ]
    return made + [
        Contender(name, load(str(path), weights=options.weights))
        for name, path in options.converted
    ]


def asked_all(who: Contender, cases: list[Case]) -> Rows:
    """A row for each case of one document."""
    found: Rows = []
    reading: Reading | None = None
    seconds = 0.0
    for case in cases:
        if reading is None or who.each:
            began = time.perf_counter()
            text = case.text if who.shorten is None else who.shorten(who.model, case)
            reading = read(who.model, [Source("x", stream=io.BytesIO(text.encode()))])
            seconds = time.perf_counter() - began
        found.append(answered(who.model, reading, case) | {"read_seconds": seconds})
    return found


def answered(model: Model, reading: Reading, case: Case) -> dict[str, Any]:
    began = time.perf_counter()
    asking = ask(model, reading, case.question, max_tokens=ANSWER_TOKENS)
    "".join(asking)
    answer = asking.answer
    said = answer.text
    if not answer.found:  # what it would have said, to the end
        free = ask(model, reading, case.question, max_tokens=ANSWER_TOKENS, least=None)
        said = "".join(free)
    return {
        "kind": case.kind, "style": case.style, "depth_frac": case.depth_frac,
        "correct": case.correct(said, abstained=not answer.found),
        "right_if_not_refused": bool(case.answers) and case.correct(said, abstained=False),
        "refused": not answer.found,
        "passage_found": any(f[:30] in p.text for f in case.evidence() for p in answer.passages),
        "tokens": reading.num_tokens, "ask_seconds": time.perf_counter() - began, "said": said,
    }  # fmt: skip


def summary(rows: Rows) -> Rows:
    found: Rows = []
    groups: dict[tuple[str, str, int], Rows] = {}
    for row in rows:
        groups.setdefault((row["contender"], row["kind"], row["length"]), []).append(row)
    for (contender, kind, length), some in groups.items():
        right = sum(r["correct"] for r in some)
        unrefused = sum(r["right_if_not_refused"] for r in some)
        found.append({
            "contender": contender, "kind": kind, "length": length, "n": len(some),
            "exact_frac": right / len(some), "exact_95": wilson(right, len(some)),
            "unrefused_exact_frac": unrefused / len(some),
            "refused_frac": sum(r["refused"] for r in some) / len(some),
        })  # fmt: skip
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original")
    parser.add_argument("converted", nargs="+", type=named_folder)
    parser.add_argument("--documents", type=counts, default=counts("4096:12"),
                        help="LENGTH:COUNT, in tokens")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--truncate", type=int, default=2048)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    unique([name for name, _ in options.converted])
    return options


def main() -> None:
    options = parsed()
    set_threads(options.threads)
    everyone = contenders(options)
    until = time.monotonic() + 60 * options.minutes
    original = everyone[0].model
    asked = {
        "weights": options.weights, "answer_tokens": ANSWER_TOKENS, "least": vars(LEAST),
        "truncate": options.truncate, "dtype": dtype_name(original.decoder.embedding.dtype),
    }  # fmt: skip
    head = {"model": Path(options.original).name, **provenance(), "asked": asked,
            "trained_tokens": original.config.max_position_embeddings}  # fmt: skip
    rows = rows_before(options.out, asked)
    done = {(r["contender"], r["fingerprint"], r["length"], r["number"]) for r in rows}

    def count(text: str) -> int:
        return len(original.tokenizer.encode(text, bos=False))

    left = 0
    for length, documents in options.documents.items():
        for number in range(documents):
            cases = make_document(STYLES[number % 2], length, number, count)
            for who in everyone:
                if who.most_tokens is not None and length > who.most_tokens:
                    continue
                key = {"contender": who.name, "fingerprint": who.model.fingerprint[:12],
                       "length": length, "number": number}  # fmt: skip
                if tuple(key.values()) in done:
                    continue
                if time.monotonic() > until:
                    left += 1
                    continue
                rows += [key | row for row in asked_all(who, cases)]
                write(options.out, head | {"summary": summary(rows), "rows": rows})
                print(f"{who.name}, document {number} of {length}: "
                      f"{sum(r['correct'] for r in rows[-len(KINDS):])} of {len(KINDS)}",
                      file=sys.stderr, flush=True)  # fmt: skip
    write(options.out, head | {"summary": summary(rows), "rows": rows})
    for line in summary(rows):
        low, high = line["exact_95"]
        print(f"{line['contender']:24} {line['kind']:14} {line['length']:7} "
              f"{line['exact_frac']:4.0%} ({low:.0%} to {high:.0%}), n {line['n']}")  # fmt: skip
    if left:
        print(f"{left} readings were not begun in {options.minutes:g} minutes; the same command "
              "goes on with them", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    main()
