"""MoBA: the paper's rule in float64, as a choice by head of block-sparse softmax.

Letters: B batch, T tokens, H query heads, G KV groups, K head dim.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import at_level, at_torch, each_level, native
from mixers import (
    CUTS,
    FREQUENCIES,
    Array,
    G,
    Inputs,
    K,
    double,
    in_ragged_spans,
    in_spans,
    mixer_inputs,
    turned,
)
from respike.layers.blocks import BlockSoftmax
from respike.layers.softmax import FullSoftmax
from respike.ops.block_rule import BlockRule
from respike.ops.blocks import blocks_definition
from tolerance import assert_close

T, R, SIZE, TOP = 43, 2, 5, 3
MOBA = BlockRule(
    window_tokens=1, sink_tokens=0, block_tokens=SIZE, summary_tokens=SIZE, top_blocks=TOP - 1,
    sink_reach_tokens=256, reach_tokens=None,
)  # fmt: skip
WITH_SINKS = replace(MOBA, sink_tokens=3, window_tokens=8, summary_tokens=1, reach_tokens=19)


def in_words(q: Array, k: Array, v: Array) -> Array:
    """Rotate everything, then for each query head: own block, and the best by the mean key."""
    tokens, heads, _ = q.shape
    out = np.zeros(q.shape)
    for t, h in itertools.product(range(tokens), range(heads)):
        g, own = h // (heads // k.shape[1]), t // SIZE
        query = turned(q[t, h], t)
        keys = np.stack([turned(k[j, g], j) for j in range(t + 1)])
        means = [keys[b * SIZE : (b + 1) * SIZE].mean(0) @ query for b in range(own)]
        picked = {own, *np.argsort(means)[::-1][: TOP - 1].tolist()} if own else {0}
        rows = [j for j in range(t + 1) if j // SIZE in picked]
        weights = np.exp(keys[rows] @ query / math.sqrt(K))
        out[t, h] = (weights / weights.sum()) @ v[rows, g]
    return out


def expected(inputs: Inputs) -> Tensor:
    rows = [in_words(*(double(z[b]) for z in inputs[1:])) for b in range(len(inputs[1]))]
    return torch.from_numpy(np.stack(rows)).float()


def mixer(rule: BlockRule = MOBA, *, dense: bool = False) -> BlockSoftmax:
    return BlockSoftmax(rule, by_head=True, dense_decode=dense)


def test_the_definition_is_the_papers_rule() -> None:
    inputs = mixer_inputs(T, R * G)
    got = blocks_definition(*inputs[1:], FREQUENCIES, MOBA, by_head=True)
    assert_close(got, expected(inputs))
    together = blocks_definition(*inputs[1:], FREQUENCIES, MOBA)
    assert not torch.allclose(together, got, atol=1e-2), "heads agree: nothing is tested"


@pytest.mark.parametrize("rule", [MOBA, WITH_SINKS], ids=["moba", "with sinks"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_the_mixer_is_the_definition(rule: BlockRule, cuts: list[int]) -> None:
    inputs = mixer_inputs(T, R * G)
    wanted = blocks_definition(*inputs[1:], FREQUENCIES, rule, by_head=True)
    for how in (at_torch, None):
        if how is None:
            got, _ = in_spans(mixer(rule), inputs, cuts)
        else:
            with how():
                got, _ = in_spans(mixer(rule), inputs, cuts)
        assert_close(got, wanted)


@native
@each_level
@torch.no_grad()
def test_the_kernel_chooses_by_head_at_every_level(level: int) -> None:
    inputs = mixer_inputs(T, R * G)
    with at_level(level):
        got, _ = in_spans(mixer(), inputs, CUTS["spans of 1 to 13"])
    assert_close(got, expected(inputs))


@torch.no_grad()
def test_all_blocks_are_full_attention() -> None:
    inputs = mixer_inputs(T, R * G)
    full, _ = in_spans(FullSoftmax(), inputs, [])
    got, _ = in_spans(mixer(replace(MOBA, top_blocks=T // SIZE)), inputs, [17])
    assert_close(got, full)
    some, _ = in_spans(mixer(), inputs, [17])
    assert not torch.allclose(some, full, atol=1e-2)


@torch.no_grad()
def test_dense_decoding_sees_everything_and_prefill_does_not() -> None:
    inputs = mixer_inputs(T, R * G)
    full, _ = in_spans(FullSoftmax(), inputs, [])
    sparse, kept = in_spans(mixer(), inputs, [])
    got, state = in_spans(mixer(dense=True), inputs, range(31, T))
    assert_close(got[:, 31:], full[:, 31:])
    assert_close(got[:, :31], sparse[:, :31])
    assert torch.equal(state.tensors(T)["k"], kept.tensors(T)["k"])


@torch.no_grad()
def test_ragged_rows_give_what_each_gives_alone() -> None:
    inputs, calls = mixer_inputs(T, R * G), [[20, 3], [0, 14], [9, 1]]
    got, _ = in_ragged_spans(mixer(), inputs, calls, padding=50.0)
    wanted = expected(inputs)
    for row, total in enumerate((29, 18)):
        assert_close(got[row], wanted[row, :total])


def test_gradients_are_those_of_the_definition() -> None:
    grads = []
    for form in ("definition", "mixer"):
        x, *qkv = mixer_inputs(T, R * G)
        leaves = [z.clone().requires_grad_() for z in qkv]
        if form == "mixer":
            out, _ = in_spans(mixer(), (x, *leaves), [])  # type: ignore[arg-type]
        else:
            out = blocks_definition(*leaves, FREQUENCIES, MOBA, by_head=True)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        grads.append(torch.autograd.grad((out * weight).sum(), leaves))
    for ours, wanted in zip(grads[1], grads[0], strict=True):
        assert_close(ours, wanted)
