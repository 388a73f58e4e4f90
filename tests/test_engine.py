"""The native engine against the decoder's own forward, which defines it.

Letters: B sequences, T tokens, D width.
"""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import at_level, at_torch, each_product_level, native
from respike.config import FarMemory, ModelConfig
from respike.errors import BackendError, UnsupportedError
from respike.layers.far import FarSoftmax
from respike.layers.linear import PackedLinear
from respike.layers.softmax import FullSoftmax
from respike.models.ablation import without
from respike.models.decoder import Decoder
from respike.models.engine import Engine
from respike.models.packing import pack_decoder
from respike.models.state import DecoderState
from tiny import (
    BLOCKS,
    BRAINS,
    FAR,
    KEEPING,
    MEMORIES,
    MIXED,
    full,
    model_config,
    random_decoder,
    random_tokens,
    window,
)
from tolerance import TOLERANCES, assert_close, differences

pytestmark = native

B, T = 3, 70
FARS = (
    (window(0, 1, 2, reach=16, memory=FAR),),
    (window(1, tokens=11, sinks=0, memory=FAR), full(0), window(2, reach=16)),
    (full(0, 1, 2),),
)
"""Everything the engine mixes itself, far memories of all groups and of one."""
CONFIGS = {
    "softmax": model_config(MIXED),
    "far memories": model_config(FARS),
    "kept tokens": model_config(
        ((window(0, 1, 2, reach=40, memory=KEEPING),), (full(1), window(0, 2, memory=KEEPING)))
    ),
    "kept tokens, wide": model_config(
        ((window(0, 1, 2, reach=66, memory=FarMemory(features=5, kept_tokens=37)),),),
        num_attention_heads=15,
        head_dim=72,
    ),
    "kept tokens, a head each": model_config(
        ((window(0, 1, 2, memory=FarMemory(features=5, kept_tokens=20)),),), num_attention_heads=3
    ),
    "kept tokens, many": model_config(
        ((window(0, 1, 2, reach=180, memory=FarMemory(features=5, kept_tokens=70)),),)
    ),
    "kept tokens, other numbers in a layer": model_config(
        (
            (
                full(1),
                window(0, reach=180, memory=FarMemory(features=5, kept_tokens=70)),
                window(2, memory=KEEPING),
            ),
        )
    ),
    "mixers in Python": model_config(MEMORIES),
    "blocks": model_config(BLOCKS),
    "layers in Python": model_config(BRAINS, rms_norm_eps=1e-2),
    "biases": model_config(FARS, qkv_bias=True, o_bias=True, tie_word_embeddings=False),
    "norms of q and k": model_config(FARS, qk_norm=True),
}


def pair(
    config: ModelConfig, dtype: torch.dtype = torch.float32, weights: str = "stored"
) -> tuple[Decoder, Decoder]:
    """A packed decoder with its engine, and the same weights without."""
    return packed(random_decoder(config, dtype), weights)


def packed(decoder: Decoder, weights: str = "stored") -> tuple[Decoder, Decoder]:
    """The decoder, packed in place, and as it is without its engine."""
    fast = pack_decoder(decoder, weights)
    plain = copy.copy(fast)
    plain.engine = None
    assert fast.engine is not None
    return fast, plain


@torch.no_grad()
def run(
    decoder: Decoder, tokens: Tensor, cuts: tuple[int, ...] = (), lengths: Tensor | None = None
) -> tuple[Tensor, DecoderState]:
    edges = [0, *(c for c in cuts if 0 < c < tokens.shape[1]), tokens.shape[1]]
    state, outputs = decoder.init_state(len(tokens)), []
    for begin, end in itertools.pairwise(edges):
        out, state = decoder(tokens[:, begin:end], state, lengths=lengths)
        outputs.append(out)
    return torch.cat(outputs, 1), state


def assert_same_state(got: DecoderState, expected: DecoderState) -> None:
    assert torch.equal(got.tokens_seen, expected.tokens_seen)
    for mine, theirs in zip(got.layers, expected.layers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            n = got.num_tokens
            for (name, x), y in zip(a.tensors(n).items(), b.tensors(n).values(), strict=True):
                if not y.is_floating_point():
                    assert torch.equal(x, y), name
                elif y.any():
                    assert_close(x, y)
                else:
                    assert not x.any(), name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4, 17, 18, 40), tuple(range(70))], ids=str)
def test_it_computes_what_the_decoder_does(name: str, cuts: tuple[int, ...]) -> None:
    fast, plain = pair(CONFIGS[name])
    ids = random_tokens(B, T)
    got, state = run(fast, ids, cuts)
    expected, plain_state = run(plain, ids)
    assert_close(got, expected)
    assert_same_state(state, plain_state)


@given(
    calls=st.lists(
        st.lists(st.integers(0, 30), min_size=B, max_size=B).filter(any), min_size=1, max_size=4
    ),
    name=st.sampled_from(
        ["far memories", "kept tokens", "softmax", "blocks", "mixers in Python", "layers in Python"]
    ),
)
@settings(max_examples=20, deadline=None)
def test_rows_of_unlike_length_go_on_in_either(calls: list[list[int]], name: str) -> None:
    """Every call is ragged, and the engine and the decoder take turns with one state."""
    fast, plain = pair(CONFIGS[name])
    mixed, whole = fast.init_state(B), plain.init_state(B)
    with torch.no_grad():
        for turn, counts in enumerate(calls):
            lengths = torch.tensor(counts)
            ids = random_tokens(B, max(counts), seed=turn)
            taker = fast if turn % 2 == 0 else plain
            got, mixed = taker(ids, mixed, lengths=lengths, logits="last")
            expected, whole = plain(ids, whole, lengths=lengths, logits="last")
            assert_close(got, expected)
    assert_same_state(mixed, whole)


@each_product_level
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("far memories", torch.float32),
        ("far memories", torch.bfloat16),
        ("kept tokens", torch.float32),
        ("kept tokens, wide", torch.float32),
        ("kept tokens, wide", torch.bfloat16),
        ("kept tokens, a head each", torch.float32),
        ("kept tokens, many", torch.float32),
        ("kept tokens, many", torch.bfloat16),
    ],
    ids=str,
)
def test_every_level_computes_the_same(level: int, name: str, dtype: torch.dtype) -> None:
    """In bf16 both round, at other places: each may be as far from float32 as the other is."""
    many = name == "kept tokens, many"  # whole blocks of them need more steps than there are kept
    config, ids = CONFIGS[name], random_tokens(B, 3 * T if many else T)
    rounded = random_decoder(config, dtype)
    for name, weight in rounded.named_parameters():
        if dtype == torch.bfloat16 and name.endswith("keep_weight"):
            weight.zero_()  # of rounded keys others may be worth more; age alone is exact
    truth = run(copy.deepcopy(rounded).float(), ids)[0]
    with at_level(level):
        fast, plain = packed(rounded)
        got = differences(run(fast, ids, (64, 65, 66, 160, 161))[0], truth)
        allowed = differences(run(plain, ids)[0], truth)
    slack = 1.5 if dtype == torch.bfloat16 else 0
    assert got.rms <= 1e-5 + slack * allowed.rms
    assert got.max <= 5e-5 + slack * allowed.max


@pytest.mark.parametrize("name", ["far memories", "kept tokens, many", "blocks"])
def test_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    fast, _ = pair(CONFIGS[name], torch.bfloat16)
    ids, before = random_tokens(B, 200), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(fast, ids, (150, 151, 152))[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_threads_of_python_take_turns() -> None:
    fast, _ = pair(CONFIGS["far memories"])
    ids = [random_tokens(1, T, seed=seed) for seed in range(6)]
    alone = [run(fast, each, (40, 41))[0] for each in ids]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda each: run(fast, each, (40, 41))[0], ids))
    assert all(map(torch.equal, together, alone))


def test_it_notices_when_mixers_change() -> None:
    fast, plain = pair(CONFIGS["far memories"])
    ids = random_tokens(1, T)
    whole = run(fast, ids)[0]
    with without(fast, "memory"):
        cut = run(fast, ids)[0]
        assert_close(cut, run(plain, ids)[0])
    assert not torch.equal(cut, whole)
    assert torch.equal(run(fast, ids)[0], whole)
    fast.layers[0].self_attn.set_mixers([([0, 1, 2], FullSoftmax())])
    assert_close(run(fast, ids)[0], run(plain, ids)[0])


def test_a_shut_memory_is_not_kept() -> None:
    fast, plain = pair(CONFIGS["far memories"])
    for module in fast.modules():
        if isinstance(module, FarSoftmax):
            module.beta.fill_(-torch.inf)
    fast.engine = Engine(fast.layers, fast.frequencies)
    ids = random_tokens(B, T)
    got, state = run(fast, ids, (30, 31))
    expected, plain_state = run(plain, ids)
    assert_close(got, expected)
    assert_same_state(state, plain_state)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_weights_are_those_of_the_packed_layers(weights: str) -> None:
    """Against the layers' definitions in torch.

    A rounded input may fall on the other side of a half there, which moves an output by a step of
    one product: as bfloat16 may, not as float32.
    """
    fast, plain = pair(CONFIGS["biases"], weights=weights)
    for name, module in fast.named_modules():
        if isinstance(module, PackedLinear):
            assert module.kind == ("int8" if name == "lm_head" else weights)
            assert module.activations == "int8"
    ids = random_tokens(B, T)
    got = run(fast, ids)[0]
    with at_torch():
        expected = run(plain, ids)[0]
    assert differences(got, expected).rms < TOLERANCES[torch.bfloat16].rms
    assert differences(got, run(random_decoder(CONFIGS["biases"]), ids)[0]).rms > 1e-2


@pytest.mark.usefixtures("poison")
def test_no_memory_is_read_before_it_is_written() -> None:
    fast, _ = pair(CONFIGS["far memories"])
    out, state = run(fast, random_tokens(B, 30), lengths=torch.tensor([30, 4, 17]))
    assert not run(fast, random_tokens(B, 30), (5, 6))[0].isnan().any()
    assert not out[0].isnan().any()
    with torch.no_grad():
        assert not fast(random_tokens(B, 9), state)[0].isnan().any()


def test_gradients_take_the_way_that_has_them() -> None:
    fast, _ = pair(CONFIGS["softmax"])
    ids = random_tokens(1, 12)
    x = fast.model.embed_tokens(ids).requires_grad_()
    state = fast.init_state(1)
    out = fast.layers[0](x, fast.span(state, 12), state.layers[0])[0]
    assert out.requires_grad


def test_refusals() -> None:
    config = CONFIGS["softmax"]
    with pytest.raises(UnsupportedError, match="int3"):
        pack_decoder(random_decoder(config), "int3")
    with pytest.raises(BackendError, match="float16"):
        pack_decoder(random_decoder(config, torch.float16))
    fast, _ = pair(config)
    with pytest.raises(UnsupportedError, match="packed already"):
        pack_decoder(fast)
    state = fast.init_state(1)
    strided = state.layers[2][0]
    strided.k = strided.k.transpose(2, 3).contiguous().transpose(2, 3)
    with torch.no_grad(), pytest.raises(ValueError, match="not in one piece"):
        fast(random_tokens(1, 3), state)
