"""Facts in plain sentences, and the questions that ask for them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """What can be said of a person.

    Attributes:
        sentence: States it, with ``{who}`` and ``{what}``.
        question: Asks for it, with ``{who}``.
        reply: How the answer begins, with ``{who}``; what follows is ``{what}``.
        values: Every ``{what}``.
    """

    sentence: str
    question: str
    reply: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One sentence, the question about it with the beginning of the reply, and what answers it."""

    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Facts:
    """People, and what can be said of them."""

    people: tuple[str, ...]
    relations: tuple[Relation, ...]

    @property
    def chance_frac(self) -> float:
        """Of who knows what is asked for and guesses among its values."""
        return sum(1 / len(r.values) for r in self.relations) / len(self.relations)

    def draw(self, count: int, rng: random.Random) -> list[Fact]:
        """``count`` facts, each of another person and another relation."""
        relations, people = rng.sample(self.relations, count), rng.sample(self.people, count)
        return [
            _fact(relation, who, rng.choice(relation.values))
            for relation, who in zip(relations, people, strict=True)
        ]


def _fact(relation: Relation, who: str, what: str) -> Fact:
    question, reply = relation.question.format(who=who), relation.reply.format(who=who)
    return Fact(
        sentence=relation.sentence.format(who=who, what=what),
        question=f"\nQuestion: {question}\nAnswer: {reply}",
        answer=what,
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def people(names: str, relations: Sequence[Relation]) -> Facts:
    """`Facts` about the people of these names."""
    return Facts(_words(names), tuple(relations))


def relation(sentence: str, question: str, reply: str, values: str) -> Relation:
    """`Relation` with its values in one string."""
    return Relation(sentence, question, reply, _words(values))


FACTS = people(
    "Anna Peter Maria Thomas Laura Daniel Julia Martin Sarah David Emma Robert Helen Simon Alice "
    "George",
    (
        relation(
            "{who} lives in {what}.", "Where does {who} live?", "The city where {who} lives is",
            "Paris London Rome Berlin Madrid Vienna Boston Chicago",
        ),
        relation(
            "{who} has a {what}.", "Which animal does {who} have?", "{who} has a",
            "dog cat horse rabbit parrot snake turtle mouse",
        ),
        relation(
            "{who} works as a {what}.", "What is the job of {who}?", "{who}'s job is to be a",
            "teacher doctor farmer lawyer nurse pilot baker painter",
        ),
        relation(
            "The favorite color of {who} is {what}.", "What is the favorite color of {who}?",
            "The favorite color of {who} is", "red pink purple orange black white gray brown",
        ),
        relation(
            "{who} likes to drink {what}.", "What does {who} like to drink?",
            "{who} drinks", "tea coffee milk water juice beer wine lemonade",
        ),
        relation(
            "{who} plays {what} on Sundays.", "What does {who} play on Sundays?",
            "On Sundays, {who} plays",
            "tennis football chess golf hockey basketball baseball volleyball",
        ),
    ),
)  # fmt: skip
"""What evaluation asks about; training asks about others (`respike.data.recall`)."""
