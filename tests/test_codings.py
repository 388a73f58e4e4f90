"""Codings: exact for every integer in range, against trains written out by hand and in Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from respike.ops.codings import (
    CODINGS,
    COUNTING,
    UNSIGNED,
    Coding,
    code_range,
    code_steps,
    decode,
    encode,
    num_events,
    window_spikes,
)

BY_HAND: dict[tuple[Coding, int, int], list[int]] = {
    ("binary", 3, 5): [1, 1, 1, 0, 0],
    ("ternary", -2, 4): [-1, -1, 0, 0],
    ("ternary", 4, 4): [1, 1, 1, 1],
    ("bitwise", 6, 4): [0, 1, 1, 0],
    ("signed-bitwise", -5, 4): [0, -1, 0, -1],
    ("twos-complement", -5, 4): [1, 0, 1, 1],
    ("twos-complement", -8, 4): [1, 0, 0, 0],
    ("twos-complement", 7, 4): [0, 1, 1, 1],
    ("twos-complement", -1, 1): [1],
}

each_coding = pytest.mark.parametrize("coding", CODINGS)


def every_count(coding: Coding, steps: int) -> Tensor:
    low, high = code_range(coding, steps)
    return torch.arange(low, high + 1, dtype=torch.int32)


def test_trains_are_those_written_by_hand() -> None:
    for (coding, count, steps), train in BY_HAND.items():
        assert encode(torch.tensor([count]), coding, steps)[:, 0].tolist() == train


@each_coding
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 12])
def test_every_count_in_range_comes_back(coding: Coding, steps: int) -> None:
    counts = every_count(coding, steps)
    expected = {
        "binary": steps + 1,
        "ternary": 2 * steps + 1,
        "bitwise": 2**steps,
        "signed-bitwise": 2 ** (steps + 1) - 1,
        "twos-complement": 2**steps,
    }
    assert len(counts) == expected[coding]
    spikes = encode(counts, coding, steps)
    assert spikes.shape == (steps, len(counts))
    assert set(spikes.unique().tolist()) <= ({0, 1} if coding in UNSIGNED else {-1, 0, 1})
    assert decode(spikes, coding).tolist() == counts.tolist()
    assert num_events(counts, coding, steps).tolist() == spikes.ne(0).sum(0).tolist()


@each_coding
def test_no_fewer_steps_would_do_and_one_more_count_is_refused(coding: Coding) -> None:
    for steps in range(1, 12):
        low, high = code_range(coding, steps)
        assert code_steps(low, high, coding) == steps
        assert code_steps(low, high + 1, coding) == steps + 1
        if coding not in UNSIGNED:
            assert code_steps(low - 1, high, coding) == steps + 1
        for beyond in (low - 1, high + 1):
            with pytest.raises(ValueError, match=f"carry {low} to {high}"):
                encode(torch.tensor([0, beyond]), coding, steps)


def test_steps_of_the_papers_examples() -> None:
    # arXiv:2509.05276: 256 takes 256 / 128 / 8 / 7 steps; 8 bits end at 255, so ours says 9 and 8.
    assert code_steps(0, 256, "binary") == 256
    assert code_steps(-128, 128, "ternary") == 128
    assert [code_steps(0, n, "bitwise") for n in (255, 256)] == [8, 9]
    assert [code_steps(-n, n, "signed-bitwise") for n in (127, 128)] == [7, 8]
    assert [code_steps(low, 0, "twos-complement") for low in (0, -1, -128, -129)] == [1, 1, 8, 9]


@each_coding
@given(counts=st.lists(st.integers(-300, 300), min_size=1, max_size=9), zero=st.integers(-400, 400))
@settings(max_examples=60, deadline=None)
def test_a_zero_point_shifts_and_comes_back(coding: Coding, counts: list[int], zero: int) -> None:
    values = torch.tensor(counts)
    low, high = min(counts) - zero, max(counts) - zero
    if coding in UNSIGNED and low < 0:
        with pytest.raises(ValueError, match="zero point"):
            code_steps(low, high, coding)
        zero, high = min(counts), max(counts) - min(counts)
        low = 0
    steps = code_steps(low, high, coding)
    spikes = encode(values, coding, steps, zero)
    assert decode(spikes, coding, zero).tolist() == counts
    assert num_events(values, coding, steps, zero).tolist() == spikes.ne(0).sum(0).tolist()


@each_coding
@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 5)])
def test_any_shape(coding: Coding, shape: tuple[int, ...]) -> None:
    counts = torch.randint(0, 6, shape)
    steps = code_steps(0, 6, coding)
    spikes = encode(counts, coding, steps)
    assert spikes.shape == (steps, *shape)
    assert torch.equal(decode(spikes, coding), counts)


@pytest.mark.parametrize("count", [2**31 - 1, -(2**31), 0])
def test_the_largest_counts(count: int) -> None:
    for coding in ("signed-bitwise", "twos-complement"):
        steps = code_steps(count, count, coding)
        assert steps <= 32
        train = encode(torch.tensor([count], dtype=torch.int32), coding, steps)
        assert decode(train, coding).item() == count


def test_windows_hold_three_bits_each_lowest_first() -> None:
    counts = torch.tensor([0, 1, -7, 8, -73, 511])
    assert window_spikes(counts).T.tolist() == [
        [0, 0, 0], [1, 0, 0], [3, 0, 0], [0, 1, 0], [1, 1, 1], [3, 3, 3],
    ]  # fmt: skip


@each_coding
def test_one_step_of_every_coding_of_nothing(coding: Coding) -> None:
    assert code_steps(0, 0, coding) == 1
    assert not encode(torch.zeros(3, dtype=torch.int32), coding, 1).any()
    assert (coding in COUNTING) == (code_steps(0, 9, coding) == 9)
