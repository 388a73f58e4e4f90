"""Documents like contracts and patient records, made up from lists of words: nobody's data.

A case is a document of a wished length with facts at wished depths, a question, and what counts as
the answer. Kinds:

    single         one fact
    multi          three facts of a kind, asked for together
    hops2, hops3   a fact that another sentence names, and that one by a third (the
                   first person of the three lives in another town, which is wrong)
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
ROLES = {
    "contract": ("harbour master", "dock surveyor"),
    "record": ("responsible physician", "head nurse"),
}
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
        facts: The sentences that the case put there, wrong ones among them.
    """

    kind: str
    style: str
    depth_frac: float
    text: str
    question: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    facts: tuple[str, ...]

    def evidence(self) -> list[str]:
        """The facts that lead to the answer."""
        return [fact for fact in self.facts if not any(word in fact for word in self.wrong)]

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
    facts, question, answers, wrong = _facts(kind, style, _drawn(style, rng))
    text = _document(style, [(facts, depth_frac)], tokens, rng, count)
    return Case(kind, style, depth_frac, text, question, answers, wrong, tuple(facts))


def make_document(style: str, tokens: int, seed: int, count: Callable[[str], int]) -> list[Case]:
    """One document with a case of every kind, none of which shares a name, figure or thing.

    Args:
        style: One of `STYLES`.
        tokens: Length of the document, about.
        seed: Of the draw; equal settings give equal documents.
        count: How many tokens a text has.

    Returns:
        A case of each of `KINDS`, at depths of their own, all with the same text.
    """
    rng = random.Random(f"all/{style}/{tokens}/{seed}")
    things = rng.sample(THINGS[style], 8)
    numbers = [str(n) for n in rng.sample(range(1001, 9999), 3 * len(KINDS))]
    names = _names(rng, 3 + 2 + 2)
    need = {"multi": names[:3], "hops2": names[3:5], "hops3": names[5:]}
    pairs = {"single": things[:2], "amendment": things[2:4], "contradiction": things[4:6],
             "absent": things[6:]}  # fmt: skip
    made = []
    for index, kind in enumerate(KINDS):
        drawn = _Drawn(
            pairs.get(kind, things[:2]), numbers[3 * index : 3 * index + 3],
            need.get(kind, names), rng.sample(TOWNS, 2), ROLES[style][kind == "hops3"],
        )  # fmt: skip
        depth = (index + rng.random()) / len(KINDS)
        made.append((kind, depth, _facts(kind, style, drawn)))
    placed = [(facts, depth) for _, depth, (facts, *_) in made]
    text = _document(style, placed, tokens, rng, count)
    return [
        Case(kind, style, depth, text, question, answers, wrong, tuple(facts))
        for kind, depth, (facts, question, answers, wrong) in made
    ]


def _document(
    style: str,
    placed: list[tuple[list[str], float]],
    tokens: int,
    rng: random.Random,
    count: Callable[[str], int],
) -> str:
    """Filler with facts in it: the first of each list at its depth, the others in the rest."""
    filler, have = [], sum(count(fact) for facts, _ in placed for fact in facts)
    least = sum(len(facts) for facts, _ in placed) + 2
    while have < tokens or len(filler) < least:
        lines = rng.sample(FILLER[style], 3)
        matters = rng.sample(MATTERS[style], 3)
        paragraph = " ".join(line.format(a=a) for line, a in zip(lines, matters, strict=True))
        filler.append(paragraph)
        have += count(paragraph) + 6
    places = [
        (round((depth + (1 - depth) * i / len(facts)) * (len(filler) - 1)), fact)
        for facts, depth in placed
        for i, fact in enumerate(facts)
    ]
    paragraphs = list(filler)
    for place, fact in reversed(sorted(places, key=lambda pair: pair[0])):
        paragraphs.insert(place, fact)
    head = "SERVICE AGREEMENT" if style == "contract" else "PATIENT RECORD"
    unit = "Clause" if style == "contract" else "Entry"
    body = [f"{unit} {i}. {text}" for i, text in enumerate(paragraphs, start=1)]
    return "\n\n".join([head, *body]) + "\n"


@dataclass(frozen=True)
class _Drawn:
    """What facts are made of: two things, three figures, up to four names, two towns, a role."""

    things: list[str]
    numbers: list[str]
    names: list[str]
    towns: list[str]
    role: str


def _drawn(style: str, rng: random.Random) -> _Drawn:
    things = rng.sample(THINGS[style], 2)
    numbers = [str(n) for n in rng.sample(range(1001, 9999), 3)]
    return _Drawn(things, numbers, _names(rng, 4), rng.sample(TOWNS, 2), ROLES[style][0])


def _names(rng: random.Random, count: int) -> list[str]:
    pairs = zip(rng.sample(FIRST, count), rng.sample(LAST, count), strict=True)
    return [f"{first} {last}" for first, last in pairs]


def _facts(
    kind: str, style: str, drawn: _Drawn
) -> tuple[list[str], str, tuple[str, ...], tuple[str, ...]]:
    """Sentences in their order, the question, what must and what must not be answered."""
    (thing, other), numbers, names = drawn.things, drawn.numbers, drawn.names
    (town, elsewhere), role, unit = drawn.towns, drawn.role, UNITS[style]
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
        many = "witness" if style == "contract" else "carer"
        facts = [f"A {many} named in this document is {name}." for name in names[:3]]
        return facts, f"Name every {many}.", tuple(names[:3]), ()
    facts = [f"The {role} is {names[0]}.", f"{names[0]} is represented by {names[1]}."]
    if kind == "hops2":
        return facts, f"Who represents the {role}?", (names[1],), ()
    facts += [f"{names[0]} lives in {elsewhere}.", f"{names[1]} lives in {town}."]
    question = f"In which town does the person who represents the {role} live?"
    return facts, question, (town,), (elsewhere,)
