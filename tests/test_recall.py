"""Recall: trials of every family, suites, truncation, columns."""

import hashlib
import json
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respike.config import FarMemory
from respike.data.recall import MATERIAL, TRAINING_FACTS, TRAINING_FILLER
from respike.errors import UnsupportedError, UsageError
from respike.evaluation import Score, Task, Vocabulary, make_trials, recall
from respike.evaluation.columns import Column, five_columns, row, window_tokens
from respike.evaluation.reading import common_beginning, read_answers
from respike.evaluation.recall import truncated
from respike.evaluation.suites import SUITES, split_by_length, tasks_of
from respike.material import FILLER, SENTENCES, Material, Trial
from respike.material.facts import FACTS
from respike.models.decoder import Decoder
from respike.models.state import DecoderState
from respike.tasks import FAMILIES, parse_task
from respike.tokenizer import Tokenizer
from tiny import V, full, model_config, random_decoder, save_tokenizer, window

SHORT = ((full(0, 1, 2),), (window(0, 1, 2, tokens=5, sinks=2),))
DIGITS = 5
"""Tokens of a number in the toy vocabulary, which has none of two digits."""
ANSWER = 1 + DIGITS
"""Tokens of a number after a space, as variables have it."""


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def vocabulary(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Vocabulary:
    """Of a tokenizer that begins texts with BOS, and of one that does not."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, add_bos=request.param)
    return Vocabulary(Tokenizer.from_folder(folder))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("plain")
    save_tokenizer(folder, add_bos=False)
    return Vocabulary(Tokenizer.from_folder(folder))


class FakeDecoder(Decoder):
    """Its logits are what `rule` makes of one sequence (T,) -> (T, V); notes what it was asked."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model_config(SHORT))
        self.rule = rule
        self.lengths: list[int] = []
        self.heads: list[int] = []

    def hidden(
        self, tokens: Tensor, state: DecoderState | None = None, **_: int
    ) -> tuple[Tensor, DecoderState]:
        assert state is None
        self.lengths.append(tokens.shape[1])
        return torch.stack([self.rule(r) for r in tokens]), self.init_state(len(tokens))

    def head(self, x: Tensor) -> Tensor:
        self.heads.append(x.shape[1])
        return x


def places(tokens: list[int], part: list[int]) -> list[int]:
    """Where ``part`` begins in ``tokens``."""
    return [i for i in range(len(tokens)) if tokens[i : i + len(part)] == part]


def text_ids(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.tokenizer.encode(text, bos=False)


# ---- trials ----------------------------------------------------------------------------------


def test_trials_that_published_results_used_have_not_changed(plain: Vocabulary) -> None:
    """Digest of what respike 0.1.0 made before families were added; it must never move."""
    settings = "copy:19 copy:512 passkey:220:0.3 passkey:1024 passkey:640:0.1 multi-query:5"
    digest = hashlib.sha256()
    for setting in (*settings.split(), "multi-query:21"):
        for seed in (0, 7):
            for trial in make_trials(plain, parse_task(setting), 3, seed):
                digest.update(json.dumps([trial.tokens, trial.answers]).encode())
    expected = "915ad6f1ac443d20fbb94fe9ce5d46a24bae073a4fdfde8409e5e47f53a2dc1b"
    assert digest.hexdigest() == expected


EVERY = [
    Task("copy", 23),
    Task("passkey", 310, 0.3),
    Task("needles", 410, 0.3),
    Task("variables", 760, hops=3),
    Task("multi-needle", 410),
    Task("questions", 430),
    Task("multi-query", 19),
]


def test_every_family_is_tried_here() -> None:
    assert {task.family for task in EVERY} == set(FAMILIES)


@pytest.mark.parametrize("task", EVERY, ids=lambda t: t.family)
def test_trials_depend_on_task_and_seed_only_and_are_as_long_as_said(
    vocabulary: Vocabulary, task: Task
) -> None:
    first = make_trials(vocabulary, task, 3)
    assert make_trials(vocabulary, task, 5)[:3] == first
    assert make_trials(vocabulary, task, 3, seed=1) != first
    assert len({tuple(t.tokens) for t in first}) == 3
    for trial in first:
        longest = max(len(asked.tokens) for asked in trial.asked())
        assert longest == FAMILIES[task.family].tokens(vocabulary, task)
        assert 0 < min(trial.answers) <= max(trial.answers) < len(trial.tokens)


def lines_of(vocabulary: Vocabulary, trial: Trial) -> list[tuple[int, int, list[int]]]:
    """(begin, name, value) of every line ``name = value`` between two line breaks."""
    newline, equals = text_ids(vocabulary, "\n"), text_ids(vocabulary, "=")
    found = []
    for begin in places(trial.tokens[: trial.answers[0]], newline):
        after = begin + 2
        if trial.tokens[after : after + len(equals)] != equals:
            continue
        after += len(equals)
        ends = [end for end in places(trial.tokens, newline) if end > after]
        if ends:
            found.append((begin, trial.tokens[begin + 1], trial.tokens[after : ends[0]]))
    return found


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("size", [410, 777])
def test_needles_are_four_named_numbers_and_the_one_asked_for_is_at_its_depth(
    vocabulary: Vocabulary, depth: float, size: int
) -> None:
    longest = max(len(text_ids(vocabulary, sentence)) for sentence in SENTENCES)
    for trial in make_trials(vocabulary, Task("needles", size, depth), 4):
        assert trial.answers == list(range(size - DIGITS, size))
        answer = trial.tokens[-DIGITS:]
        lines = lines_of(vocabulary, trial)
        assert len({name for _, name, _ in lines}) == len({tuple(v) for _, _, v in lines}) == 4
        for _, _, value in lines:
            number = vocabulary.tokenizer.decode(value)
            assert len(number) == DIGITS
            assert number.isdigit()
        question = 2 + len(text_ids(vocabulary, "="))
        name = trial.tokens[-DIGITS - question + 1]
        assert [n for _, n, value in lines if value == answer] == [name]
        assert (
            places(trial.tokens[: trial.answers[0]], answer[1:])
            == places(trial.tokens, answer[1:])[:1]
        ), "once in the text, once as the answer"
        line = 1 + question + DIGITS
        room = size - 4 * line - question - DIGITS
        begin = next(b for b, n, _ in lines if n == name)
        filler_before = begin - line * sum(b < begin for b, _, _ in lines)
        assert abs(filler_before - depth * room) <= longest / 2 + 1
        places_of_others = [b / size for b, n, _ in lines if n != name]
        assert max(places_of_others) - min(places_of_others) > 0.2


def test_which_of_the_needles_is_asked_for_changes_with_the_trial(plain: Vocabulary) -> None:
    orders = set()
    for trial in make_trials(plain, Task("needles", 500, 0.5), 12):
        lines = lines_of(plain, trial)
        orders.add([value for _, _, value in lines].index(trial.tokens[-DIGITS:]))
    assert len(orders) > 1


Links = dict[int, tuple[int, list[int]]]
"""By name: where it is given its value, and that value, a number's tokens or one name."""


def links_of(vocabulary: Vocabulary, text: list[int]) -> Links:
    """Every line ``VAR name = number`` or ``VAR name = VAR name`` of a text."""
    begin, equals = text_ids(vocabulary, "\n VAR"), text_ids(vocabulary, " =")
    other, end = text_ids(vocabulary, " VAR"), text_ids(vocabulary, "\n")
    found: Links = {}
    for place in places(text, begin):
        after = place + len(begin) + 1 + len(equals)
        if text[after - len(equals) : after] != equals:
            continue
        value = text[after : after + ANSWER]
        if value[: len(other)] == other:
            value = text[after + len(other) : after + len(other) + 1]
            after += len(other) - ANSWER + 1
        assert text[after + ANSWER : after + ANSWER + 1] == end
        name = text[place + len(begin)]
        assert name not in found
        found[name] = (place, value)
    return found


def walk(links: Links, name: int) -> list[int]:
    """Names from ``name`` on to the one that has a number."""
    names = [name]
    while len(links[names[-1]][1]) == 1:
        names += links[names[-1]][1]
    return names


def asked_name(vocabulary: Vocabulary, trial: Trial) -> int:
    before, after = (text_ids(vocabulary, t) for t in ("\n The value of VAR", " is"))
    end = trial.answers[0] - len(after)
    assert trial.tokens[end : trial.answers[0]] == after
    assert trial.tokens[end - 1 - len(before) : end - 1] == before
    return trial.tokens[end - 1]


@pytest.mark.parametrize(("size", "hops"), [(900, 1), (900, 2), (1200, 3), (1403, 4)])
def test_variables_are_chains_in_order_of_which_one_leads_to_the_answer(
    vocabulary: Vocabulary, size: int, hops: int
) -> None:
    for trial in make_trials(vocabulary, Task("variables", size, hops=hops), 4):
        assert trial.answers == list(range(size - ANSWER, size))
        answer, text = trial.tokens[-ANSWER:], trial.tokens[: trial.answers[0]]
        links = links_of(vocabulary, text)
        assert len(links) == 4 * (hops + 1), "two examples, two chains, no name twice"
        numbers = [tuple(value) for _, value in links.values() if len(value) == ANSWER]
        assert len(set(numbers)) == len(numbers) == 4
        asked = asked_name(vocabulary, trial)
        chain = walk(links, asked)
        assert len(chain) == hops + 1
        assert links[chain[-1]][1] == answer
        assert len(places(text, answer[1:])) == 1, "the number stands in the text once"
        given = [links[name][0] for name in reversed(chain)]
        assert given == sorted(given)
        filler = max(place for place, _ in links.values()), len(text)
        begin = 1 + max(places(text, text_ids(vocabulary, "\n The value of VAR"))[:2])
        for part, place in enumerate(given):
            low, high = ((part + step) / (hops + 1) for step in (-0.35, 1.35))
            assert low < (place - begin) / (filler[1] - begin) < high
        used = {value[0] for _, value in links.values() if len(value) == 1}
        ends = [name for name in links if name not in used]
        assert len(ends) == 4
        assert asked in ends
        assert all(len(walk(links, name)) == hops + 1 for name in ends)


def test_the_examples_of_variables_are_solved_and_stand_first(vocabulary: Vocabulary) -> None:
    before, after = (text_ids(vocabulary, t) for t in ("\n The value of VAR", " is"))
    for trial in make_trials(vocabulary, Task("variables", 1100, hops=3), 3):
        links = links_of(vocabulary, trial.tokens[: trial.answers[0]])
        *solved, asked = places(trial.tokens, before)
        assert len(solved) == 2
        for place in solved:
            end = place + len(before) + 1
            assert trial.tokens[end : end + len(after)] == after
            names = walk(links, trial.tokens[end - 1])
            value = trial.tokens[end + len(after) : end + len(after) + ANSWER]
            assert links[names[-1]][1] == value != trial.tokens[-ANSWER:]
            assert all(links[name][0] < place for name in names)
        assert sum(place < solved[1] for place, _ in links.values()) == 2 * 4
        assert asked > solved[1]


def test_multi_needle_asks_for_all_four_each_right_after_the_text(vocabulary: Vocabulary) -> None:
    equals = text_ids(vocabulary, "=")
    orders = set()
    for trial in make_trials(vocabulary, Task("multi-needle", 520), 6):
        lines = lines_of(vocabulary, trial)
        value_of = {name: value for _, name, value in lines}
        assert len(value_of) == len({tuple(value) for value in value_of.values()}) == 4
        text = trial.tokens[: trial.questions[0][0]]
        quarters = [4 * begin // len(text) for begin, _, _ in lines if begin < len(text)]
        assert quarters == [0, 1, 2, 3]
        asked = trial.asked()
        names = []
        for question in asked:
            assert question.tokens[: len(text)] == text
            name, *rest = question.tokens[len(text) + 1 :]
            names.append(name)
            assert rest == equals + value_of[name]
            assert question.answers == list(range(520 - DIGITS, 520))
        assert sorted(names) == sorted(value_of)
        orders.add(tuple(sorted(names).index(name) for name in names))
    assert len(orders) > 1


def test_questions_ask_for_each_fact_of_the_text_once(vocabulary: Vocabulary) -> None:
    for trial in make_trials(vocabulary, Task("questions", 700), 6):
        text = vocabulary.tokenizer.decode(trial.tokens[: trial.questions[0][0]])
        relations = []
        for question in trial.asked():
            said = vocabulary.tokenizer.decode(question.tokens)[len(text) :]
            answer = vocabulary.tokenizer.decode([question.tokens[a] for a in question.answers])
            assert said.startswith("\nQuestion: ")
            assert said.endswith(answer)
            (relation,) = (
                r for r in FACTS.relations if r.question.split("{who}")[0] in said
                and r.question.split("{who}")[1] in said
            )  # fmt: skip
            relations.append(relation)
            who = next(name for name in FACTS.people if name in said)
            assert answer.strip() in relation.values
            assert f" {relation.sentence.format(who=who, what=answer.strip())}" in text
        assert len(set(relations)) == len(relations) == 4


def test_facts_of_evaluation_and_training_share_no_word() -> None:
    for mine, theirs in ((FACTS, TRAINING_FACTS), (TRAINING_FACTS, FACTS)):
        assert not set(mine.people) & set(theirs.people)
        assert all(len(set(r.values)) == 8 for r in mine.relations)
        assert len({r.question for r in mine.relations}) == len(mine.relations)
        assert mine.chance_frac == 1 / 8
    values = [{v for r in facts.relations for v in r.values} for facts in (FACTS, TRAINING_FACTS)]
    assert not values[0] & values[1]
    for mine, filler in zip(values, (FILLER, TRAINING_FILLER), strict=True):
        assert not mine & set(re.findall(r"\w+", filler)), "or the filler would name answers too"
    sentences = [{r.sentence for r in facts.relations} for facts in (FACTS, TRAINING_FACTS)]
    assert not sentences[0] & sentences[1]


@pytest.mark.parametrize("task", [Task("multi-needle", 300), Task("questions", 330)])
def test_questions_from_one_state_are_answered_as_each_text_read_anew(
    vocabulary: Vocabulary, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = random_decoder(model_config(SHORT, vocab_size=vocabulary.tokenizer.vocab_size))
    texts = [trial.asked() for trial in make_trials(vocabulary, task, 3)]
    alone = [next(iter(read_answers(decoder, [[q]]))) for text in texts for q in text]
    for most in (8192, 700, 1):
        monkeypatch.setattr("respike.evaluation.reading.BATCH_TOKENS", most)
        monkeypatch.setattr("respike.evaluation.reading.PREFILL_CHUNK_TOKENS", 16)
        found = list(read_answers(decoder, texts))
        for (hits, nats), (right_hits, right_nats) in zip(found, alone, strict=True):
            assert torch.equal(hits, right_hits)
            torch.testing.assert_close(nats, right_nats, rtol=1e-4, atol=1e-4)


def test_what_long_texts_begin_with_alike_is_read_once(
    plain: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = random_decoder(model_config(SHORT, vocab_size=plain.tokenizer.vocab_size))
    trials = make_trials(plain, Task("passkey", 400, 0.5), 3)
    shared = common_beginning(trials)
    assert trials[0].tokens[:shared] == trials[2].tokens[:shared]
    assert 150 < shared < 250
    expected = [next(iter(read_answers(decoder, [[trial]]))) for trial in trials]
    monkeypatch.setattr("respike.evaluation.reading.BATCH_TOKENS", 1)
    monkeypatch.setattr("respike.evaluation.reading.PREFILL_CHUNK_TOKENS", 64)
    read: list[int] = []
    chunks = decoder._chunks

    def counting(tokens: Tensor, *rest: Any) -> Any:
        read.append(tokens.shape[1])
        return chunks(tokens, *rest)

    monkeypatch.setattr(decoder, "_chunks", counting)
    found = list(read_answers(decoder, [[trial] for trial in trials]))
    begin = shared // 64 * 64
    assert read == [begin, *(len(trial.tokens) - begin for trial in trials)]
    for (hits, nats), (right_hits, right_nats) in zip(found, expected, strict=True):
        assert torch.equal(hits, right_hits)
        torch.testing.assert_close(nats, right_nats, rtol=1e-4, atol=1e-4)


def test_a_score_of_several_questions_is_the_share_answered(plain: Vocabulary) -> None:
    decoder = random_decoder(model_config(SHORT, vocab_size=plain.tokenizer.vocab_size))
    task = Task("questions", 330)
    texts = [trial.asked() for trial in make_trials(plain, task, 2)]
    answers = iter(read_answers(decoder, texts))
    expected = [sum(bool(next(answers)[0].all()) for _ in text) / len(text) for text in texts]
    assert recall(decoder, plain, task, trials=2).per_trial.tolist() == pytest.approx(expected)
    shown = recall(decoder, plain, task, trials=2, last_tokens=64)
    assert shown.per_trial.shape == (2,)
    assert shown.answer_nats != recall(decoder, plain, task, trials=2).answer_nats


@pytest.mark.parametrize("family", ["passkey", "needles", "variables", "multi-needle", "questions"])
def test_what_does_not_fit_is_refused_with_the_length_it_needs(
    vocabulary: Vocabulary, family: str
) -> None:
    with pytest.raises(UsageError, match=f"{family} needs a length of at least") as caught:
        make_trials(vocabulary, Task(family, 20), 1)
    enough = int(str(caught.value).split()[-2])
    trial = make_trials(vocabulary, Task(family, enough), 1)[0]
    assert max(len(asked.tokens) for asked in trial.asked()) == enough
    with pytest.raises(UsageError):
        make_trials(vocabulary, Task(family, enough - 1), 1)


# ---- settings and suites ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "task", "name"),
    [
        ("copy:512", Task("copy", 512), "copy lag 512"),
        ("passkey:1024", Task("passkey", 1024, 0.5), "passkey length 1024 depth 0.5"),
        ("needles:2048:0.25", Task("needles", 2048, 0.25), "needles length 2048 depth 0.25"),
        ("variables:4096:4", Task("variables", 4096, hops=4), "variables length 4096 hops 4"),
        ("variables:4096", Task("variables", 4096, hops=2), "variables length 4096 hops 2"),
        ("multi-needle:2048", Task("multi-needle", 2048), "multi-needle length 2048"),
        ("questions:4096", Task("questions", 4096), "questions length 4096"),
        ("multi-query:32", Task("multi-query", 32), "multi-query pairs 32"),
    ],
)
def test_a_setting_names_a_task(setting: str, task: Task, name: str) -> None:
    assert parse_task(setting) == task
    assert task.name == name
    assert parse_task(task.setting) == task


@pytest.mark.parametrize(
    "setting",
    [
        "", "copy", "copy:", "copy:1", "copy:9:0.5", "copy:-3", "needles:900:1.2",
        "needles:900:nan", "needles:900:0.5:2", "variables:900:0", "variables:900:9",
        "variables:900:2.5", "multi-query:8:2", "magic:3",
    ],
)  # fmt: skip
def test_what_names_no_task_is_refused_with_the_forms_that_do(setting: str) -> None:
    with pytest.raises(UsageError, match=r"copy:LAG.*variables:LENGTH\[:HOPS\]") as caught:
        parse_task(setting)
    assert repr(setting) in str(caught.value)


def test_the_quick_suite_is_what_results_were_published_for() -> None:
    assert [task.setting for task in tasks_of(["quick"], 77)] == [
        "copy:128", "copy:512", "passkey:1024:0.1", "passkey:1024:0.5", "passkey:1024:0.9",
        "multi-query:32",
    ]  # fmt: skip


def test_the_complete_suite_reaches_from_half_the_window_to_32_windows() -> None:
    tasks = tasks_of(["complete"], 256)
    assert len(tasks) == len(set(tasks)) == 7 + 7 + 2 * 5 * 4 + 2 * 4 + 3 * 2
    lags = [128, 256, 512, 1024, 2048, 4096, 8192]
    assert [t.size for t in tasks if t.family == "copy"] == lags
    assert [t.size for t in tasks if t.family == "multi-query"] == [8, 16, 32, 64, 128, 256, 512]
    for family in ("passkey", "needles"):
        grid = {(t.depth_frac, t.size) for t in tasks if t.family == family}
        lengths = (1024, 2048, 4096, 8192)
        assert grid == {(d, n) for d in (0.1, 0.25, 0.5, 0.75, 0.9) for n in lengths}
    for family in ("multi-needle", "questions"):
        assert [t.size for t in tasks if t.family == family] == [1024, 2048, 4096, 8192]
    chains = {(t.size, t.hops) for t in tasks if t.family == "variables"}
    assert chains == {(n, h) for n in (1024, 4096) for h in (2, 3, 4)}
    assert [t.size for t in tasks_of(["complete"], 100)][:3] == [50, 100, 200]


def test_suites_and_tasks_may_be_mixed_and_nothing_is_asked_twice() -> None:
    quick = tasks_of(["quick"], 256)
    assert tasks_of(["copy:512", "quick", "copy:9"], 256) == [
        Task("copy", 512), *(t for t in quick if t != Task("copy", 512)), Task("copy", 9),
    ]  # fmt: skip


def test_a_misspelt_suite_is_guessed() -> None:
    with pytest.raises(UsageError) as caught:
        tasks_of(["compleet"], 256)
    assert caught.value.hint == "did you mean `complete`?"
    with pytest.raises(UsageError) as caught:
        tasks_of(["magic:3"], 256)
    assert all(suite in str(caught.value.hint) for suite in SUITES)


def test_tasks_are_kept_up_to_the_length_itself(plain: Vocabulary) -> None:
    long = len(make_trials(plain, Task("multi-query", 9), 1)[0].tokens)
    tasks = [Task("copy", 60), Task("copy", 61), Task("passkey", 120), Task("multi-query", 9)]
    assert split_by_length(plain, tasks, 120) == (
        [tasks[0], tasks[2], tasks[3]], [tasks[1]],
    )  # fmt: skip
    assert split_by_length(plain, [tasks[3]], long - 1) == ([], [tasks[3]])
    assert split_by_length(plain, [tasks[3]], long) == ([tasks[3]], [])


# ---- scores ----------------------------------------------------------------------------------


def logits_of(tokens: list[int], right: bool = True) -> Tensor:
    """Certain that this is what comes; row t predicts token t + 1."""
    logits = torch.zeros(len(tokens), V)
    for index, token in enumerate(tokens[1:]):
        logits[index, token if right else (token + 1) % V] = 20.0
    return logits


Numbers = dict[int, list[int]]
"""The numbers that a trial's filler leads to, by the name that would be asked for."""


def finder(vocabulary: Vocabulary, choose: Callable[[Numbers, int], list[int]]) -> FakeDecoder:
    """Reads a trial of needles or variables, and answers with what ``choose`` finds for a name."""

    def rule(row: Tensor) -> Tensor:
        tokens = row.tolist()
        links = links_of(vocabulary, tokens[:-ANSWER])
        text = tokens[: -ANSWER if links else -DIGITS]
        trial = Trial(tokens, list(range(len(text), len(tokens))))
        if links:
            name = asked_name(vocabulary, trial)
            used = {value[0] for _, value in links.values() if len(value) == 1}
            solved = places(text, text_ids(vocabulary, "\n The value of VAR"))[1]
            ends = [n for n, (place, _) in links.items() if n not in used and place > solved]
            numbers = {n: links[walk(links, n)[-1]][1] for n in ends}
        else:
            name = text[-1 - len(text_ids(vocabulary, "="))]
            numbers = {n: value for _, n, value in lines_of(vocabulary, trial)}
        return logits_of(text + choose(numbers, name))

    return FakeDecoder(rule)


@pytest.mark.parametrize(
    "task", [Task("needles", 420, 0.1), Task("needles", 420, 0.9), Task("variables", 999, hops=4)]
)
def test_a_reader_of_names_finds_every_number(plain: Vocabulary, task: Task) -> None:
    found = recall(finder(plain, dict.__getitem__), plain, task, trials=6)
    assert found.per_trial.tolist() == [1.0] * 6
    assert found.answer_nats < 1e-4


@pytest.mark.parametrize("family", ["needles", "variables"])
def test_a_reader_that_takes_any_number_scores_chance(plain: Vocabulary, family: str) -> None:
    turn = count()

    def any_of(numbers: Numbers, _: int) -> list[int]:
        return list(numbers.values())[next(turn) % len(numbers)]

    found = recall(finder(plain, any_of), plain, Task(family, 700), trials=80)
    assert found.chance_frac == {"needles": 0.25, "variables": 0.5}[family]
    assert 0.6 * found.chance_frac < found.per_trial.mean() < 1.4 * found.chance_frac


def test_the_logits_of_a_long_copy_never_exist_all_at_once(plain: Vocabulary) -> None:
    perfect = FakeDecoder(lambda row: logits_of(row.tolist()))
    found = recall(perfect, plain, Task("copy", 700), trials=1)
    assert sum(perfect.heads) == 699
    assert max(perfect.heads) <= 256
    assert found.per_trial.tolist() == [1.0]


# ---- truncated -------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 3, 4, 16, 40, 1000])
@pytest.mark.parametrize("task", EVERY, ids=lambda t: t.family)
def test_a_truncated_trial_asks_the_same_from_the_last_tokens_only(
    plain: Vocabulary, task: Task, last: int
) -> None:
    for trial in make_trials(plain, task, 2):
        asked = []
        for piece in truncated(trial, last):
            begin = places(trial.tokens, piece.tokens)
            offsets = [b for b in begin if b + len(piece.tokens) - 1 in trial.answers]
            assert offsets
            for answer in piece.answers:
                assert answer <= last
                assert answer >= 0.75 * last or piece.tokens == trial.tokens[: len(piece.tokens)]
            asked += [piece.tokens[a] for a in piece.answers]
        assert asked == [trial.tokens[a] for a in trial.answers]


def test_a_truncated_score_is_that_of_the_cut_text_read_alone(plain: Vocabulary) -> None:
    """Every answer by a pass of its own over the text from where its block begins."""
    decoder, last = random_decoder(model_config(SHORT)), 20
    task = Task("copy", 47)
    found = recall(decoder, plain, task, trials=3, last_tokens=last)
    right, nats = [], []
    for trial in make_trials(plain, task, 3):
        hits = []
        for number, answer in enumerate(trial.answers):
            end = trial.answers[min(number - number % 6 + 5, len(trial.answers) - 1)]
            text = torch.tensor([trial.tokens[max(0, end - last) : answer]])
            assert 15 <= text.shape[1] <= 20
            with torch.inference_mode():
                log_p = decoder(text)[0][0, -1].double().log_softmax(-1)
            hits.append(float(log_p.argmax() == trial.tokens[answer]))
            nats.append(-log_p[trial.tokens[answer]])
        right.append(sum(hits) / len(hits))
    assert found.per_trial.tolist() == pytest.approx(right)
    assert found.answer_nats == pytest.approx(float(torch.stack(nats).mean()), rel=1e-5)


def test_a_truncation_longer_than_the_trial_changes_nothing(plain: Vocabulary) -> None:
    decoder = random_decoder(model_config(SHORT))
    for task in (Task("multi-query", 9), Task("passkey", 200)):
        whole = recall(decoder, plain, task, trials=2)
        same = recall(decoder, plain, task, trials=2, last_tokens=4000)
        assert torch.equal(whole.per_trial, same.per_trial)
        assert whole.answer_nats == pytest.approx(same.answer_nats, rel=1e-5)


def test_progress_of_a_truncated_task_counts_trials_and_ends_at_all(plain: Vocabulary) -> None:
    decoder = FakeDecoder(lambda row: logits_of(row.tolist()))
    steps: list[tuple[int, int]] = []
    recall(
        decoder, plain, Task("copy", 3000), trials=5, last_tokens=16,
        progress=lambda *x: steps.append(x),
    )  # fmt: skip
    assert max(decoder.lengths) <= 17
    assert len(steps) > 2
    assert steps == sorted(steps)
    assert steps[-1] == (5, 5)
    assert all(done < 5 for done, _ in steps[:-1])


# ---- columns ---------------------------------------------------------------------------------


WIDE = (
    (window(0, 1, 2, tokens=7, sinks=3, reach=20),),
    (window(1, tokens=1, sinks=3, reach=20), window(0, 2, tokens=9, sinks=3, reach=20)),
    (full(0), window(1, 2, tokens=6, sinks=0)),
)
NARROW = (
    (window(0, 1, 2, tokens=1, sinks=3, reach=20),),
    (window(1, tokens=1, sinks=3, reach=20), window(0, 2, tokens=1, sinks=3, reach=20)),
    (full(0), window(1, 2, tokens=1, sinks=0)),
)


def test_the_columns_are_what_their_names_say(plain: Vocabulary) -> None:
    original = random_decoder(model_config(((full(0, 1, 2),),) * 3))
    converted, narrow = (random_decoder(model_config(layers)) for layers in (WIDE, NARROW))
    task = Task("multi-query", 12)
    columns = {c.name: c for c in five_columns(original, converted, 16)}
    assert list(columns) == ["original", "model", "memory_off", "window_off", "truncated"]
    missing = {name for name, column in columns.items() if column.missing}
    assert missing == {"memory_off"}
    assert "memory" in str(columns["memory_off"].missing)
    with pytest.raises(UsageError, match="memory"):
        columns["memory_off"].score(plain, task, trials=1)
    expected = {
        "original": recall(original, plain, task, trials=3),
        "model": recall(converted, plain, task, trials=3),
        "window_off": recall(narrow, plain, task, trials=3),
        "truncated": recall(original, plain, task, trials=3, last_tokens=16),
    }
    nats = {name: columns[name].score(plain, task, trials=3).answer_nats for name in expected}
    assert nats == pytest.approx({n: s.answer_nats for n, s in expected.items()}, rel=1e-4)
    assert len({round(value, 3) for value in nats.values()}) == 4


def test_a_model_with_a_memory_has_all_five_columns() -> None:
    far = window(0, 1, 2).model_copy(update={"memory": FarMemory(features=5)})
    decoder = random_decoder(model_config(((far,),)))
    assert not any(column.missing for column in five_columns(decoder, decoder, 9))


def test_a_column_without_a_part_off_needs_none() -> None:
    assert Column("model", random_decoder(model_config(((full(0, 1, 2),),)))).missing is None


def test_the_window_of_a_model_is_its_largest_and_256_where_there_is_none() -> None:
    assert window_tokens(model_config(WIDE)) == 9
    assert window_tokens(model_config(((full(0, 1, 2),),))) == 256


def scored(*values: float) -> Score:
    return Score(Task("copy", 5), torch.tensor(values, dtype=torch.float32), 0.25, 0.01)


@pytest.mark.parametrize(("hits", "evidence"), [(3, False), (4, True), (5, True)])
def test_a_task_is_evidence_where_the_original_scores_80_percent(hits: int, evidence: bool) -> None:
    original = scored(*[1.0] * hits, *[0.0] * (5 - hits))
    found = row(Task("copy", 5), {"original": original, "model": scored(0, 0, 1, 0, 0)})
    assert found["evidence"] is evidence
    assert found["original_accuracy_frac"] == pytest.approx(hits / 5)
    assert found["model_accuracy_frac"] == pytest.approx(0.2)
    assert found["lost_frac"] == pytest.approx(hits / 5 - 0.2)
    low, high = found["lost_95"]
    assert low <= found["lost_frac"] <= high
    assert "memory_off_accuracy_frac" not in found


def test_a_row_without_the_original_gives_no_verdict() -> None:
    found = row(Task("copy", 5), {"model": scored(0.5, 0.25)})
    assert not {"evidence", "lost_frac"} & set(found)
    assert found["trials"] == 2
    assert found["setting"] == "copy:5"


def test_the_picture_is_drawn_of_whatever_was_measured(tmp_path: Path) -> None:
    from respike.evaluation.recall_plot import draw

    tasks = [*EVERY, Task("passkey", 310, 0.9), Task("passkey", 620, 0.9), Task("copy", 46)]
    for number, names in enumerate([["model"], ["original", "model", "window_off"]]):
        rows = [row(task, dict.fromkeys(names, scored(1, 0.5))) for task in tasks]
        for some in (rows, rows[:1], rows[1:2], rows[3:4]):
            path = tmp_path / f"{number}.png"
            draw(some, path)
            assert path.read_bytes().startswith(b"\x89PNG")
            path.unlink()


# ---- SentencePiece


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """A vocabulary as Llama 2's: a space before every text, which decoding takes away again."""
    names = "".join(chr(ord("a") + i) for i in range(26))
    words = [f"{a}{b}{c}" for a in "bdk" for b in "aeiou" for c in "mnr"]
    plain = [*names, *names.upper(), *"0123456789.,=?'", "\u2581", "\u2581\u2581"]
    plain += [f"\u2581{word}" for word in (*words, *map(str.capitalize, words), "is", "The")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *plain]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(plain)]
    return Tokenizer.from_gguf_metadata(
        {
            f"tokenizer.ggml.{key}": value
            for key, value in {
                "model": "llama", "tokens": tokens, "token_type": np.array(kinds, np.int32),
                "scores": -np.arange(len(tokens), dtype=np.float32), "bos_token_id": 1,
                "eos_token_id": 2, "unknown_token_id": 0,
            }.items()
        }
    )  # fmt: skip


def test_words_of_a_sentencepiece_vocabulary_are_words(pieces: Tokenizer) -> None:
    mine, training = Vocabulary(pieces), Vocabulary(pieces, MATERIAL)
    for vocabulary, shape in ((mine, "\u2581[a-z]{3}"), (training, "\u2581[A-Z][a-z]{2}")):
        spelled = [pieces.token(word) or "" for word in vocabulary.words]
        assert len(spelled) >= 45
        assert all(re.fullmatch(shape, word) for word in spelled)


@pytest.mark.parametrize("family", ["passkey", "needles", "multi-needle", "questions", "variables"])
def test_sentencepiece_asks_for_tokens_that_stand_in_the_text(
    pieces: Tokenizer, family: str
) -> None:
    vocabulary = Vocabulary(pieces)
    assert vocabulary.ids(" 48") == [*vocabulary.ids(" "), *vocabulary.ids("48")]
    for whole in make_trials(vocabulary, Task(family, 1500), 3):
        for trial in whole.asked():
            answer = [trial.tokens[i] for i in trial.answers]
            text = trial.tokens[: trial.answers[0]]
            found = sum(text[i : i + len(answer)] == answer for i in range(len(text)))
            assert found >= 1


def test_a_large_vocabulary_without_words_is_refused(
    pieces: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Material(word=re.compile("no such word"))
    assert Vocabulary(pieces, nothing).words == Vocabulary(pieces, nothing).tokens
    monkeypatch.setattr("respike.material.TOY_TOKENS", 100)
    with pytest.raises(UnsupportedError, match=r"0 of 4\d\d tokens are a word"):
        Vocabulary(pieces, nothing)
