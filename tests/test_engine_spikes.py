"""Spiking models in the native engine: the bits of the layers that define them.

Where mixers run in Python the whole model must agree to the bit. (Softmax rounds elsewhere in the
engine, and one rounding can push an input over a neuron's edge; so can silu's, hence the patch.)
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import at_level, at_torch, each_product_level, native
from respike.config import ModelConfig, SpikeBands, SpikeConfig
from respike.errors import UnsupportedError
from respike.layers.linear import PackedLinear
from respike.layers.mlp import GatedMLP
from respike.layers.spikes import SpikeLinear
from respike.models.decoder import Decoder
from respike.models.engine import engine_layers
from respike.models.packing import pack_decoder
from respike.models.spiking import install_spikes, spike_sites, watch_sites
from respike.ops.gated import swiglu
from respike.spiking import Census
from tiny import FAR, GLA, full, linear, model_config, random_decoder, random_tokens, window
from tolerance import assert_close

pytestmark = native

IN_PYTHON = ((linear(0, 1, 2, memory=GLA),), (linear(0, 2, memory=GLA), linear(1, memory=GLA)))
SOFTMAX = ((window(0, 1, 2, reach=16, memory=FAR),), (full(1), window(0, 2, reach=16)))
ROWS = 20
"""More than run by events."""


def spiking(config: ModelConfig, dtype: torch.dtype, **changes: Any) -> tuple[Decoder, Decoder]:
    """A spiking decoder with its engine, and the same without."""
    layers = tuple(
        SpikeBands(qkv=0.6 + 0.1 * i, o=0.5, mlp=0.4, down=0.3 + 0.1 * i)
        for i in range(len(config.layers))
    )
    decoder = random_decoder(config, dtype)
    fields: dict[str, Any] = {"neuron": "dead-zone", "layers": layers}
    install_spikes(decoder, SpikeConfig(**fields | changes))
    fast = pack_decoder(decoder)
    plain = copy.copy(fast)
    plain.engine = None
    return fast, plain


@torch.no_grad()
def outputs(decoder: Decoder, tokens: Tensor, cuts: tuple[int, ...]) -> Tensor:
    state, found, edges = decoder.init_state(len(tokens)), [], (0, *cuts, tokens.shape[1])
    for begin, end in itertools.pairwise(edges):
        out, state = decoder(tokens[:, begin:end], state)
        found.append(out)
    return torch.cat(found, 1)


NEURONS: tuple[dict[str, Any], ...] = (
    {"weights": "int8"},
    {"weights": "int4", "step": "mean", "k": 40.0, "by_channel": True},  # counts beyond int8
    {"weights": "int8", "neuron": "adaptive"},
)


@each_product_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("neuron", NEURONS, ids=str)
def test_events_and_prefill_have_the_bits_of_the_layers(
    level: int, dtype: torch.dtype, neuron: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(mlp: GatedMLP, x: Tensor) -> Tensor:
        return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))

    monkeypatch.setattr(GatedMLP, "forward", forward)
    config = model_config(IN_PYTHON, qkv_bias=True, o_bias=True)
    with at_level(level):
        fast, plain = spiking(config, dtype, **neuron)
        ids = random_tokens(2, ROWS + 3)
        cuts = (ROWS, ROWS + 1)
        assert torch.equal(outputs(fast, ids, cuts), outputs(plain, ids, cuts))


@pytest.mark.parametrize("neuron", NEURONS[:2], ids=str)
def test_the_layers_in_torch_have_them_too(neuron: dict[str, Any]) -> None:
    """Neurons and layers by their definitions, on what the engine's own layers are given."""
    fast, plain = spiking(model_config(SOFTMAX), torch.float32, **neuron)
    seen: list[Tensor] = []
    with torch.no_grad(), watch_sites(plain, lambda _, x: seen.append(x.clone())):
        plain(random_tokens(1, 9))
    for site, x in zip(spike_sites(fast), seen, strict=True):
        for module in site.linears:
            got = module(x)
            with at_torch():
                assert torch.equal(module(x), got)


def test_softmax_in_the_engine_is_as_near_as_floats_allow() -> None:
    fast, plain = spiking(model_config(SOFTMAX), torch.float32, step="mean", k=200.0)
    ids = random_tokens(2, ROWS)
    got, expected = outputs(fast, ids, (7, 8)), outputs(plain, ids, (7, 8))
    assert_close(got, expected, torch.bfloat16)  # a count may move by one at a tie


def test_what_one_input_feeds_lies_side_by_side() -> None:
    fast, _ = spiking(model_config(SOFTMAX), torch.float32)
    for site in spike_sites(fast):
        weights = [m.packed for m in site.linears if isinstance(m, SpikeLinear)]
        tiles = sum(len(w.data) for w in weights)
        for w in weights:
            assert w.strides == (64, 64 * tiles, 64, 64 * tiles)
        ends = [w.data.data_ptr() + 64 * len(w.data) for w in weights]
        assert [w.data.data_ptr() for w in weights[1:]] == ends[:-1]


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    fast, _ = spiking(model_config(SOFTMAX), torch.bfloat16)
    ids, before = random_tokens(1, ROWS + 5), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outputs(fast, ids, (ROWS, ROWS + 1, ROWS + 4)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_who_counts_spikes_sees_them() -> None:
    fast, _ = spiking(model_config(SOFTMAX), torch.float32)
    census = Census(fast)
    with torch.no_grad(), census.watching():
        fast(random_tokens(1, 11))
    assert census.figures()["tokens"] == 11
    assert fast.engine is not None


def test_what_runs_natively_is_counted_so() -> None:
    bands = (SpikeBands(qkv=1, o=1, mlp=1, down=1),) * 2
    natively = {"native": 1, "mixers in Python": 1, "in Python": 0}
    emulated = {"native": 0, "mixers in Python": 0, "in Python": 2}
    for weights, expected in (("int8", natively), ("float", emulated)):
        spikes = SpikeConfig(neuron="dead-zone", weights=weights, layers=bands)
        assert engine_layers(model_config((SOFTMAX[0], IN_PYTHON[0]), spikes=spikes)) == expected


def test_emulated_spikes_are_not_packed_and_the_head_can_be_rounded() -> None:
    decoder = random_decoder(model_config(SOFTMAX))
    bands = SpikeBands(qkv=1, o=1, mlp=1, down=1)
    install_spikes(decoder, SpikeConfig(neuron="dead-zone", weights="float", layers=(bands,) * 2))
    with pytest.raises(UnsupportedError, match="behind neurons"):
        pack_decoder(decoder)
    whole = random_decoder(model_config(SOFTMAX))
    install_spikes(whole, SpikeConfig(neuron="absmax", layers=(bands,) * 2))
    head = pack_decoder(whole, "int4").lm_head
    assert isinstance(head, PackedLinear)
    assert head.kind == "int8"
