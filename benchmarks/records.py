"""Documents like contracts and patient records, made up from lists of words: nobody's data.

A case is a document of a wished length with facts at wished depths, a question, and what counts as
the answer. Kinds:

    single         one fact
    multi          three facts of a kind, asked for together
    hops2, hops3   a fact that another sentence names, and that one by a third
    amendment      a figure and two later amendments of it: the latest holds
    contradiction  a figure given twice, differently: both are to be named
    absent         something that is not in there: nothing is to be answered
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

KINDS = ("single", "multi", "hops2", "hops3", "amendment", "contradiction", "absent")
STYLES = ("contract", "record")

# fmt: off
FIRST = ("Arlen", "Bettine", "Corvin", "Dagny", "Edvard", "Fenna", "Gustav", "Hedda", "Iver",
         "Jorun", "Kasimir", "Liv", "Matteus", "Nanna", "Oleg", "Petra", "Ragnar", "Signe")
LAST = ("Aldersey", "Brankov", "Castellan", "Drummond", "Eskildsen", "Farrow", "Grimsby",
        "Holmgren", "Ivarsson", "Jessop", "Kallio", "Lindqvist", "Marlowe", "Nordahl",
        "Okafor", "Pellinor")
TOWNS = ("Aldmoor", "Brackwater", "Cinderford", "Dunmere", "Eastholm", "Fallowby", "Greywick",
         "Hartsea", "Ironbridge", "Kestrelton", "Lowmarsh", "Millhaven")
# fmt: on
THINGS = {
    "contract": (
        "mooring fee",
        "storage fee",
        "towing fee",
        "inspection fee",
        "licence fee",
        "cleaning fee",
        "escrow deposit",
        "late charge",
        "survey fee",
        "repair limit",
    ),
    "record": (
        "potassium level",
        "sodium level",
        "heart rate",
        "ferritin level",
        "glucose level",
        "platelet count",
        "calcium level",
        "creatinine level",
        "urea level",
        "lipase level",
    ),
}  # fmt: skip
UNITS = {"contract": "crowns", "record": "units"}
FILLER = {
    "contract": (
        "The parties shall keep records of {a} and make them available on request.",
        "Notices about {a} are given in writing and take effect on the day they arrive.",
        "Nothing in this clause on {a} limits the rights that the law gives to either party.",
        "Where {a} is delayed by weather, the time allowed is extended by as many days.",
        "The Supplier carries out {a} with the care that is usual in the trade.",
        "Disputes about {a} are first brought before the two managers, who meet within a week.",
    ),
    "record": (
        "The patient was seen for {a}; no complaint was reported and the plan is unchanged.",
        "Examination with regard to {a} was unremarkable; follow-up as agreed.",
        "Advice on {a} was given and a leaflet handed out.",
        "The nurse noted {a} in the chart; the family was informed by telephone.",
        "Medication was reviewed because of {a}; the doses were left as they are.",
        "The ward round discussed {a} briefly and asked for no further tests.",
    ),
}
MATTERS = {
    "contract": ("maintenance", "insurance", "delivery", "storage of tools", "access to the quay",
                 "training of staff", "disposal of waste", "fire safety", "lighting", "signage"),
    "record": ("sleep", "diet", "mobility", "wound care", "physiotherapy", "vaccination",
               "hearing", "vision", "posture", "travel plans"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A document and a question about it.

    Attributes:
        kind: One of `KINDS`.
        style: One of `STYLES`.
        depth_frac: Where the first fact stands, 0 the beginning, 1 the end.
        text: The document.
        question: About it.
        answers: Every one of them must be in the answer; empty: it must not answer.
        wrong: None of these may be, such as figures that an amendment has replaced.
        facts: The sentences that hold the answer.
    """

    kind: str
    style: str
    depth_frac: float
    text: str
    question: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    facts: tuple[str, ...]

    def correct(self, answer: str, *, abstained: bool) -> bool:
        """Exact match: the wanted words are there, unwanted ones are not."""
        if not self.answers:
            return abstained
        said = answer.replace(",", "")
        right = all(word in said for word in self.answers)
        return right and not abstained and not any(word in said for word in self.wrong)


def make_case(
    kind: str, style: str, tokens: int, depth_frac: float, seed: int, count: Callable[[str], int]
) -> Case:
    """The case of these settings; equal settings give equal cases.

    Args:
        kind: One of `KINDS`.
        style: One of `STYLES`.
        tokens: Length of the document, about.
        depth_frac: Where the first fact stands; others follow, spread over the rest.
        seed: Of the draw.
        count: How many tokens a text has.
    """
    rng = random.Random(f"{kind}/{style}/{tokens}/{depth_frac}/{seed}")
    facts, question, answers, wrong = _facts(kind, style, rng)
    filler, have = [], sum(map(count, facts))
    while have < tokens or len(filler) < len(facts) + 2:
        lines = rng.sample(FILLER[style], 3)
        matters = rng.sample(MATTERS[style], 3)
        paragraph = " ".join(line.format(a=a) for line, a in zip(lines, matters, strict=True))
        filler.append(paragraph)
        have += count(paragraph) + 6
    at = [depth_frac + (1 - depth_frac) * i / len(facts) for i in range(len(facts))]
    places = [round(depth * (len(filler) - 1)) for depth in at]
    paragraphs = list(filler)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        paragraphs.insert(place, fact)
    head = "SERVICE AGREEMENT" if style == "contract" else "PATIENT RECORD"
    unit = "Clause" if style == "contract" else "Entry"
    body = [f"{unit} {i}. {text}" for i, text in enumerate(paragraphs, start=1)]
    text = "\n\n".join([head, *body]) + "\n"
    return Case(kind, style, depth_frac, text, question, answers, wrong, tuple(facts))


def _facts(
    kind: str, style: str, rng: random.Random
) -> tuple[list[str], str, tuple[str, ...], tuple[str, ...]]:
    """Sentences in their order, the question, what must and what must not be answered."""
    thing, other = rng.sample(THINGS[style], 2)
    unit = UNITS[style]
    numbers = [str(n) for n in rng.sample(range(1001, 9999), 3)]
    names = [f"{first} {last}" for first, last in
             zip(rng.sample(FIRST, 4), rng.sample(LAST, 4), strict=True)]  # fmt: skip
    town = rng.choice(TOWNS)
    value = f"What is the {thing}?"
    if kind == "single":
        return [f"The {thing} is {numbers[0]} {unit}."], value, (numbers[0],), ()
    if kind == "absent":
        return [f"The {other} is {numbers[0]} {unit}."], value, (), ()
    if kind == "amendment":
        facts = [
            f"The {thing} is {numbers[0]} {unit}.",
            f"Amendment 1 of 2022: the {thing} is changed to {numbers[1]} {unit}.",
            f"Amendment 2 of 2024: the {thing} is changed to {numbers[2]} {unit}.",
        ]
        return facts, f"What is the {thing} now, after all amendments?", (numbers[2],), (
            numbers[0], numbers[1],
        )  # fmt: skip
    if kind == "contradiction":
        facts = [f"The {thing} is {n} {unit}." for n in numbers[:2]]
        return facts, f"Which two different values are given for the {thing}?", (
            numbers[0], numbers[1],
        ), ()  # fmt: skip
    if kind == "multi":
        role = "witness" if style == "contract" else "carer"
        facts = [f"A {role} named in this document is {name}." for name in names[:3]]
        return facts, f"Name every {role}.", tuple(names[:3]), ()
    role = "harbour master" if style == "contract" else "responsible physician"
    facts = [f"The {role} is {names[0]}.", f"{names[0]} is represented by {names[1]}."]
    if kind == "hops2":
        return facts, f"Who represents the {role}?", (names[1],), ()
    facts.append(f"{names[1]} lives in {town}.")
    return facts, f"In which town does the person who represents the {role} live?", (town,), ()
