"""Measuring: every figure against an independent computation, every task against a known reader."""

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from respike.config import FarMemory, WindowMixer
from respike.errors import DataError, UsageError
from respike.evaluation import (
    Reference,
    Score,
    Task,
    Vocabulary,
    mean_interval,
    memory_shares,
    negative_log_likelihood,
    paired_interval,
    position_buckets,
    recall,
    wilson,
)
from respike.evaluation.stats import student_t95
from respike.layers.far import FarSoftmax
from respike.layers.span import Span
from respike.material import FILLER, Trial
from respike.models.decoder import Decoder
from respike.models.state import DecoderState
from respike.ops.far import far_definition
from respike.tasks import make_trials
from respike.text import Use, builtin_text, calibration_contexts, contexts, read_text
from respike.tokenizer import Tokenizer
from tiny import V, full, model_config, random_decoder, random_tokens, save_tokenizer, window
from tolerance import assert_close

SHORT = ((full(0, 1, 2),), (window(0, 1, 2, tokens=5, sinks=2),))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without BOS: tokens of a text are those of its pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, add_bos=False)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(model_config(SHORT))


class FakeDecoder(Decoder):
    """A decoder whose logits are what `rule` makes of one sequence (T,) -> (T, V)."""

    def __init__(self, rule: Callable[[Tensor], Tensor], vocab_size: int = V) -> None:
        super().__init__(model_config(SHORT, vocab_size=vocab_size))
        self.rule = rule

    def hidden(
        self, tokens: Tensor, state: DecoderState | None = None, **_: int
    ) -> tuple[Tensor, DecoderState]:
        assert state is None
        return torch.stack([self.rule(row) for row in tokens]), self.init_state(len(tokens))

    def head(self, x: Tensor) -> Tensor:
        return x


def perturbed(decoder: Decoder, amount: float) -> Decoder:
    """The decoder with noise on every weight; the same noise, more of it."""
    other = random_decoder(decoder.config)
    noise = random_decoder(decoder.config, seed=1)
    for mine, wrong in zip(other.parameters(), noise.parameters(), strict=True):
        mine += amount * (wrong - mine)
    return other


# ---- distances -------------------------------------------------------------------------------


def test_a_model_is_no_distance_from_itself(decoder: Decoder) -> None:
    same = Reference(decoder, random_tokens(3, 29)).compare(decoder)
    assert same.kl.shape == (3, 28)
    assert same.kl.abs().max() == 0
    assert same.agree.min() == 1
    assert same.max_logit_difference == 0
    assert torch.equal(same.nats, same.nats_reference)


def test_distances_equal_an_independent_float64_computation() -> None:
    r = np.random.default_rng(0)
    size, length = 11, 7
    a, b = 3 * r.standard_normal((2, length, size))
    tokens = torch.from_numpy(r.integers(0, size, (1, length)))
    reference = FakeDecoder(lambda _: torch.from_numpy(a).float(), size)
    candidate = FakeDecoder(lambda _: torch.from_numpy(b).float(), size)
    found = Reference(reference, tokens).compare(candidate)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a[:-1], b[:-1]))
    target = tokens[0, 1:].numpy()
    expected = {
        "kl": (p * np.log(p / q)).sum(-1),
        "agree": (p.argmax(-1) == q.argmax(-1)).astype(float),
        "nats_reference": -np.log(p[np.arange(length - 1), target]),
        "nats": -np.log(q[np.arange(length - 1), target]),
    }
    assert 0 < expected["agree"].sum() < length - 1
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name)[0].numpy(), value, rtol=1e-4, atol=1e-6)
    assert found.max_logit_difference == pytest.approx(np.abs(a - b)[:-1].max(), rel=1e-5)


def test_kl_is_summed_over_the_vocabulary_and_never_averaged() -> None:
    """The same two distributions in a vocabulary a hundred times larger are as far apart."""
    found = []
    for size in (13, 1300):

        def logits(probability: float, size: int = size) -> Callable[[Tensor], Tensor]:
            row = torch.full((size,), -60.0)
            row[0], row[1] = math.log(probability), math.log(1 - probability)
            return lambda ids: row.expand(len(ids), size)

        tokens = torch.zeros(1, 5, dtype=torch.int64)
        reference = Reference(FakeDecoder(logits(0.9), size), tokens)
        found.append(reference.compare(FakeDecoder(logits(0.1), size)).kl)
    expected = 0.9 * math.log(9) + 0.1 * math.log(1 / 9)
    assert found[0].mean().item() == pytest.approx(expected, rel=1e-5)
    assert found[1].mean().item() == pytest.approx(expected, rel=1e-5)


def test_a_worse_model_is_farther_away(decoder: Decoder) -> None:
    tokens = random_tokens(2, 31)
    reference = Reference(decoder, tokens)
    near, far = (reference.compare(perturbed(decoder, x)) for x in (0.02, 0.2))
    assert 0 < near.kl.mean() < far.kl.mean()
    assert near.agree.mean() > far.agree.mean()
    assert 0 < near.max_logit_difference < far.max_logit_difference


def test_kl_is_not_symmetric_and_the_first_model_is_the_reference(decoder: Decoder) -> None:
    tokens, other = random_tokens(2, 23), perturbed(decoder, 0.3)
    there, back = (
        Reference(decoder, tokens).compare(other),
        Reference(other, tokens).compare(decoder),
    )
    assert (there.kl - back.kl).abs().max() > 1e-3
    assert torch.equal(there.nats_reference, back.nats)


def test_nats_are_the_cross_entropy_of_the_next_token(decoder: Decoder) -> None:
    tokens = random_tokens(2, 27)
    with torch.inference_mode():
        logits = decoder(tokens)[0].double()
    expected = logits[:, :-1].logsumexp(-1) - logits[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    alone = negative_log_likelihood(decoder, tokens)
    compared = Reference(decoder, tokens).compare(perturbed(decoder, 0.1))
    torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compared.nats_reference, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [2, 256, 257, 258, 300])
def test_texts_longer_than_one_piece_of_logits_are_measured_whole(length: int) -> None:
    """The head works on 256 tokens at a time; no prediction is lost or counted twice."""
    tokens = random_tokens(1, length)
    seen = FakeDecoder(lambda row: torch.nn.functional.one_hot(row, V).float() * 5)
    expected = torch.where(tokens[0, 1:] == tokens[0, :-1], 0.0, 5.0) + math.log(
        math.exp(5) + V - 1
    )
    expected = expected - 5
    torch.testing.assert_close(negative_log_likelihood(seen, tokens)[0], expected)
    compared = Reference(seen, tokens).compare(seen)
    torch.testing.assert_close(compared.nats[0], expected)


def test_progress_is_told_of_every_context(decoder: Decoder) -> None:
    steps: list[tuple[int, int]] = []
    tokens = random_tokens(3, 9)
    reference = Reference(decoder, tokens, lambda *x: steps.append(x))
    reference.compare(decoder, lambda *x: steps.append(x))
    negative_log_likelihood(decoder, tokens, lambda *x: steps.append(x))
    assert steps == [(1, 3), (2, 3), (3, 3)] * 3


# ---- buckets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (2, [(0, 2)]),
        (256, [(0, 256)]),
        (257, [(0, 256), (256, 257)]),
        (2048, [(0, 256), (256, 512), (512, 1024), (1024, 2048)]),
        (1500, [(0, 256), (256, 512), (512, 1024), (1024, 1500)]),
    ],
)
def test_buckets_double(length: int, expected: list[tuple[int, int]]) -> None:
    assert position_buckets(length) == expected


def test_buckets_partition_the_predictions(decoder: Decoder) -> None:
    tokens = random_tokens(2, 61)
    found = Reference(decoder, tokens).compare(perturbed(decoder, 0.1))
    buckets = [found.bucket(*edges) for edges in position_buckets(61, first=4)]
    whole = found.bucket(0, 61)
    assert len(buckets) == 5
    assert sum(b["predictions"] for b in buckets) == whole["predictions"] == 2 * 60
    for name in ("kl_nats", "nats", "nats_reference", "nats_added", "top1_agreement_frac"):
        weighted = sum(b[name] * b["predictions"] for b in buckets) / whole["predictions"]
        assert weighted == pytest.approx(whole[name], rel=1e-4, abs=1e-6)
    assert whole["kl_nats"] == pytest.approx(found.kl.mean().item(), rel=1e-5)


def test_a_bucket_holds_the_predictions_made_from_that_much_context() -> None:
    """Nats that equal the number of tokens the prediction was made from."""

    def rising(tokens: Tensor) -> Tensor:
        logits = torch.full((len(tokens), V), -1e9)
        logits[:, 7] = 0
        logits[:, 5] = -torch.arange(1.0, len(tokens) + 1)
        return logits

    tokens = torch.full((1, 40), 5)
    found = Reference(FakeDecoder(rising), tokens).compare(FakeDecoder(rising))
    nats = found.bucket(8, 16)["nats"]
    exact = [n + math.log1p(math.exp(-n)) for n in range(8, 16)]
    assert nats == pytest.approx(sum(exact) / 8, rel=1e-5)


def test_the_interval_of_a_bucket_is_over_contexts_and_holds_its_mean(decoder: Decoder) -> None:
    found = Reference(decoder, random_tokens(6, 17)).compare(perturbed(decoder, 0.1))
    whole = found.bucket(0, 17)
    low, high = whole["kl_nats_95"]
    assert low < whole["kl_nats"] < high
    assert low >= found.kl.mean(1).min() - 1e-6
    assert high <= found.kl.mean(1).max() + 1e-6


# ---- intervals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Closed forms at 0 and all: 1 / (1 + n / z^2). The third: Newcombe 1998, by hand.
        (0, 20, 0.0, 1 / (1 + 20 / 1.959964**2)),
        (20, 20, 1 / (1 + 1.959964**2 / 20), 1.0),
        (7, 20, 0.18119, 0.56714),
        (81, 263, 0.2553, 0.3662),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_gives_the_published_intervals(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric() -> None:
    low, high = wilson(3, 17)
    assert wilson(14, 17) == pytest.approx((1 - high, 1 - low))


def test_the_bootstrap_interval_covers_the_mean_about_95_times_in_100() -> None:
    r = torch.Generator().manual_seed(1)
    inside = 0
    for seed in range(200):
        values = 3 + torch.randn(40, generator=r)
        low, high = mean_interval(values, resamples=400, seed=seed)
        assert low < values.mean() < high
        inside += low <= 3 <= high
    assert 178 <= inside <= 198


@pytest.mark.parametrize("count", [5, 8])
def test_few_values_have_an_interval_that_covers_the_mean_as_often(count: int) -> None:
    """Plain percentiles: 83 and 88 times in 100."""
    r = torch.Generator().manual_seed(2)
    bounds = [mean_interval(torch.randn(count, generator=r), seed=seed) for seed in range(400)]
    assert 368 <= sum(low <= 0 <= high for low, high in bounds) <= 394


def test_student_t_is_that_of_the_tables() -> None:
    for freedom, t in ((3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)):
        assert student_t95(freedom) == pytest.approx(t, rel=0.01)


def test_pairs_that_all_agree_have_the_interval_of_what_so_few_can_show() -> None:
    assert paired_interval(torch.zeros(20)) == pytest.approx((-0.1611, 0.1611), abs=5e-4)
    assert paired_interval(torch.ones(5)) == pytest.approx((0.566, 1.0), abs=5e-4)
    lost = torch.tensor([0.0, 1.0] + [0.0] * 18)
    assert paired_interval(lost) == mean_interval(lost)


def test_none_of_a_number_is_no_more_than_0_whatever_the_number() -> None:
    for trials in range(1, 2000):
        assert wilson(0, trials)[0] == 0
        assert wilson(trials, trials)[1] == 1


def test_the_bootstrap_interval_is_deterministic_and_narrows_with_more_values() -> None:
    values = torch.randn(400)
    assert mean_interval(values) == mean_interval(values)
    (a, b), (c, d) = mean_interval(values[:25]), mean_interval(values)
    assert d - c < (b - a) / 2


def test_one_value_has_no_interval_but_itself() -> None:
    assert mean_interval(torch.tensor([2.5])) == (2.5, 2.5)


# ---- text ------------------------------------------------------------------------------------


def files(folder: Path, *texts: str) -> list[Path]:
    paths = []
    for number, text in enumerate(texts):
        paths.append(folder / f"text-{number}.txt")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def test_contexts_come_from_each_file_in_turn_and_never_cross(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    paths = files(tmp_path, "x" * 23, "y" * 12, "z" * 9)
    found = contexts(paths, tokenizer, context_tokens=5, max_tokens=1000)
    assert [tokenizer.decode(row) for row in found.tolist()] == [
        "xxxxx", "yyyyy", "zzzzz", "xxxxx", "yyyyy", "xxxxx", "xxxxx",
    ]  # fmt: skip
    assert found.dtype == torch.int64


def test_contexts_stop_at_the_tokens_asked_for_and_weigh_files_alike(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    paths = files(tmp_path, "x" * 230, "y" * 120)
    found = contexts(paths, tokenizer, context_tokens=5, max_tokens=23)
    assert [tokenizer.decode(row)[0] for row in found.tolist()] == ["x", "y", "x", "y"]


def test_of_many_texts_too_short_the_first_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paths = files(tmp_path, *"abcdefghijkl")
    with pytest.raises(DataError) as caught:
        contexts(paths, tokenizer, context_tokens=5, max_tokens=50)
    assert str(caught.value).startswith(f"{paths[0]} and 11 more: too short")


def test_a_text_shorter_than_a_context_is_refused_by_name(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for text in ("", "abcd"):
        paths = files(tmp_path, text)
        with pytest.raises(DataError, match="too short for one context of 5 tokens") as caught:
            contexts(paths, tokenizer, context_tokens=5, max_tokens=100)
        assert str(paths[0]) in str(caught.value)
        assert caught.value.hint is not None


def test_fewer_tokens_than_one_context_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paths = files(tmp_path, "x" * 30)
    with pytest.raises(UsageError, match="max_tokens 4 is less than one context of 5"):
        contexts(paths, tokenizer, context_tokens=5, max_tokens=4)


def test_text_that_is_not_utf_8_is_refused_with_the_byte(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text \(byte 2\)"):
        contexts([path], tokenizer, context_tokens=2, max_tokens=100)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read: ") as caught:
        read_text(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("use", ["measure", "calibrate"])
def test_the_built_in_text_is_prose_and_long_enough_for_the_defaults(
    tokenizer: Tokenizer, use: Use
) -> None:
    text = builtin_text(use)
    assert len(text) > 100_000
    assert text == builtin_text(use)
    found = contexts([], tokenizer, context_tokens=2048, max_tokens=8192, use=use)
    assert found.shape == (4, 2048)


def test_what_is_calibrated_on_is_not_measured_on() -> None:
    measured, calibrated = (
        set(builtin_text(use).split("\n\n")) for use in ("measure", "calibrate")
    )
    assert not measured & calibrated


# ---- trials ----------------------------------------------------------------------------------


def trials(vocabulary: Vocabulary, task: Task, count: int = 3, seed: int = 0) -> list[Trial]:
    return make_trials(vocabulary, task, count, seed)


TASKS = [Task("copy", 19), Task("passkey", 220, 0.3), Task("multi-query", 21)]


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.family)
def test_trials_depend_on_task_and_seed_only(vocabulary: Vocabulary, task: Task) -> None:
    first = trials(vocabulary, task)
    assert trials(vocabulary, task) == first
    assert trials(vocabulary, task, count=5)[:3] == first
    assert trials(vocabulary, task, seed=1) != first
    assert len({tuple(t.tokens) for t in first}) == 3


def test_a_copy_trial_repeats_its_first_half_and_asks_for_all_but_the_first_token(
    vocabulary: Vocabulary,
) -> None:
    for trial in trials(vocabulary, Task("copy", 19)):
        assert trial.tokens[:19] == trial.tokens[19:]
        assert len(trial.tokens) == 38
        assert trial.answers == list(range(20, 38))
        assert set(trial.tokens) <= set(vocabulary.tokens)


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("size", [150, 211])
def test_a_passkey_trial_has_the_exact_length_and_asks_for_the_number(
    vocabulary: Vocabulary, tokenizer: Tokenizer, depth: float, size: int
) -> None:
    for trial in trials(vocabulary, Task("passkey", size, depth)):
        text = tokenizer.decode(trial.tokens)
        assert len(trial.tokens) == size
        assert trial.answers == list(range(trial.answers[0], size))
        key = tokenizer.decode([trial.tokens[i] for i in trial.answers]).strip()
        assert len(key) == 5
        assert key.isdigit()
        assert text.endswith(f"The pass key is {key}")
        assert text.count(key) == 3
        assert f"The pass key is {key}. Remember it." in text


def test_the_depth_moves_the_number_and_nothing_else(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    places = []
    for depth in (0.0, 0.25, 0.5, 1.0):
        text = tokenizer.decode(trials(vocabulary, Task("passkey", 400, depth), 1)[0].tokens)
        places.append(text.index("The pass key is"))
        assert FILLER.strip() in text
    assert places[0] == 0
    steps = np.diff(places)
    assert steps[0] > 20
    assert steps[0] == pytest.approx(steps[1], rel=0.2)
    assert steps[2] == pytest.approx(2 * steps[0], rel=0.2)


def test_a_passkey_that_does_not_fit_is_refused_with_the_length_it_needs(
    vocabulary: Vocabulary,
) -> None:
    with pytest.raises(UsageError, match="length of at least") as caught:
        trials(vocabulary, Task("passkey", 20))
    enough = int(str(caught.value).split()[-2])
    assert len(trials(vocabulary, Task("passkey", enough), 1)[0].tokens) == enough
    with pytest.raises(UsageError):
        trials(vocabulary, Task("passkey", enough - 1), 1)


@pytest.mark.parametrize("pairs", [2, 16, 23])
def test_multi_query_pairs_are_distinct_and_the_answers_are_their_values(
    vocabulary: Vocabulary, pairs: int
) -> None:
    equals, newline = vocabulary.ids(" ="), vocabulary.ids("\n")
    line = 2 + len(equals) + len(newline)
    for trial in trials(vocabulary, Task("multi-query", pairs)):
        lines = [trial.tokens[i : i + line] for i in range(0, len(trial.tokens), line)]
        assert all(x[1:-2] == equals and x[-1:] == newline for x in lines)
        value_of = {x[0]: x[-2] for x in lines[:pairs]}
        assert len(set(value_of) | set(value_of.values())) == 2 * pairs
        asked = lines[pairs:]
        assert len(asked) == len({x[0] for x in asked}) == min(pairs, 16)
        assert [x[-2] for x in asked] == [value_of[x[0]] for x in asked]
        answers = [pairs * line + i * line + line - 2 for i in range(len(asked))]
        assert trial.answers == answers
        if pairs > 2:
            assert [x[0] for x in asked] != list(value_of)[: len(asked)]


def test_more_pairs_than_words_are_refused(vocabulary: Vocabulary) -> None:
    count = len(vocabulary.words) // 2
    assert len(trials(vocabulary, Task("multi-query", count), 1)) == 1
    with pytest.raises(UsageError, match=f"{count + 1} pairs need {2 * count + 2} words"):
        trials(vocabulary, Task("multi-query", count + 1), 1)


def test_a_toy_vocabulary_has_no_control_tokens_among_its_words(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    assert len(vocabulary.words) == tokenizer.vocab_size - len(tokenizer.special_ids)
    assert not set(vocabulary.words) & set(tokenizer.special_ids)


# ---- scores ----------------------------------------------------------------------------------


def reader(tokens: Tensor) -> Tensor:
    """Predicts what followed the longest earlier match of what it has just read; first if tied."""
    ids = tokens.tolist()
    logits = torch.zeros(len(ids), V)
    for end in range(1, len(ids)):
        best, at = 0, None
        for start in range(end):
            length = 0
            while length <= start and ids[start - length] == ids[end - length]:
                length += 1
            if length > best:
                best, at = length, start
        if at is not None:
            logits[end, ids[at + 1]] = 20.0
    return logits


def guess(tokens: Tensor) -> Tensor:
    r = torch.Generator().manual_seed(int(tokens.sum()))
    return torch.randn(len(tokens), V, generator=r)


def score(rule: Callable[[Tensor], Tensor], vocabulary: Vocabulary, task: Task, n: int) -> Score:
    return recall(FakeDecoder(rule), vocabulary, task, trials=n)


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.family)
def test_a_reader_that_remembers_everything_scores_one(vocabulary: Vocabulary, task: Task) -> None:
    found = score(reader, vocabulary, task, 5)
    assert found.per_trial.tolist() == [1.0] * 5
    assert found.answer_nats < 1e-4
    result = found.as_dict()
    assert result["accuracy_frac"] == 1.0
    assert result["accuracy_95"][1] == 1.0
    assert result["trials"] == 5


def test_a_reader_that_is_off_by_one_scores_nothing(vocabulary: Vocabulary) -> None:
    def late(tokens: Tensor) -> Tensor:
        return reader(tokens).roll(1, 0)

    for task in TASKS:
        assert score(late, vocabulary, task, 2).per_trial.max() < 0.2


def test_guessing_a_copy_scores_about_chance(vocabulary: Vocabulary) -> None:
    found = score(guess, vocabulary, Task("copy", 400), 40)
    asked = 40 * 399
    assert found.chance_frac == 1 / len(vocabulary.tokens)
    assert 0.6 / V < found.per_trial.mean() < 1.5 / V
    assert asked * found.per_trial.mean() > 20
    low, high = found.as_dict()["accuracy_95"]
    assert low < found.chance_frac < high


def test_guessing_among_the_values_scores_about_chance(vocabulary: Vocabulary) -> None:
    pairs = 12
    line = 2 + len(vocabulary.ids(" =")) + len(vocabulary.ids("\n"))

    def guess_a_value(tokens: Tensor) -> Tensor:
        values = tokens[: pairs * line].view(pairs, line)[:, -2]
        r = torch.Generator().manual_seed(int(tokens.sum()))
        pick = values[torch.randint(pairs, (len(tokens),), generator=r)]
        return torch.nn.functional.one_hot(pick, V).float()

    found = score(guess_a_value, vocabulary, Task("multi-query", pairs), 60)
    assert found.chance_frac == 1 / pairs
    assert 0.5 / pairs < found.per_trial.mean() < 1.6 / pairs


def test_a_uniform_reader_pays_the_logarithm_of_the_vocabulary(vocabulary: Vocabulary) -> None:
    found = score(lambda t: torch.zeros(len(t), V), vocabulary, Task("copy", 11), 2)
    assert found.answer_nats == pytest.approx(math.log(V), rel=1e-5)


def test_a_passkey_counts_only_when_every_digit_is_right(vocabulary: Vocabulary) -> None:
    def all_but_the_last(tokens: Tensor) -> Tensor:
        logits = reader(tokens)
        logits[-2] = 0  # the last digit
        return logits

    found = score(all_but_the_last, vocabulary, Task("passkey", 180), 3)
    assert found.per_trial.tolist() == [0.0] * 3
    assert found.as_dict()["accuracy_95"] == pytest.approx(wilson(0, 3))


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.family)
def test_trials_side_by_side_equal_one_by_one(
    vocabulary: Vocabulary, decoder: Decoder, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = recall(decoder, vocabulary, task, trials=5)
    # By name, because the package's `recall` is the function.
    monkeypatch.setattr(import_module("respike.evaluation.reading"), "BATCH_TOKENS", 1)
    alone = recall(decoder, vocabulary, task, trials=5)
    assert torch.equal(together.per_trial, alone.per_trial)
    assert together.answer_nats == pytest.approx(alone.answer_nats, rel=1e-5)


def test_a_batch_of_unlike_lengths_equals_one_by_one(
    vocabulary: Vocabulary, decoder: Decoder
) -> None:
    from respike.evaluation.reading import _answers

    made = [trials(vocabulary, task, 1)[0] for task in TASKS]
    assert len({len(t.tokens) for t in made}) == 3
    with torch.inference_mode():
        together = _answers(decoder, made, None, [0] * len(made))
        alone = [_answers(decoder, [trial], None, [0])[0] for trial in made]
    for (hits, nats), (one_hits, one_nats), trial in zip(together, alone, made, strict=True):
        assert len(hits) == len(trial.answers)
        assert torch.equal(hits, one_hits)
        torch.testing.assert_close(nats, one_nats, rtol=1e-4, atol=1e-4)


def test_progress_counts_trials(vocabulary: Vocabulary, decoder: Decoder) -> None:
    steps: list[tuple[int, int]] = []
    recall(decoder, vocabulary, TASKS[0], trials=3, progress=lambda *x: steps.append(x))
    assert steps[-1] == (3, 3)


def test_task_names_say_family_and_setting() -> None:
    assert [t.name for t in TASKS] == [
        "copy lag 19", "passkey length 220 depth 0.3", "multi-query pairs 21",
    ]  # fmt: skip


def test_what_memories_are_fitted_to_is_never_what_they_are_measured_on(
    tokenizer: Tokenizer,
) -> None:
    fitted = calibration_contexts([], tokenizer, max_tokens=100, trained_tokens=300)
    assert fitted.shape == (2, 300)
    measured = contexts([], tokenizer, context_tokens=300, max_tokens=60_000).tolist()
    assert not any(row in measured for row in fitted.tolist())


@pytest.mark.parametrize(
    ("max_tokens", "trained_tokens", "shape"),
    [(13000, 8192, (3, 4096)), (9000, 700, (12, 700)), (5, 8192, (2, 4096)), (5, 90, (2, 90))],
)
def test_calibration_contexts_fit_the_source_and_are_at_least_two(
    tokenizer: Tokenizer, max_tokens: int, trained_tokens: int, shape: tuple[int, int]
) -> None:
    found = calibration_contexts(
        [], tokenizer, max_tokens=max_tokens, trained_tokens=trained_tokens
    )
    assert found.shape == shape


# ---- memory's share --------------------------------------------------------------------------


def far(*groups: int, tokens: int, sinks: int) -> WindowMixer:
    mixer = window(*groups, tokens=tokens, sinks=sinks)
    return mixer.model_copy(update={"memory": FarMemory(features=5)})


def test_the_share_of_a_memory_is_the_weight_on_tokens_that_left_the_window() -> None:
    """Against the definition, with values that are 1 where the last query finds a far token."""
    config = model_config(((full(1), far(0, 2, tokens=6, sinks=3)),))
    decoder, tokens = random_decoder(config), random_tokens(2, 41)
    attention = decoder.layers[0].self_attn
    groups, mixer = attention.arrangement()[1]
    assert isinstance(mixer, FarSoftmax)
    mixer.log2_half_life.data = torch.tensor([3.0, 4.5])
    (found,) = memory_shares(decoder, tokens, from_tokens=40)
    with torch.inference_mode():
        x = decoder.layers[0].input_layernorm(decoder.model.embed_tokens(tokens))
        q, k, _ = attention.project(x)
        q = q.view(2, 41, 3, 2, 8)[:, :, groups].flatten(2, 3)
        k = k[:, :, groups]
        start, valid = torch.zeros(2, dtype=torch.int64), torch.full((2,), 41)
        span = Span(start, valid, 41, decoder.frequencies, q.dtype, q.device)
        is_far = torch.zeros(41)
        is_far[3 : 41 - 6] = 1
        shares = far_definition(
            span.rotate(q), span.rotate(k), is_far[None, :, None, None].expand(2, 41, 2, 1),
            mixer.log_query(q), mixer.key_features(k, torch.ones(2, 41, dtype=torch.bool)),
            -math.log(2) / torch.exp2(mixer.log2_half_life), 6, 3,
        )[:, 40, :, 0]  # fmt: skip
    assert (found.layer, found.groups) == (0, (0, 2))
    assert shares.min() > 0.01
    assert_close(torch.tensor(found.head_fracs), shares.mean(0))
    assert mixer.share is None
    assert not mixer.watch


def test_a_shut_memory_has_no_share_and_other_mixers_no_entry() -> None:
    config = model_config(((full(0, 1, 2),), (window(0), far(1, 2, tokens=6, sinks=3))))
    decoder = random_decoder(config)
    (some,) = memory_shares(decoder, random_tokens(1, 20), from_tokens=12)
    assert all(0 < x < 1 for x in some.head_fracs)
    _, mixer = decoder.layers[1].self_attn.arrangement()[1]
    mixer.beta.data.fill_(-math.inf)
    (none,) = memory_shares(decoder, random_tokens(1, 20), from_tokens=12)
    assert (none.layer, none.groups, none.head_fracs) == (1, (1, 2), (0.0,) * 4)
