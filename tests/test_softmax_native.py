"""Softmax of a cache: the definition, every level of the kernels against it, int8 caches."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import at_level, each_level, extension, levels, native
from mixers import normal
from respike.device import set_threads
from respike.ops.attention import attention_definition, visible
from respike.ops.softmax import (
    Keys,
    dequantise_rows,
    quantise_rows,
    window_softmax,
    window_softmax_definition,
)
from tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16)


class Case(NamedTuple):
    """Tokens, keys, heads, groups, head dim, value dim, sinks, where things stand, window."""

    T: int
    S: int
    H: int
    G: int
    K: int
    V: int
    sinks: int = 0
    first: int = 0
    start: int = 0
    window: int | None = None


CASES = {
    "one token of all": Case(1, 1, 3, 1, 4, 6),
    "odd sizes": Case(7, 7, 6, 2, 10, 6),
    "causal": Case(150, 150, 6, 2, 64, 64),
    "causal, in the middle": Case(19, 150, 4, 2, 64, 64, 0, 0, 131),
    "window and sinks": Case(70, 169, 6, 2, 64, 64, 4, 4, 103, 100),
    "window, from the start": Case(131, 128, 3, 1, 16, 24, 3, 3, 0, 33),
    "window of one": Case(66, 65, 2, 1, 6, 130, 2, 2, 1, 1),
    "window past the keys": Case(3, 40, 2, 2, 34, 70, 5, 9, 60, 30),
    "step, ring": Case(1, 100, 7, 1, 128, 128, 4, 4, 103, None),
    "step, long": Case(1, 2500, 3, 1, 64, 64, 0, 0, 2499),
    "steps, long, window": Case(3, 2300, 6, 2, 18, 8, 4, 4, 2301, 2200),
    "many heads": Case(2, 70, 200, 1, 8, 8, 0, 0, 68),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs(case: Case, dtype: torch.dtype, rows: int = 2) -> tuple[Tensor, Keys, Keys | None]:
    T, S, H, G, K, V, sinks = case[:7]
    q = 2 * normal(rows, T, H, K)
    keys = Keys(normal(rows, G, S, K, seed=1), normal(rows, G, S, V, seed=2))
    first = Keys(normal(rows, G, sinks, K, seed=3), normal(rows, G, sinks, V, seed=4))
    q, keys, first = q.to(dtype), *(Keys(p.k.to(dtype), p.v.to(dtype)) for p in (keys, first))
    return q, keys, first if sinks else None


def where(case: Case) -> dict[str, int | None]:
    return {"first": case.first, "start": case.start, "window_tokens": case.window}


def in_int8(keys: Keys | None) -> Keys | None:
    if keys is None:
        return None
    (k, k_scale), (v, v_scale) = quantise_rows(keys.k), quantise_rows(keys.v)
    return Keys(k, v, k_scale, v_scale)


# ---- the definition --------------------------------------------------------------------------


@each_case
def test_the_definition_is_attention_over_what_is_visible(case: Case) -> None:
    q, keys, sinks = inputs(case, torch.float32)
    positions = torch.cat((torch.arange(case.sinks), case.first + torch.arange(case.S)))
    queries = case.start + torch.arange(case.T)
    seen = visible(queries[None], positions[None], case.window, case.sinks).expand(2, -1, -1)
    parts = [keys] if sinks is None else [sinks, keys]
    k, v = (torch.cat(x, 2).transpose(1, 2) for x in zip(*(p[:2] for p in parts), strict=True))
    out, _ = window_softmax_definition(q, keys, sinks, **where(case))
    assert_close(out, attention_definition(q, k, v, seen))


def test_the_definition_in_numpy_with_queries_of_their_own_for_sinks() -> None:
    case = Case(5, 11, 6, 2, 4, 3, 2, 2, 7, 6)
    q, keys, sinks = inputs(case, torch.float32)
    assert sinks is not None
    q_sink = normal(*q.shape, seed=9)
    out, mass = window_softmax_definition(q, keys, sinks, q_sink=q_sink, scale=0.3, **where(case))
    expected, expected_mass = np.zeros(out.shape), np.zeros(mass.shape)
    for b, t, h in itertools.product(range(2), range(5), range(6)):
        position, group = 7 + t, h // 3
        own = [j - 2 for j in range(position - 5, position + 1) if 2 <= j < 13]
        scores = [float(q_sink[b, t, h].double() @ sinks.k[b, group, j].double()) for j in (0, 1)]
        scores += [float(q[b, t, h].double() @ keys.k[b, group, i].double()) for i in own]
        weights = np.exp(0.3 * np.array(scores))
        values = torch.cat((sinks.v[b, group], keys.v[b, group, own])).double().numpy()
        expected[b, t, h] = weights @ values / weights.sum()
        expected_mass[b, t, h] = math.log(weights.sum())
    assert_close(out, torch.from_numpy(expected).float())
    assert_close(mass, torch.from_numpy(expected_mass).float())


# ---- the kernels -----------------------------------------------------------------------------


@native
@each_level
@each_dtype
@each_case
@pytest.mark.usefixtures("poison")
def test_every_level_matches_the_definition(level: int, dtype: torch.dtype, case: Case) -> None:
    q, keys, sinks = inputs(case, dtype)
    with at_level(level):
        out, mass = window_softmax(q, keys, sinks, **where(case))
    expected, expected_mass = window_softmax_definition(q, keys, sinks, **where(case))
    assert_close(out, expected)
    assert (mass - expected_mass).abs().max() <= 2e-5


@native
@each_level
@each_dtype
@each_case
def test_int8_caches_are_as_good_as_what_they_stand_for(
    level: int, dtype: torch.dtype, case: Case
) -> None:
    q, keys, sinks = inputs(case, dtype)
    keys8, sinks8 = in_int8(keys), in_int8(sinks)
    assert keys8 is not None
    with at_level(level):
        out, mass = window_softmax(q, keys8, sinks8, **where(case))
    expected, expected_mass = window_softmax_definition(q, keys8, sinks8, **where(case))
    assert_close(out, expected)
    assert (mass - expected_mass).abs().max() <= 2e-5


@native
@each_level
@each_dtype
def test_sinks_are_scored_by_their_own_queries(level: int, dtype: torch.dtype) -> None:
    case = CASES["window and sinks"]
    q, keys, sinks = inputs(case, dtype)
    q_sink = 2 * normal(*q.shape, seed=9).to(dtype)
    options = {"q_sink": q_sink, "scale": 0.21, **where(case)}
    with at_level(level):
        out, mass = window_softmax(q, keys, sinks, **options)
    expected, expected_mass = window_softmax_definition(q, keys, sinks, **options)
    assert_close(out, expected)
    assert (mass - expected_mass).abs().max() <= 2e-5


@native
@each_level
@each_dtype
@pytest.mark.parametrize("name", ["causal", "window and sinks", "steps, long, window"])
def test_slots_that_hold_nothing_are_not_read(level: int, dtype: torch.dtype, name: str) -> None:
    case = CASES[name]
    q, keys, sinks = inputs(case, dtype)
    roomy = [torch.full((2, 2, case.S + 9, 70), torch.nan, dtype=dtype) for _ in range(2)]
    for slots, x in zip(roomy, keys, strict=False):
        slots[:, :, 5:-4, : case.K if x is keys.k else case.V] = x
    spread = Keys(roomy[0][:, :, 5:-4, : case.K], roomy[1][:, :, 5:-4, : case.V])
    with at_level(level):
        for got, expected in zip(
            window_softmax(q, spread, sinks, **where(case)),
            window_softmax(q, keys, sinks, **where(case)),
            strict=True,
        ):
            assert torch.equal(got, expected)


@native
@each_level
@each_dtype
def test_what_is_not_seen_does_not_matter_at_all(level: int, dtype: torch.dtype) -> None:
    case = Case(40, 200, 6, 2, 16, 16, 0, 0, 120, 50)  # sees 71 to 159
    q, keys, _ = inputs(case, dtype)
    with at_level(level):
        before = window_softmax(q, keys, **where(case))
        for x in keys[:2]:
            x[:, :, :71], x[:, :, 160:] = torch.nan, torch.nan
        after = window_softmax(q, keys, **where(case))
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1])
        keys.k[:, :, 140:], keys.v[:, :, 140:] = -keys.k[:, :, 140:], -1e30
        later = window_softmax(q, keys, **where(case))
    assert torch.equal(later[0][:, :20], before[0][:, :20])
    assert not torch.isclose(later[0][:, 20:], before[0][:, 20:]).all(-1).any()


@native
@each_level
@each_dtype
def test_scores_far_apart_and_a_maximum_that_keeps_rising(level: int, dtype: torch.dtype) -> None:
    T = 200
    q = torch.ones(1, T, 1, 4, dtype=dtype)
    k = torch.linspace(-3000, 3000, T).to(dtype)[None, None, :, None].repeat(1, 1, 1, 4)
    v = normal(1, 1, T, 4).to(dtype)
    with at_level(level):
        out, mass = window_softmax(q, Keys(k, v), scale=1.0)
        backwards, high = window_softmax(q[:, :1], Keys(k.flip(2), v), start=T - 1, scale=1.0)
    assert_close(out, v.transpose(1, 2))
    assert_close(mass[0, :, 0], 4 * k[0, 0, :, 0].float())
    assert_close(backwards[0, 0, 0], v[0, 0, 0])
    assert high.item() == pytest.approx(4 * k.max().item())


@native
@each_level
def test_nan_in_a_query_stays_in_its_row(level: int) -> None:
    q, keys, _ = inputs(CASES["causal"], torch.float32)
    with at_level(level):
        before, _ = window_softmax(q, keys)
        q[1, 77, 3] = torch.nan
        after, mass = window_softmax(q, keys)
    assert after[1, 77, 3].isnan().all()
    assert mass[1, 77, 3].isnan()
    after[1, 77, 3] = before[1, 77, 3]
    assert torch.equal(after, before)


@native
@each_dtype
@pytest.mark.parametrize("name", ["causal", "step, long", "steps, long, window", "many heads"])
def test_the_bits_do_not_depend_on_the_threads(dtype: torch.dtype, name: str) -> None:
    case = CASES[name]
    q, keys, sinks = inputs(case, dtype, rows=3)
    with at_level(levels()[-1]):
        alone = window_softmax(q, keys, sinks, **where(case))
        try:
            set_threads(3)
            shared = window_softmax(q, keys, sinks, **where(case))
        finally:
            set_threads(1)
    assert extension().pool_workers() >= 2
    assert torch.equal(shared[0], alone[0])
    assert torch.equal(shared[1], alone[1])


@native
def test_caches_of_other_layouts_are_read_where_they_are_or_copied() -> None:
    case = CASES["causal"]
    q, keys, _ = inputs(case, torch.float32)
    expected, _ = window_softmax(q, keys)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in keys[:2])
    assert torch.equal(window_softmax(q, Keys(k, v))[0], expected)
    k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in keys[:2])
    assert torch.equal(window_softmax(q, Keys(k, v))[0], expected)


def test_what_the_kernels_cannot_take_runs_by_the_definition() -> None:
    case = CASES["window and sinks"]
    q, keys, sinks = inputs(case, torch.float16)
    out, _ = window_softmax(q, keys, sinks, **where(case))
    assert torch.equal(out, window_softmax_definition(q, keys, sinks, **where(case))[0])


# ---- int8 rows -------------------------------------------------------------------------------


def test_rows_are_rounded_to_the_nearest_of_255_steps() -> None:
    x = normal(3, 5, 17) * torch.logspace(-6, 3, 15).view(3, 5, 1)
    integers, scale = quantise_rows(x)
    assert (integers.abs().amax(-1) == 127).all()
    gap = (dequantise_rows(integers, scale) - x).abs()
    assert (gap <= 0.5001 * x.abs().amax(-1, keepdim=True) / 127).all()


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, torch.inf], [torch.nan, 2.0], [-4.0, 2.0]])
    back = dequantise_rows(*quantise_rows(x))
    assert back[0].tolist() == [0, 0]
    assert back[1:3].isnan().all(-1).tolist() == [True, True]
    assert back[3, 0] == -4


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 0, "first": 1}, "sees no key"),
        ({"window_tokens": 0}, "at least 1"),
        ({"start": 90, "window_tokens": 5}, "sees no key"),
        ({"start": -1}, "at least 0"),
    ],
    ids=str,
)
def test_queries_that_see_nothing_are_refused(change: dict[str, int], message: str) -> None:
    q, keys, _ = inputs(Case(2, 9, 4, 2, 6, 8), torch.float32)
    with pytest.raises(ValueError, match=message):
        window_softmax(q, keys, **change)


def test_tensors_that_do_not_fit_are_refused() -> None:
    q, keys, _ = inputs(Case(2, 9, 4, 2, 6, 8), torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        window_softmax(q, Keys(keys.k[..., :4], keys.v), start=8)
    with pytest.raises(ValueError, match="do not fit"):
        window_softmax(q[:, :, :3], keys, start=8)
    with pytest.raises(ValueError, match="scales"):
        window_softmax(q, Keys(keys.k.to(torch.int8), keys.v.to(torch.int8)), start=8)
    with pytest.raises(ValueError, match="scales"):
        window_softmax(q, Keys(keys.k, keys.v, keys.k[..., 0], keys.v[..., 0]), start=8)
