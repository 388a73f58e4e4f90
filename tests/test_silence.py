"""Training towards silence: the surrogate by hand, the share against the census, a short run."""

import pytest
import torch
from torch import Tensor

from respike.config import SpikeBands, SpikeConfig
from respike.errors import UnsupportedError
from respike.models.decoder import Decoder
from respike.models.silence import config_of, silence_loss, trainable_bands, watch_firing
from respike.models.spiking import SITES, install_spikes, spike_sites
from respike.ops import spikes
from respike.ops.spikes import (
    Step,
    absmax_step,
    adaptive_step,
    firing,
    mean_magnitude,
    spike_counts,
    spiking,
    spiking_seen,
)
from respike.spiking import Census
from tiny import full, model_config, random_decoder, random_tokens
from tolerance import assert_close

LAYERS = ((full(0, 1, 2),), (full(0, 1, 2),))


def spiking_decoder(**changes: object) -> tuple[Decoder, SpikeConfig]:
    decoder = random_decoder(model_config(LAYERS))
    layers = tuple(SpikeBands(qkv=0.3, o=0.4, mlp=0.5, down=0.2 + 0.1 * i) for i in range(2))
    config = SpikeConfig.model_validate(
        {"neuron": "dead-zone", "weights": "float", "layers": layers} | changes
    )
    install_spikes(decoder, config)
    return decoder, config


@pytest.mark.parametrize("banded", [True, False])
def test_firing_is_a_count_that_is_not_zero(banded: bool) -> None:
    x = 3 * torch.randn(7, 50)
    step, band = adaptive_step(x, 0.7), torch.rand(50) * 4 if banded else None
    assert torch.equal(firing(x, step, band), (spike_counts(x, step, band) != 0).float())


def test_the_gradients_of_firing_are_the_triangles() -> None:
    x = (3 * torch.randn(9, 6)).requires_grad_()
    band, step = (torch.rand(6) + 0.5).requires_grad_(), torch.full((9, 1), 1.6)
    above = torch.randn(9, 6)
    (above * firing(x, step, band)).sum().backward()
    by_x, by_band = torch.zeros(9, 6), torch.zeros(6)
    for t in range(9):
        for i in range(6):
            value, limit = float(x[t, i].detach()), float(band[i].detach())
            edge = max(limit, 0.8)
            height = max(0.0, 1 - abs(abs(value) - edge) / edge) / edge
            by_x[t, i] = above[t, i] * height * (1 if value > 0 else -1)
            by_band[i] -= above[t, i] * height * (limit > 0.8)
    assert x.grad is not None
    assert band.grad is not None
    assert_close(x.grad, by_x)
    assert_close(band.grad, by_band)


@pytest.mark.parametrize("step", ["mean", "absmax"])
@pytest.mark.parametrize("bands", [None, (0.4,), (0.01,), "channels"], ids=str)
def test_one_pass_gives_values_firing_and_the_gradients_of_both(
    step: Step, bands: tuple[float, ...] | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands above half a threshold, below it (0.01), and on both sides; blocks of two rows."""
    monkeypatch.setattr(spikes, "BLOCK_NUMBERS", 14)
    x = (3 * torch.randn(5, 3, 7)).requires_grad_()
    above, price = torch.randn(5, 3, 7), 0.7
    band = None if bands is None else torch.rand(7) if bands == "channels" else torch.tensor(bands)
    found, expected = ([x] if band is None else [x, band.requires_grad_()] for _ in range(2))
    out, fired = spiking_seen(x, step, 4.0, band)
    found = torch.autograd.grad((above * out).sum() + price * fired, found)
    size = x.detach()
    threshold = adaptive_step(size, 4.0) if step == "mean" else absmax_step(size)
    limit = None if band is None else band * mean_magnitude(size)
    plain, fires = spiking(x, threshold, limit), firing(x, threshold, limit)
    expected = torch.autograd.grad((above * plain).sum() + price * fires.sum(), expected)
    assert torch.equal(out, plain)
    assert float(fired.detach()) == float(fires.detach().sum())
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


def test_layers_behind_the_same_neurons_share_what_these_fire_and_forget_it() -> None:
    decoder, _ = spiking_decoder()
    calls: list[Tensor] = []
    neurons = [site.neuron for site in spike_sites(decoder) if site.neuron is not None]
    for neuron in neurons:
        neuron.register_forward_hook(lambda _module, _inputs, out: calls.append(out))
    with watch_firing(decoder):
        shared = decoder(random_tokens(1, 5))[0]
    assert len(calls) == 2 * 7
    assert len(set(map(id, calls))) == 2 * len(SITES)
    assert all(neuron._held is None and not neuron.remembers for neuron in neurons)
    assert_close(decoder(random_tokens(1, 5))[0], shared)


def test_what_is_touched_is_what_the_census_does_not_skip() -> None:
    decoder, _ = spiking_decoder()
    census, tokens = Census(decoder), random_tokens(2, 15)
    with torch.no_grad(), census.watching(), watch_firing(decoder) as seen:
        decoder(tokens)
    skipped = census.figures()["total"]["skipped_frac"]
    assert 0.05 < skipped < 0.95
    assert float(seen.touched_frac()) == pytest.approx(1 - skipped, rel=1e-5)


def test_a_decoder_trains_through_its_neurons_to_silence() -> None:
    """The bands alone, then with the weights: nearer the goal, and nearer the original."""
    decoder, config = spiking_decoder()
    original = random_decoder(model_config(LAYERS))
    tokens = random_tokens(2, 24)
    target = original(tokens)[0].log_softmax(-1)
    bands = trainable_bands(decoder)
    assert len(bands) == len(SITES) * 2
    weights = [p for n, p in decoder.named_parameters() if n.endswith("_proj.weight")]
    for weight in weights:
        weight.requires_grad_(True)
    steps = torch.optim.Adam([{"params": bands, "lr": 0.02}, {"params": weights, "lr": 2e-3}])

    def run() -> tuple[Tensor, Tensor]:
        with watch_firing(decoder) as seen:
            logits, _ = decoder(tokens)
        log_q = logits.log_softmax(-1)
        return (target.exp() * (target - log_q)).sum(-1).mean(), seen.touched_frac()

    history = []
    for _ in range(60):
        kl, touched = run()
        history.append((float(kl.detach()), float(touched.detach())))
        steps.zero_grad()
        (kl + 5 * silence_loss(touched, silent_frac=0.5)).backward()
        steps.step()
    assert history[0][1] > 0.6
    assert history[-1][1] < 0.52
    assert history[-1][0] < 1.5 * history[0][0]
    trained = config_of(decoder, config)
    again = random_decoder(model_config(LAYERS))
    for name, parameter in again.named_parameters():
        parameter.data.copy_(decoder.get_parameter(name))
    install_spikes(again, trained)
    with torch.no_grad():
        assert_close(again(tokens)[0], decoder(tokens)[0])


def test_no_more_is_asked_once_the_goal_is_reached() -> None:
    assert float(silence_loss(torch.tensor(0.4), 0.5)) == 0.0
    assert float(silence_loss(torch.tensor(0.7), 0.5)) == pytest.approx(0.2)


def test_a_soft_goal_has_a_slope_that_rises_to_one() -> None:
    touched = torch.tensor([0.45, 0.55, 0.6, 0.8], requires_grad=True)
    silence_loss(touched, 0.5, width=0.1).sum().backward()
    assert touched.grad is not None
    assert_close(touched.grad, torch.tensor([0.0, 0.5, 1.0, 1.0]))


def test_what_cannot_train_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="by channel"):
        trainable_bands(spiking_decoder(by_channel=True)[0])
    with pytest.raises(UnsupportedError, match="have none"):
        trainable_bands(spiking_decoder(neuron="absmax")[0])
    with pytest.raises(UnsupportedError, match="integer weights"):
        trainable_bands(spiking_decoder(weights="int8")[0])
    decoder = random_decoder(model_config(LAYERS))
    with watch_firing(decoder) as seen:
        decoder(random_tokens(1, 3))
    with pytest.raises(ValueError, match="no neuron was watched"):
        seen.touched_frac()
    assert all(site.neuron is None for site in spike_sites(decoder))
