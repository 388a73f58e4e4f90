"""From weights to a decoder: layer by layer, with the bits of the whole packed at once."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import native
from respike.account import loaded_bytes
from respike.bench.shapes import random_checkpoint
from respike.config import ModelConfig, SpikeBands, SpikeConfig
from respike.errors import BackendError, UnsupportedError
from respike.layers.linear import PackedLinear
from respike.loading import fast_decoder, load_decoder
from respike.models.packing import pack_decoder
from respike.recipe import load_recipe
from tiny import (
    BRAINS,
    FAR,
    MEMORIES,
    V,
    full,
    model_config,
    random_decoder,
    random_tokens,
    window,
)

FARS = ((window(0, 1, 2, reach=16, memory=FAR),), (full(1), window(0, 2, reach=16)))
BANDS = tuple(SpikeBands(qkv=0.6, o=0.5, mlp=0.4, down=0.3 + 0.1 * i) for i in range(2))
INT4_SPIKES = SpikeConfig(neuron="dead-zone", layers=BANDS, weights="int4", by_channel=True)
CONFIGS = {
    "tied": model_config(FARS, tie_word_embeddings=True),
    "a head of its own, biases": model_config(
        FARS, tie_word_embeddings=False, qkv_bias=True, o_bias=True
    ),
    "mixers in Python": model_config(MEMORIES),
    "experts and attention beside": model_config(BRAINS, rms_norm_eps=1e-2),
    "spikes": model_config(FARS, spikes=INT4_SPIKES),
}


class Fixed:
    """Random weights that are let go of when nothing but us knows them.

    `alive` has those that still exist, by name.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.stored_dtype = config, dtype
        self._like = random_decoder(config.model_copy(update={"spikes": None})).state_dict()
        self._arrays: dict[str, weakref.ref[Any]] = {}
        self.most_alive: set[str] = set()

    @property
    def alive(self) -> set[str]:
        return {name for name, array in self._arrays.items() if array() is not None}

    def read(self, name: str) -> Tensor:
        array = np.array(self._like[name].numpy())
        self._arrays[name] = weakref.ref(array)
        self.most_alive = max(self.most_alive, self.alive, key=len)
        return torch.from_numpy(array)


def logits(decoder: Any) -> Tensor:
    with torch.no_grad():
        found, state = decoder(random_tokens(2, 37))
        return torch.cat((found, decoder(random_tokens(2, 1, seed=1), state)[0]), 1)


@native
@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_layer_by_layer_it_has_the_bits_of_the_whole(name: str, weights: str) -> None:
    source = Fixed(CONFIGS[name], torch.bfloat16)
    fast, whole = fast_decoder(source, weights=weights), pack_decoder(load_decoder(source), weights)
    assert fast.engine is not None
    assert torch.equal(logits(fast), logits(whole))
    assert not any(p.requires_grad or p.is_meta for p in fast.parameters())
    assert not any(module.training for module in fast.modules())
    mine, theirs = (
        {n: m for n, m in d.named_modules() if isinstance(m, PackedLinear)} for d in (fast, whole)
    )
    assert mine.keys() == theirs.keys()
    order = sorted(mine, key=lambda n: mine[n].data.data_ptr())
    assert order == sorted(theirs, key=lambda n: theirs[n].data.data_ptr())
    assert order[0] == "lm_head"
    assert len({m.data.untyped_storage().data_ptr() for m in mine.values()}) == 1


@native
def test_no_more_than_a_layer_is_there_unpacked() -> None:
    config = model_config((FARS[0],) * 5, tie_word_embeddings=False)
    source = Fixed(config)
    fast = fast_decoder(source, weights="int8")
    kept = {n for n, _ in fast.named_parameters()}
    assert source.alive <= kept
    layers = {n.split(".")[2] for n in source.most_alive - kept if n.startswith("model.layers.")}
    assert len(layers) == 1
    everything = Fixed(config)
    load_decoder(everything)
    assert len(source.most_alive) < len(everything.most_alive) - 20


def test_progress_counts_every_tensor_once() -> None:
    told: list[tuple[int, int]] = []
    decoder = load_decoder(Fixed(CONFIGS["tied"]), progress=lambda *step: told.append(step))
    total = len(decoder.state_dict())
    assert told == [(i, total) for i in range(1, total + 1)]


def test_weights_that_cannot_be_rounded_are_refused_before_any_is_read() -> None:
    emulated = SpikeConfig(neuron="dead-zone", layers=BANDS, weights="float")
    for config, options, error, message in (
        (CONFIGS["tied"], {"weights": "int8", "dtype": "f16"}, BackendError, "float16"),
        (CONFIGS["tied"], {"weights": "int3"}, UnsupportedError, "int3"),
        (model_config(FARS, spikes=emulated), {"weights": "int8"}, UnsupportedError, "emulated"),
    ):
        source = Fixed(config)
        with pytest.raises(error, match=message):
            fast_decoder(source, **options)
        assert source.most_alive == set()


def test_a_name_the_decoder_does_not_know_is_no_weight_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extra = [*((n, tuple(t.shape)) for n, t in random_decoder(CONFIGS["tied"]).named_parameters())]
    monkeypatch.setattr("respike.loading.expected_tensors", lambda _: extra[1:])
    with pytest.raises(ValueError, match=r"Decoder: .*embed_tokens"):
        load_decoder(Fixed(CONFIGS["tied"]))
    assert extra[0][1] == (V, CONFIGS["tied"].hidden_size)


@native
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
def test_what_it_takes_in_memory_can_be_told_before(weights: str, tied: bool) -> None:
    config = model_config(
        FARS, tie_word_embeddings=tied, vocab_size=1024, hidden_size=256, intermediate_size=640
    )
    source = random_checkpoint(config, load_recipe("identity"))
    decoder = fast_decoder(source, weights=weights)
    packed = [m.packed.nbytes for m in decoder.modules() if isinstance(m, PackedLinear)]
    taken = sum(packed) + decoder.embedding.nbytes
    assert loaded_bytes(config, weights) == pytest.approx(taken, rel=0.04)
