"""Counting without weights: against known models, against formulas, against the weights."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respike.account import (
    REPORT_LENGTHS,
    growth_bytes_per_token,
    num_parameters,
    state_bytes,
    state_parts,
)
from respike.checkpoint.families import expected_tensors, mixer_tensors
from respike.config import AnyMemory, DeltaMemory, FarMemory, LinearMixer, ModelConfig
from respike.models.decoder import build_mixer
from respike.recipe import apply_recipe, load_recipe
from tiny import (
    BRAINS,
    DELTA,
    DELTA_TO_2,
    FAR,
    GLA,
    GLA_AS_IS,
    KEEPING,
    MEMORIES,
    SSE,
    SSE_RELEASED,
    TIED,
    blocks,
    full,
    linear,
    model_config,
    random_decoder,
    window,
)

FULL = {
    0: full(0),
    1: full(0),
    2: full(0, 1),
    3: full(0, 1, 2),
    4: full(*range(4)),
    8: full(*range(8)),
}


def known(  # noqa: PLR0913 - one argument for each dimension
    *, family: str, V: int, D: int, F: int, L: int, H: int, G: int, K: int, tied: bool
) -> ModelConfig:
    return model_config(
        ((FULL[G],),) * L,
        family=family,
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        tie_word_embeddings=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


SMOLLM2_135M = known(family="llama", V=49_152, D=576, F=1_536, L=30, H=9, G=3, K=64, tied=True)
KNOWN = {
    "SmolLM2-135M": (SMOLLM2_135M, 134_515_008),
    "Qwen2.5-0.5B": (
        known(family="qwen2", V=151_936, D=896, F=4_864, L=24, H=14, G=2, K=64, tied=True),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        known(family="qwen3", V=151_936, D=1_024, F=3_072, L=28, H=16, G=8, K=128, tied=True),
        596_049_920,
    ),
    "Llama-3.1-8B": (
        known(family="llama", V=128_256, D=4_096, F=14_336, L=32, H=32, G=8, K=128, tied=False),
        8_030_261_248,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_known_models(name: str) -> None:
    config, parameters = KNOWN[name]
    assert num_parameters(config) == parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", ["", "qkv", "qkv o"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameters_are_those_of_the_decoder(tied: bool, bias: str, qk_norm: bool) -> None:
    config = model_config(
        tie_word_embeddings=tied,
        qkv_bias="qkv" in bias,
        o_bias="o" in bias.split(),
        qk_norm=qk_norm,
    )
    assert num_parameters(config) == sum(p.numel() for p in random_decoder(config).parameters())


def test_a_full_state_grows_by_the_keys_and_values_of_each_token() -> None:
    per_token = 2 * 30 * 3 * 64 * 2  # k and v, layers, groups, head dim, bytes
    assert growth_bytes_per_token(SMOLLM2_135M) == per_token == 23_040
    assert growth_bytes_per_token(SMOLLM2_135M, 4) == 2 * per_token
    for tokens in (0, 1, *REPORT_LENGTHS):
        assert state_bytes(SMOLLM2_135M, tokens) == per_token * tokens


def test_a_window_state_is_the_same_at_every_length() -> None:
    config = apply_recipe(load_recipe("window"), SMOLLM2_135M)
    assert growth_bytes_per_token(config) == 0
    for tokens in (1, 1_000, *REPORT_LENGTHS):
        assert state_bytes(config, tokens) == 2 * 30 * 3 * 64 * (256 + 4) * 2


def test_sinks_and_windows_count_for_their_own_groups() -> None:
    layers = (
        (full(1), window(0, 2, tokens=7, sinks=3)),
        (window(2, tokens=5, sinks=0), window(0, 1, tokens=9, sinks=2)),
    )
    slots = 2 * (7 + 3) + 1 * (5 + 0) + 2 * (9 + 2)
    config = model_config(layers)
    assert state_bytes(config, 0, 4) == 2 * 8 * slots * 4
    assert state_bytes(config, 100, 4) == 2 * 8 * (slots + 100) * 4


def test_each_part_of_a_state_counts_its_own_tensors() -> None:
    """Against the tensors of a state, by kind: what grows, windows and sinks, memories."""
    far = window(0, 2, tokens=7, sinks=3).model_copy(update={"memory": FarMemory(features=5)})
    delta = LinearMixer(groups=(1, 2), memory=DeltaMemory(negative_eigenvalues=False))
    config = model_config(((full(1), far), (full(0), delta), (window(0, 1, 2, tokens=9, sinks=2),)))
    softmax, near = 2 * 2 * 8 * 31, 2 * 8 * (2 * (7 + 3) + 3 * (9 + 2))
    memory = 2 * 5 * (8 + 1) + 2 * 8 * 8
    for width in (2, 4):
        expected = {"softmax": softmax * width, "window": near * width, "memory": memory * 4}
        assert state_parts(config, 31, width) == expected
    decoder = random_decoder(config)
    _, state = decoder(torch.arange(31)[None], logits="none")
    held = [t for layer in state.layers for part in layer for t in part.tensors(31).values()]
    assert sum(t.nbytes for t in held) == state_bytes(config, 31, 4)


@given(
    groups=st.lists(st.sampled_from([(), (0,), (1, 2), (0, 1, 2)]), min_size=1, max_size=5),
    tokens=st.integers(0, 10**7),
    width=st.sampled_from([2, 4]),
)
@settings(max_examples=40, deadline=None)
def test_growth_is_the_difference_one_token_makes(
    groups: list[tuple[int, ...]], tokens: int, width: int
) -> None:
    layers = []
    for kept in groups:
        rest = tuple(g for g in range(3) if g not in kept)
        layers.append(tuple(m for m, g in ((full(*kept), kept), (window(*rest), rest)) if g))
    config = model_config(tuple(layers))
    more = state_bytes(config, tokens + 1, width) - state_bytes(config, tokens, width)
    assert more == growth_bytes_per_token(config, width)
    assert (more == 0) == (not config.softmax_groups())


# ---- memories --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "memory", [FAR, KEEPING, GLA, GLA_AS_IS, TIED, DELTA, DELTA_TO_2, SSE, SSE_RELEASED], ids=str
)
@pytest.mark.parametrize("groups", [(0, 1, 2), (1,), (2, 0)], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["beside a window", "alone"])
def test_a_mixers_parameters_are_those_it_is_said_to_have(
    alone: bool, groups: tuple[int, ...], memory: AnyMemory
) -> None:
    if alone and memory.kind == "far":
        return
    part = linear(*groups, memory=memory) if alone else window(*groups, memory=memory)
    config = model_config(num_attention_heads=6)
    mixer = build_mixer(config, part)
    mine = {name: tuple(p.shape) for name, p in mixer.state_dict().items()}
    assert dict(mixer_tensors(config, part)) == mine


@pytest.mark.parametrize("layers", [MEMORIES, BRAINS], ids=["memories", "brains"])
def test_parameters_with_memories_are_those_of_the_decoder(layers: Any) -> None:
    config = model_config(layers, qkv_bias=True)
    named = {n: tuple(p.shape) for n, p in random_decoder(config).named_parameters()}
    assert dict(expected_tensors(config)) == named
    assert num_parameters(config) == sum(math.prod(shape) for shape in named.values())


@pytest.mark.parametrize(
    ("memory", "values"),
    [(FAR, 5 * (8 + 1)), (GLA, 8 * 8), (TIED, 8 * 8), (DELTA, 8 * 8), (SSE, 4 * 8 * 8)],
    ids=["far", "gla", "tied", "delta", "sse"],
)
@pytest.mark.parametrize("width", [2, 4])
def test_a_memory_counts_four_bytes_a_number_whatever_the_dtype(
    memory: AnyMemory, values: int, width: int
) -> None:
    beside = model_config(((window(0, 2, memory=memory), full(1)),))
    for tokens in (0, 1, 10**6):
        cached = 2 * 8 * (2 * (7 + 3) + tokens) * width
        assert state_bytes(beside, tokens, width) == cached + 2 * 4 * values
    assert growth_bytes_per_token(beside, width) == 2 * 8 * width
    if memory.kind != "far":
        alone = model_config(((linear(0, 1, 2, memory=memory),),) * 2)
        assert state_bytes(alone, 10**6, width) == 2 * 3 * 4 * values
        assert growth_bytes_per_token(alone, width) == 0


@pytest.mark.parametrize(("cache", "row"), [("model", 2 * 8 * 2), ("int8", 2 * (8 + 4))])
def test_blocks_count_rows_and_summaries(cache: str, row: int) -> None:
    config = model_config(((blocks(0, 2, cache=cache, block_tokens=6, summary_tokens=3), full(1)),))
    for tokens, summaries in ((0, 0), (2, 0), (3, 1), (100, 33)):
        kept = 2 * (row * tokens + summaries * 8 * 2)
        assert state_bytes(config, tokens) == kept + 2 * 8 * 2 * tokens
    assert growth_bytes_per_token(config) == math.ceil(2 * (row + 16 / 3) + 32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", 30 * 3 * (2 * 64 * 260 * 2 + 64 * 65 * 4)),
        ("spikingbrain-7b", 15 * 3 * 64 * 64 * 4 + 15 * 3 * 2 * 64 * 4096 * 2),
    ],
)
def test_the_constant_recipes_hold_as_much_at_every_length(name: str, expected: int) -> None:
    config = apply_recipe(load_recipe(name), SMOLLM2_135M)
    assert growth_bytes_per_token(config) == 0
    for tokens in (1, *REPORT_LENGTHS):
        assert state_bytes(config, tokens) == expected


def test_spikingbrain_7b_adds_the_parameters_the_official_model_has() -> None:
    """66,176 for each of 14 layers: two factors of the gate, its bias, the norm."""
    source = known(family="qwen2", V=152_064, D=3_584, F=18_944, L=28, H=28, G=4, K=128, tied=False)
    config = apply_recipe(load_recipe("spikingbrain-7b"), source)
    assert num_parameters(config) - num_parameters(source) == 926_464
    assert num_parameters(config) == 7_616_542_976
    kinds = [layer.mixers[0].mixer for layer in config.layers]
    assert kinds == ["linear", "window"] * 14
