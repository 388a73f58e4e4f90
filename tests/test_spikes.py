"""Neurons: closed forms against the loop, thresholds and gradients against independent forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

from kernels import at_level, each_level, native
from respike.layers.spikes import Neuron, SpikedLinear, SpikeLinear
from respike.ops.packed import pack, unpack
from respike.ops.spikes import (
    absmax_step,
    adaptive_step,
    fire,
    fire_definition,
    integrate_and_fire,
    mean_magnitude,
    silenced,
    spike_counts,
    spiking,
)
from tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def fired(x: Tensor, step: Tensor, band: Tensor | None = None) -> Tensor:
    """The loop's count."""
    return sum((s.int() for s in integrate_and_fire(x, step, band)), torch.zeros_like(x).int())


def heavy_tailed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * torch.randn(*shape).mul(1.5).exp()).to(dtype)


@each_dtype
@pytest.mark.parametrize("k", [0.5, 3.0, 20.0])
def test_the_closed_form_counts_what_the_loop_fires(dtype: torch.dtype, k: float) -> None:
    x = heavy_tailed(2, 3, 301, dtype=dtype)
    for step in (adaptive_step(x, k), absmax_step(x)):
        for band in (None, torch.tensor([0.7]), mean_magnitude(x), torch.rand(301)):
            counts = spike_counts(x, step, band)
            assert counts.dtype == torch.int32
            assert torch.equal(counts, fired(x, step, band))
            assert 0 < (counts == 0).float().mean() < 1


@given(
    numerators=st.lists(st.integers(-600, 600), min_size=1, max_size=20),
    step=st.floats(2.0**-20, 2.0**20, width=32),
    ulps=st.integers(-2, 2),
)
@settings(max_examples=60, deadline=None)
def test_ties_and_their_neighbours_are_counted_exactly(
    numerators: list[int], step: float, ulps: int
) -> None:
    x = (torch.tensor(numerators).double() / 2 * step).float()  # halves of the threshold
    for _ in range(abs(ulps)):
        x = torch.nextafter(x, torch.full_like(x, torch.inf if ulps > 0 else -torch.inf))
    threshold = torch.tensor([step])
    assert torch.equal(spike_counts(x, threshold), fired(x, threshold))


def test_halves_round_away_from_zero() -> None:
    x = torch.tensor([0.5, -0.5, 1.5, -2.5, 0.49, 0.0])
    assert spike_counts(x, torch.ones(1)).tolist() == [1, -1, 2, -3, 0, 0]


def test_thresholds_are_those_of_the_papers() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-254.0, 1.0, 1.0, 1.0]])
    assert_close(adaptive_step(x, 3.0), torch.tensor([[0.5], [1e-5], [257 / 12]]))
    counts = spike_counts(x, adaptive_step(x, 3.0))
    assert counts.tolist() == [[2, -4, 6, 0], [0, 0, 0, 0], [-12, 0, 0, 0]]
    assert spike_counts(x, absmax_step(x)).tolist()[0] == [42, -85, 127, 0]
    assert spike_counts(x, absmax_step(x)).tolist()[1:] == [[0, 0, 0, 0], [-127, 1, 1, 1]]


@each_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20])
def test_absmax_counts_fill_eight_bits_at_any_scale(dtype: torch.dtype, scale: float) -> None:
    x = (torch.randn(6, 97) * scale).to(dtype)
    counts = spike_counts(x, absmax_step(x))
    assert (counts.abs().amax(-1) == 127).all()
    gap = (counts.double() * absmax_step(x).double() - x.double()).abs()
    assert (gap <= absmax_step(x) * 0.50001).all()


def test_one_input_alone_counts_beyond_sixteen_bits() -> None:
    x = torch.zeros(1, 11008)
    x[0, 5] = -2.0
    counts = spike_counts(x, adaptive_step(x, 3.0))
    assert counts[0, 5] == -3 * 11008
    assert counts.count_nonzero() == 1


def test_what_is_not_a_number_stays_in_its_row() -> None:
    x = torch.ones(3, 4)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    for step in (adaptive_step(x, 3.0), absmax_step(x)):
        values = spike_counts(x, step) * step
        assert values[0].isnan().all()
        assert values[1].isnan().any() or values[1].isinf().any()
        assert values[2].isfinite().all()
    assert silenced(x, torch.tensor([2.0]))[0].isnan().tolist() == [False, True, False, False]


def test_the_mean_is_one_whatever_the_order() -> None:
    for inputs in (1, 2, 3, 33, 577):
        x = heavy_tailed(4, 3, inputs)
        assert_close(mean_magnitude(x), x.double().abs().mean(-1, keepdim=True).float())
        assert torch.equal(mean_magnitude(x)[1, 2], mean_magnitude(x[1, 2]))


@native
@each_level
@each_dtype
@pytest.mark.parametrize("inputs", [1, 2, 3, 33, 64, 301])
def test_kernels_fire_what_the_definition_does(level: int, dtype: torch.dtype, inputs: int) -> None:
    x = heavy_tailed(7, inputs, dtype=dtype)
    x[1], x[2, 0], x[3, 0] = 0, torch.nan, torch.inf
    for step in ("mean", "absmax"):
        for band in (None, torch.tensor([0.6]), torch.rand(inputs)):
            counts, threshold = fire_definition(x, step, 3.3, band)
            with at_level(level):
                got, steps = fire(x, step, 3.3, band)
            assert torch.equal(got, counts)
            assert torch.equal(steps.isnan(), threshold.isnan())
            assert torch.equal(steps.nan_to_num(), threshold.nan_to_num())


def test_bands_that_fit_no_input_are_refused() -> None:
    unchecked = getattr(fire, "__wrapped__", fire)
    for band in (torch.rand(3), torch.rand(1, 4), torch.rand(4).double()):
        with pytest.raises((ValueError, RuntimeError)):
            unchecked(torch.randn(2, 4), "mean", 3.0, band)


@each_dtype
def test_teal_keeps_what_is_large_as_it_is(dtype: torch.dtype) -> None:
    x = torch.randn(50, 40).to(dtype)
    got = silenced(x, torch.tensor([0.6]))
    kept = x.abs() >= torch.tensor(0.6)
    assert torch.equal(got[kept], x[kept])
    assert not got[~kept].any()


# ---- gradients


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(5, 33, requires_grad=True)
    weight = torch.randn(5, 33)
    (weight * spiking(x, adaptive_step(x.detach(), 3.0), torch.tensor([0.5]))).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("by_channel", [False, True])
def test_the_bands_gradient_is_the_triangles(by_channel: bool) -> None:
    x = 3 * torch.randn(40, 6)
    band = (torch.rand(6 if by_channel else 1) + 0.5).requires_grad_()
    step, above = torch.full((40, 1), 0.01), torch.randn(40, 6)
    (above * spiking(x, step, band)).sum().backward()
    expected = torch.zeros(6)
    for t in range(40):
        for i in range(6):
            b = band[i if by_channel else 0].item()
            height = max(0.0, 1 - abs(abs(x[t, i].item()) - b) / b) / b
            expected[i] -= above[t, i] * x[t, i] * height
    assert band.grad is not None
    assert_close(band.grad, expected if by_channel else expected.sum(0, keepdim=True))


def test_the_surrogate_agrees_with_the_loss_it_stands_for() -> None:
    # Over inputs spread evenly, the mean of the surrogate is the true derivative of the mean.
    x = torch.linspace(-4, 4, 160_001)[:, None]
    step, wide = torch.full((len(x), 1), 1e-4), 1e-3

    def total(b: float) -> float:
        return float((spiking(x, step, torch.tensor([b])) * x.sign()).double().mean())

    band = torch.tensor([1.3], requires_grad=True)
    (spiking(x, step, band) * x.sign()).mean().backward()
    slope = (total(1.3 + wide) - total(1.3 - wide)) / (2 * wide)
    assert band.grad is not None
    # The triangle averages |x| over band * (1 +- 1), not at the band: equal, |x| being linear.
    assert band.grad.item() == pytest.approx(slope, rel=0.01)


def test_a_learned_band_silences_what_does_not_matter() -> None:
    torch.manual_seed(1)
    neuron = Neuron("absmax", band=torch.full((8,), 0.5))
    optimiser = torch.optim.Adam(neuron.parameters(), lr=0.1)
    keep = torch.tensor([1.0] * 4 + [0.0] * 4)
    for _ in range(20):
        x = torch.randn(256, 8)
        fires = neuron(x)
        loss = ((fires - x) * keep).square().mean() + 0.02 * fires.abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    counts, _ = neuron.fire(torch.randn(512, 8))
    silent = (counts == 0).float().mean(0)
    assert silent[4:].min() > silent[:4].max() + 0.3


# ---- layers


@pytest.mark.parametrize("step", ["mean", "absmax"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_packed_layer_is_the_emulated_one(step: str, kind: str, rows: int) -> None:
    plain = nn.Linear(70, 45)
    packed = pack(plain.weight.detach(), kind)
    plain.weight = nn.Parameter(unpack(packed))
    neuron = Neuron(step, 3.0, torch.rand(70))  # type: ignore[arg-type]
    x = heavy_tailed(2, rows, 70)
    got = SpikeLinear(packed, neuron, plain.bias)(x)
    assert_close(got, SpikedLinear(plain, neuron)(x).detach())
    counts, threshold = neuron.fire(x)
    assert_close(got, linear(counts * threshold, plain.weight, plain.bias).detach())
    assert SpikeLinear(packed, neuron)(x.bfloat16()).dtype == torch.bfloat16


def test_a_neuron_scales_its_band_by_the_token() -> None:
    neuron = Neuron("absmax", band=torch.tensor([1.0]))
    x = torch.randn(30, 64)
    counts, _ = neuron.fire(x)
    assert torch.equal(counts == 0, x.abs() < x.abs().mean(-1, keepdim=True))
    assert torch.equal(neuron.fire(1024 * x)[0], counts)


def test_the_rival_has_no_counts() -> None:
    neuron = Neuron("none", band=torch.tensor([0.5]))
    with pytest.raises(ValueError, match="no spike counts"):
        neuron.fire(torch.randn(2, 3))
    with pytest.raises(ValueError, match="neither threshold nor band"):
        Neuron("none")
