"""Recall tasks: families, their settings, and how a trial is made from a model's own vocabulary.

copy         Random tokens, then the same again. Score: tokens of the repeat predicted right.
passkey      A five-digit number hidden in filler, asked for at the end. Score: all digits right.
needles      Four such numbers, each with a name; one is asked for by its name. Score: likewise.
variables    Chains in filler: a name has a number, another name has that name's, and so on; the
             last name of one chain is asked for. Score: all digits of its number right.
multi-query  Word pairs, then some keys again, shuffled. Score: values predicted right.
multi-needle Four named numbers, one in each quarter of the filler, all asked for: each on its own,
             right after the text. Score: share of the numbers found.
questions    Sentences about people in filler, a question about each of them, asked likewise.
             Score: share of the questions answered right.

To add a family: a function that makes a trial, and an entry in `FAMILIES`. Evaluation and training
share the makers and never the material: see `Material`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from respike.errors import UsageError
from respike.material import (
    Trial,
    Vocabulary,
    hidden_in_filler,
    spread,
    words_and_text,
)

NEEDLES = 4
"""Numbers in a needles trial."""
CHAINS = 2
"""Chains in the filler of a variables trial; the first is asked for."""
QUESTIONS = 4
"""Facts in a questions trial; all are asked about."""
EXAMPLES = 2
"""Solved chains that a variables trial begins with."""
MAX_HOPS = 8
ASKED_PAIRS = 16
"""Keys that a multi-query trial asks for, at most."""


@dataclass(frozen=True)
class Task:
    """One setting of a family.

    Attributes:
        family: A key of `FAMILIES`.
        size: What `Family.unit` says, in tokens or pairs.
        depth_frac: passkey, needles: where the number stands, 0 the beginning, 1 the end.
        hops: variables: names between the number and what is asked for, the last one included.
    """

    family: str
    size: int
    depth_frac: float = 0.5
    hops: int = 2

    @property
    def name(self) -> str:
        """Such as ``copy lag 512``; trials are drawn from it, so it stays as it is."""
        kind = FAMILIES[self.family]
        third = f" {kind.third} {self._third:g}" if kind.third else ""
        return f"{self.family} {kind.unit} {self.size}{third}"

    @property
    def setting(self) -> str:
        """Such as ``copy:512``; `parse_task` reads it."""
        third = f":{self._third:g}" if FAMILIES[self.family].third else ""
        return f"{self.family}:{self.size}{third}"

    @property
    def _third(self) -> float:
        return float(self.hops) if FAMILIES[self.family].third == "hops" else self.depth_frac


@dataclass(frozen=True)
class Family:
    """A kind of task.

    Attributes:
        make: A trial; depends on its arguments only.
        unit: What `Task.size` counts: ``lag``, ``length`` or ``pairs``.
        tokens: Length of a trial: what is read to answer one of its questions.
        chance_frac: Score of a guess.
        third: What a setting's third field is, if it has one.
        whole: An answer is right when all its tokens are, and wrong otherwise.
    """

    make: Callable[[Vocabulary, Task, random.Random], Trial]
    unit: str
    tokens: Callable[[Vocabulary, Task], int]
    chance_frac: Callable[[Vocabulary, Task], float]
    third: Literal["depth", "hops"] | None = None
    whole: bool = False


def copy_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """``size`` random tokens twice; the first of the repeat cannot be known and does not count.

    Any token but the special ones, not words: words invite a model to go on as text would, and
    SmolLM2-135M then copies 14 % where it copies half of random tokens.
    """
    tokens = rng.choices(vocabulary.tokens, k=task.size)
    return Trial(tokens + tokens, list(range(task.size + 1, 2 * task.size)))


def passkey_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """Filler, the sentence with the number at its depth, filler, the question."""
    material = vocabulary.material
    key = material.number(rng.randrange(len(material.numbers)))
    needle = vocabulary.ids(f"The pass key is {key}. Remember it. {key} is the pass key. ")
    question = vocabulary.ids("What is the pass key? The pass key is")
    answer = vocabulary.ids(f" {key}")
    filler = vocabulary.ids(material.filler)
    room = _room(task, needle, question, answer)
    filler = (filler * (room // len(filler) + 1))[:room]
    before = round(task.depth_frac * room)
    tokens = filler[:before] + needle + filler[before:] + question + answer
    return Trial(tokens, list(range(len(tokens) - len(answer), len(tokens))))


def needles_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """Four named numbers in filler: the one asked for at its depth, the others spread out.

    Lines ``name=number``, because a task must be one the original can do, and SmolLM2-135M does
    better with those than with "The pass key of the kite is 48213." or spaces around the sign.
    """
    names = rng.sample(vocabulary.words, NEEDLES)
    material = vocabulary.material
    keys = [material.number(n) for n in rng.sample(material.numbers, NEEDLES)]
    depths = [task.depth_frac, *spread(NEEDLES - 1, rng)]
    # The number in a piece of its own: its tokens must be those of the answer.
    pieces = [
        (depth, words_and_text(vocabulary, "\n", name, "=", key, "\n"))
        for depth, name, key in zip(depths, names, keys, strict=True)
    ]
    question = words_and_text(vocabulary, "\n", names[0], "=")
    return _ask(vocabulary, task, pieces, [(question, keys[0])])


def multi_needle_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """Four lines as in `needles_trial`, spread over the filler; all are asked for, in any order."""
    names = rng.sample(vocabulary.words, NEEDLES)
    material = vocabulary.material
    keys = [material.number(n) for n in rng.sample(material.numbers, NEEDLES)]
    pieces = [
        (depth, words_and_text(vocabulary, "\n", name, "=", key, "\n"))
        for depth, name, key in zip(spread(NEEDLES, rng), names, keys, strict=True)
    ]
    questions = [
        (words_and_text(vocabulary, "\n", name, "="), key)
        for name, key in zip(names, keys, strict=True)
    ]
    rng.shuffle(questions)
    return _ask(vocabulary, task, pieces, questions)


def questions_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """Facts spread over the filler, in sentences; a question about each, in any order."""
    facts = vocabulary.material.facts.draw(QUESTIONS, rng)
    pieces = [
        (depth, vocabulary.ids(f" {fact.sentence}"))
        for depth, fact in zip(spread(QUESTIONS, rng), facts, strict=True)
    ]
    questions = [(vocabulary.ids(fact.question), f" {fact.answer}") for fact in facts]
    rng.shuffle(questions)
    return _ask(vocabulary, task, pieces, questions)


def variables_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """Two worked examples, then two chains in filler; hop h stands in the h-th part of the text.

    So the number asked for is in the first part, and each name of its chain one part later. The
    examples have names and numbers of their own: they show what is wanted, and nothing else.
    """
    links, chains = task.hops + 1, EXAMPLES + CHAINS
    if chains * links > len(vocabulary.words):
        raise UsageError(f"variables: {task.hops} hops need {chains * links} words")
    drawn = rng.sample(vocabulary.words, chains * links)
    material = vocabulary.material
    keys = [material.number(n) for n in rng.sample(material.numbers, chains)]
    examples: list[int] = []
    pieces = [(0.0, examples)]
    for chain, key in enumerate(keys):
        names = drawn[chain * links : (chain + 1) * links]
        lines = _chain(vocabulary, names, key)
        if chain < EXAMPLES:
            question = _value_of(vocabulary, names[-1])
            for part in (*lines, question, vocabulary.ids(f" {key}\n")):
                examples += part
        else:
            pieces += zip(spread(links, rng), lines, strict=True)
    asked = _value_of(vocabulary, drawn[(EXAMPLES + 1) * links - 1])
    return _ask(vocabulary, task, pieces, [(asked, f" {keys[EXAMPLES]}")])


def _chain(vocabulary: Vocabulary, names: list[int], key: str) -> list[list[int]]:
    """Lines that give the first name a number and every other name the one before it."""
    others = [words_and_text(vocabulary, " VAR", name) for name in names[:-1]]
    values = [vocabulary.ids(f" {key}"), *others]
    return [
        [*words_and_text(vocabulary, "\n VAR", name, " ="), *value, *vocabulary.ids("\n")]
        for name, value in zip(names, values, strict=True)
    ]


def _value_of(vocabulary: Vocabulary, name: int) -> list[int]:
    return words_and_text(vocabulary, "\n The value of VAR", name, " is")


def multi_query_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """``size`` lines ``key = value``, then up to 16 of the keys again in another order."""
    if 2 * task.size > len(vocabulary.words):
        raise UsageError(f"multi-query: {task.size} pairs need {2 * task.size} words")
    drawn = rng.sample(vocabulary.words, 2 * task.size)
    keys, values = drawn[: task.size], drawn[task.size :]
    equals, newline = vocabulary.ids(" ="), vocabulary.ids("\n")
    tokens: list[int] = []
    answers = []
    for key, value in zip(keys, values, strict=True):
        tokens += [key, *equals, value, *newline]
    for index in rng.sample(range(task.size), min(task.size, ASKED_PAIRS)):
        tokens += [keys[index], *equals, values[index], *newline]
        answers.append(len(tokens) - 1 - len(newline))
    return Trial(tokens, answers)


def _room(task: Task, *fixed: list[int]) -> int:
    """Tokens of filler that a trial of ``size`` tokens has room for."""
    least = sum(map(len, fixed))
    if task.size < least:
        raise UsageError(f"{task.family} needs a length of at least {least} tokens")
    return task.size - least


def _ask(
    vocabulary: Vocabulary,
    task: Task,
    pieces: list[tuple[float, list[int]]],
    questions: list[tuple[list[int], str]],
) -> Trial:
    """The pieces at their depths in filler, the questions with their answers.

    The text has ``size`` tokens with the longest of the questions: so much is read for each.
    """
    solved = [(question, vocabulary.ids(answer)) for question, answer in questions]
    longest = max(([*question, *answer] for question, answer in solved), key=len)
    room = _room(task, longest, *(piece for _, piece in pieces))
    tokens = hidden_in_filler(vocabulary, room, pieces)
    answers: list[int] = []
    asked = []
    for question, answer in solved:
        begin = len(tokens)
        tokens += question + answer
        answers += range(begin + len(question), len(tokens))
        asked.append((begin, len(tokens)))
    return Trial(tokens, answers, tuple(asked) if len(asked) > 1 else ())


def _multi_query_tokens(vocabulary: Vocabulary, task: Task) -> int:
    line = 2 + len(vocabulary.ids(" =")) + len(vocabulary.ids("\n"))
    return line * (task.size + min(task.size, ASKED_PAIRS))


FAMILIES = {
    "copy": Family(
        copy_trial,
        "lag",
        tokens=lambda _, task: 2 * task.size,
        chance_frac=lambda vocabulary, _: 1 / len(vocabulary.tokens),
    ),
    "passkey": Family(
        passkey_trial,
        "length",
        tokens=lambda _, task: task.size,
        chance_frac=lambda *_: 1e-5,
        third="depth",
        whole=True,
    ),
    "needles": Family(
        needles_trial,
        "length",
        tokens=lambda _, task: task.size,
        chance_frac=lambda *_: 1 / NEEDLES,
        third="depth",
        whole=True,
    ),
    "variables": Family(
        variables_trial,
        "length",
        tokens=lambda _, task: task.size,
        chance_frac=lambda *_: 1 / CHAINS,
        third="hops",
        whole=True,
    ),
    "multi-needle": Family(
        multi_needle_trial,
        "length",
        tokens=lambda _, task: task.size,
        chance_frac=lambda *_: 1 / NEEDLES,
        whole=True,
    ),
    "questions": Family(
        questions_trial,
        "length",
        tokens=lambda _, task: task.size,
        chance_frac=lambda vocabulary, _: vocabulary.material.facts.chance_frac,
        whole=True,
    ),
    "multi-query": Family(
        multi_query_trial,
        "pairs",
        tokens=_multi_query_tokens,
        chance_frac=lambda _, task: 1 / task.size,
    ),
}


def parse_task(setting: str) -> Task:
    """The task that ``FAMILY:SIZE[:DEPTH or HOPS]`` names.

    Raises:
        UsageError: It names none.
    """
    family, *numbers = setting.split(":")
    kind = FAMILIES.get(family)
    try:
        if kind is None or not 1 <= len(numbers) <= (2 if kind.third else 1):
            raise ValueError
        task = Task(family, int(numbers[0]))
        if len(numbers) == 2 and kind.third == "hops":
            task = Task(family, task.size, hops=int(numbers[1]))
        elif len(numbers) == 2:
            task = Task(family, task.size, float(numbers[1]))
        if task.size < 2 or not 0 <= task.depth_frac <= 1 or not 1 <= task.hops <= MAX_HOPS:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"recall task {setting!r}: expected {_settings()}, with a size of at least 2, a depth "
            f"of 0 to 1, 1 to {MAX_HOPS} hops"
        ) from None
    return task


def _settings() -> str:
    forms = [
        f"{name}:{kind.unit.upper()}" + (f"[:{kind.third.upper()}]" if kind.third else "")
        for name, kind in FAMILIES.items()
    ]
    return f"{', '.join(forms[:-1])} or {forms[-1]}"


def make_trials(vocabulary: Vocabulary, task: Task, trials: int, seed: int = 0) -> list[Trial]:
    """The same trials for every model with this vocabulary: they depend on task and seed only."""
    return [
        FAMILIES[task.family].make(vocabulary, task, random.Random(f"{seed}/{task.name}/{i}"))
        for i in range(trials)
    ]
