"""What models write: greedy continuations and the measures of how alike they are."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from respike.errors import UsageError
from respike.evaluation import continuation_agreement, continuations
from respike.evaluation.continuation import common_prefix, per_prompt, repetition
from respike.models.decoder import Decoder
from tiny import V, full, model_config, random_decoder, random_tokens, window

MIXED = ((full(0, 1, 2),), (window(0, 1, 2, tokens=5, sinks=2),))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(model_config(MIXED))


def one_by_one(decoder: Decoder, prompt: Tensor, count: int, never: Sequence[int] = ()) -> Tensor:
    """The whole text read again for every token; nothing is shared with what is tested."""
    text = prompt.clone()
    with torch.inference_mode():
        for _ in range(count):
            scores = decoder(text[None])[0][0, -1].float()
            scores[list(never)] = -torch.inf
            text = torch.cat((text, scores.argmax()[None]))
    return text[len(prompt) :]


def test_continuations_are_the_likeliest_tokens_whatever_the_batch(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_tokens(3, 11)
    expected = torch.stack([one_by_one(decoder, prompt, 9) for prompt in prompts])
    assert torch.equal(continuations(decoder, prompts, 9), expected)
    assert torch.equal(continuations(decoder, prompts, 9, chunk_tokens=4), expected)
    monkeypatch.setattr("respike.evaluation.continuation.BATCH_TOKENS", 41)
    steps: list[tuple[int, int]] = []
    split = continuations(decoder, prompts, 9, progress=lambda *x: steps.append(x))
    assert torch.equal(split, expected)
    assert steps[-1] == (27, 27)


def test_tokens_that_end_a_text_are_never_chosen(decoder: Decoder) -> None:
    prompts = random_tokens(2, 11)
    free = continuations(decoder, prompts, 6)
    never = sorted(set(free.flatten().tolist()))
    held = continuations(decoder, prompts, 6, never=never)
    assert not set(held.flatten().tolist()) & set(never)
    expected = torch.stack([one_by_one(decoder, prompt, 6, never) for prompt in prompts])
    assert torch.equal(held, expected)


def test_a_model_shown_little_reads_its_last_tokens_as_a_text_of_its_own(decoder: Decoder) -> None:
    prompts, last = random_tokens(2, 30), 12
    found = continuations(decoder, prompts, 7, last_tokens=last)
    for prompt, row in zip(prompts, found, strict=True):
        text = prompt
        for count in (3, 3, 1):
            text = torch.cat((text, one_by_one(decoder, text[-9:], count)))
        assert torch.equal(row, text[30:])
    assert not torch.equal(found, continuations(decoder, prompts, 7))


@pytest.mark.parametrize(("rows", "length", "count"), [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
def test_nothing_to_continue_is_refused(
    decoder: Decoder, rows: int, length: int, count: int
) -> None:
    with pytest.raises(UsageError, match="at least one of each"):
        continuations(decoder, torch.zeros(rows, length, dtype=torch.int64), count)


def test_the_common_prefix_ends_at_the_first_difference() -> None:
    a = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    b = torch.tensor([[5, 6, 0, 8], [1, 6, 7, 8], [5, 6, 7, 8]])
    assert common_prefix(a, b).tolist() == [2, 0, 4]
    assert per_prompt(a, b)["agreement_frac"].tolist() == [0.75, 0.75, 1.0]
    assert per_prompt(a, b)["prefix_frac"].tolist() == [0.5, 0.0, 1.0]


def test_repetition_is_the_share_of_4_grams_that_came_before() -> None:
    rows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [9] * 8])
    assert repetition(rows).tolist() == pytest.approx([1 / 5, 0.0, 4 / 5])
    assert repetition(rows[:, :3]).tolist() == [0.0, 0.0, 0.0]
    assert repetition(rows, 2).tolist() == pytest.approx([3 / 7, 0.0, 6 / 7])


def test_agreement_is_paired_by_prompt() -> None:
    a = random_tokens(5, 16)
    b = a.clone()
    b[1, 4:] = 0
    b[3, 10] = (b[3, 10] + 1) % V
    found = continuation_agreement(a, b)
    assert found["prompts"] == 5
    assert found["new_tokens"] == 16
    assert found["prefix_tokens"] == pytest.approx((16 * 3 + 4 + 10) / 5)
    low, high = found["prefix_tokens_95"]
    assert low < found["prefix_tokens"] < high <= 16
    added = (repetition(b) - repetition(a)).mean()
    assert found["repetition_added_frac"] == pytest.approx(float(added))
    assert found["repetition_added_frac"] > 0
    same = continuation_agreement(a, a)
    assert same["agreement_frac"] == 1.0
    assert same["repetition_added_frac_95"] == (0.0, 0.0)
