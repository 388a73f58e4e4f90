"""Spiking neurons: from the numbers that enter a linear layer to signed integer spike counts.

Letters: I inputs of the layer (channels); any leading dimensions (tokens).
Sources: Pan et al., "SpikingBrain", arXiv:2509.05276, section 3 (adaptive threshold, soft reset,
straight-through gradient); the same authors' SpikingBrain2.0 (absmax INT8); the dead zone is ours.

A neuron charges with an input, and fires one spike of the input's sign each time step, which takes
one threshold off its charge (soft reset), as long as at least half a threshold is left. What it has
fired in the end is the input in units of the threshold, rounded, halves away from zero: the closed
form. (The released code rounds halves to even; ties are rare.) An input inside the neuron's silent
band does not fire at all::

    adaptive    threshold mean|x| / k of the token; silent below half a threshold
    absmax      threshold max|x| / 127 of the token: counts of 8 bits
    dead zone   either threshold, and nothing fires below `band`
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

from respike.ops import backends

LEAST_ADAPTIVE_STEP = 1e-5
"""Smallest adaptive threshold, as released; so a token of zeros stays silent."""

ABSMAX_COUNT = 127
"""Largest count of the absmax neuron."""


Step = Literal["mean", "absmax"]
"""Where a threshold comes from."""

_KERNEL = {torch.float32: "fire_f32", torch.bfloat16: "fire_bf16"}


def mean_magnitude(x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows 1"]:
    """mean|x| of each token, float32, added up in an order that every implementation keeps.

    Magnitudes are padded with zeros to a power of two; then the second half is added to the first
    until one number is left.
    """
    inputs = x.shape[-1]
    sums = pad(x.float().abs(), (0, (1 << (inputs - 1).bit_length()) - inputs))
    while sums.shape[-1] > 1:
        first, second = sums.chunk(2, -1)
        sums = first + second
    return sums / inputs


def adaptive_step(x: Float[Tensor, "*rows I"], k: float) -> Float[Tensor, "*rows 1"]:
    """SpikingBrain-1.0's threshold, mean|x| / k of each token, float32.

    The released code also limits it to at most 1e4, which only tokens of a mean above 1e4 k meet.
    """
    return (mean_magnitude(x) / k).clamp(min=LEAST_ADAPTIVE_STEP)


def absmax_step(x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows 1"]:
    """SpikingBrain-2.0's threshold, max|x| / 127 of each token, float32; never zero."""
    largest = x.float().abs().amax(-1, keepdim=True)
    return (largest / ABSMAX_COUNT).clamp(min=torch.finfo(torch.float32).tiny)


def integrate_and_fire(
    x: Float[Tensor, "*rows I"],
    step: Float[Tensor, "*rows 1"],
    band: Float[Tensor, "*band"] | None = None,
) -> Iterator[Int[Tensor, "*rows I"]]:
    """The neuron step by step: the definition.

    In float64, where subtracting a float32 threshold from a float32 charge is exact.

    Args:
        x: Charge of each neuron.
        step: Threshold of each token, above zero.
        band: Neurons charged with less stay silent; broadcasts to ``x``. None silences none.

    Yields:
        Spikes -1, 0 or 1 of each time step, int8, until all are silent.
    """
    charge, threshold = x.double(), step.double()
    sign = charge.sign()
    awake = torch.ones_like(x, dtype=torch.bool) if band is None else x.float().abs() >= band
    while bool((fires := awake & (sign * charge >= threshold / 2)).any()):
        spikes = sign * fires
        charge = charge - spikes * threshold
        yield spikes.to(torch.int8)


def spike_counts(
    x: Float[Tensor, "*rows I"],
    step: Float[Tensor, "*rows 1"],
    band: Float[Tensor, "*band"] | None = None,
) -> Int[Tensor, "*rows I"]:
    """The sum of all that `integrate_and_fire` fires, int32, without taking the steps.

    Exact: a quotient of two float32 that is no tie is too far from one for float64 to confuse them.
    Where ``x`` or ``step`` is not a number, nothing fires (``step`` then carries it to the output).

    Args:
        x: As for `integrate_and_fire`; at most 2^31 thresholds.
        step: As there.
        band: As there.
    """
    ratio = x.double().div_(step.double()).nan_to_num_(0.0)
    counts = ratio.sign() * ratio.abs().add_(0.5).floor_()
    if band is not None:
        counts = torch.where(x.float().abs() >= band, counts, 0.0)
    return counts.to(torch.int32)


def fire_definition(
    x: Float[Tensor, "*rows I"], step: Step, k: float, band: Float[Tensor, "*band"] | None
) -> tuple[Int[Tensor, "*rows I"], Float[Tensor, "*rows 1"]]:
    """Counts, int32, and thresholds, float32, of neurons: the definition.

    Args:
        x: What enters them.
        step: ``mean``: the threshold is `adaptive_step`; ``absmax``: `absmax_step`.
        k: Thresholds in a mean magnitude; absmax has no use for it.
        band: Silent below, in units of the token's mean magnitude, (1,) or (I,); None: no band.
    """
    threshold = adaptive_step(x, k) if step == "mean" else absmax_step(x)
    limit = None if band is None else band * mean_magnitude(x)
    return spike_counts(x, threshold, limit), threshold


def fire(
    x: Float[Tensor, "*rows I"], step: Step, k: float, band: Float[Tensor, "*band"] | None
) -> tuple[Int[Tensor, "*rows I"], Float[Tensor, "*rows 1"]]:
    """`fire_definition` by the fastest implementation that can run here: the same bits."""
    x, band = x.detach(), None if band is None else band.detach()
    kernels = backends.choose("fire", x, float32=() if band is None else (band,))
    if kernels is None:
        return fire_definition(x, step, k, band)
    inputs = x.shape[-1]
    if band is not None and (band.dtype != torch.float32 or band.shape not in ((1,), (inputs,))):
        raise ValueError(f"band is {band.dtype} of shape {tuple(band.shape)}, inputs are {inputs}")
    x, band = x.contiguous(), None if band is None else band.contiguous()
    counts = x.new_empty(x.shape, dtype=torch.int32)
    threshold = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    getattr(kernels.module, _KERNEL[x.dtype])(
        kernels.level,
        torch.get_num_threads(),
        x.data_ptr(),
        threshold.numel(),
        inputs,
        step == "absmax",
        k,
        0 if band is None else band.data_ptr(),
        0 if band is None else len(band),
        counts.data_ptr(),
        threshold.data_ptr(),
    )
    return counts, threshold


class _Spiking(torch.autograd.Function):
    """Counts times threshold, with the gradients that `spiking` tells."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        band: Tensor | None,
    ) -> Tensor:
        if band is not None:
            ctx.save_for_backward(x, step, band)
        return (spike_counts(x, step, band) * step).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.needs_input_grad[2]:  # type: ignore[attr-defined]
            return gradient, None, None
        x, step, band = ctx.saved_tensors  # type: ignore[attr-defined]
        reach = torch.maximum(band, step / 2).expand(x.shape)
        edge = (1 - (x.float().abs() - band).abs() / reach).clamp(min=0) / reach
        slope = -(gradient.float() * x.float() * edge)
        return gradient, None, slope.sum_to_size(band.shape)


def spiking(
    x: Float[Tensor, "*rows I"],
    step: Float[Tensor, "*rows 1"],
    band: Float[Tensor, "*band"] | None = None,
) -> Float[Tensor, "*rows I"]:
    """What the spikes stand for, counts times threshold, in the dtype of ``x``; differentiable.

    The gradient of ``x`` is straight through, that of silent inputs too, so that a channel can come
    back; ``step`` gets none. ``band`` gets a surrogate: its edge, a step from 0 to ``x``, is taken
    for a slope whose derivative is a triangle around the band, as wide as the band to either side
    (or as half a threshold, where that is more).

    Args:
        x: As for `integrate_and_fire`.
        step: As there.
        band: As there.
    """
    return _Spiking.apply(x, step, band)  # type: ignore[no-any-return, no-untyped-call]


class _Firing(torch.autograd.Function):
    """Whether neurons fire, with the gradients that `firing` tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, edge: Tensor) -> Tensor:
        ctx.save_for_backward(x, edge)
        return (x.float().abs() >= edge).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, edge = ctx.saved_tensors  # type: ignore[attr-defined]
        size = x.float().abs()
        slope = gradients[0] * (1 - (size - edge).abs() / edge).clamp(min=0) / edge
        return (slope * x.float().sign()).to(x.dtype), (-slope).sum_to_size(edge.shape)


def firing(
    x: Float[Tensor, "*rows I"],
    step: Float[Tensor, "*rows 1"],
    band: Float[Tensor, "*band"] | None = None,
) -> Float[Tensor, "*rows I"]:
    """1 where a neuron fires at all, 0 where it is silent, float32; differentiable.

    The edge, the larger of ``band`` and half a threshold, is taken for the slope that `spiking` has
    there: less of an input near it, and more of the band, silence a neuron. ``step`` gets none.

    Args:
        x: As for `integrate_and_fire`.
        step: As there.
        band: As there.
    """
    half = step.detach() / 2
    edge = half if band is None else torch.maximum(band, half)
    return _Firing.apply(x, edge)  # type: ignore[no-any-return, no-untyped-call]


class _SpikingSeen(torch.autograd.Function):
    """`spiking` and the sum of `firing` in one pass, a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Step, k: float, band: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*((x,) if band is None else (x, band)))
        ctx.step, ctx.k = step, k
        rows, out = x.flatten(0, -2), torch.empty_like(x)
        fired = torch.zeros((), dtype=torch.int64, device=x.device)
        for part, into in zip(_blocks(rows), _blocks(out.view(rows.shape)), strict=True):
            counts, threshold = fire(part, step, k, band)
            fired += counts.count_nonzero()
            torch.mul(counts, threshold, out=into)
        return out, fired.float()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_out: Tensor | None, d_fired: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, *bands = ctx.saved_tensors
        band = bands[0] if bands else None
        if d_out is None:
            d_out = torch.zeros_like(x)
        wants = ctx.needs_input_grad[3]
        if d_fired is None and not wants:
            return d_out, None, None, None
        rows, d_x = x.flatten(0, -2), torch.empty_like(x)
        d_rows = d_out.reshape(rows.shape)
        d_band = torch.zeros(()) if band is None else torch.zeros_like(band)
        parts = zip(_blocks(rows), _blocks(d_rows), _blocks(d_x.view(rows.shape)), strict=True)
        for part, d_part, into in parts:
            size = part.float().abs()
            mean = size.mean(-1, keepdim=True)
            if ctx.step == "mean":
                half = (mean / ctx.k).clamp_(min=LEAST_ADAPTIVE_STEP).div_(2)
            else:
                half = size.amax(-1, keepdim=True).div_(2 * ABSMAX_COUNT)
            limit = half if band is None else band * mean
            edge = torch.maximum(limit, half).clamp_(min=torch.finfo(torch.float32).tiny)
            slope = _triangle(size, edge, edge)
            if d_fired is None:
                into.copy_(d_part)
            else:
                signs = part.float().sign()
                into.copy_(torch.addcmul(d_part.float(), slope, signs, value=float(d_fired)))
            if wants:
                assert band is not None
                near = slope if bool((limit >= half).all()) else _triangle(size, limit, edge)
                down = near.mul(d_part).mul_(part)
                if d_fired is not None:
                    down.add_(slope.mul_(limit > half), alpha=float(d_fired))
                d_band -= down.mul_(mean).sum_to_size(band.shape)
        return d_x, None, None, d_band if wants else None


BLOCK_NUMBERS = 1 << 16
"""Numbers worked on at a time where neurons are trained: what is between stays in the cache."""


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """A matrix in blocks of rows."""
    return torch.split(rows, max(1, BLOCK_NUMBERS // max(1, rows.shape[1])))


def _triangle(size: Tensor, centre: Tensor, reach: Tensor) -> Tensor:
    """Height at ``size`` of a triangle of area 1 around ``centre``; a new tensor."""
    return (size - centre).abs_().div_(reach).neg_().add_(1).clamp_(min=0).div_(reach)


def spiking_seen(
    x: Float[Tensor, "*rows I"], step: Step, k: float, band: Float[Tensor, "*band"] | None = None
) -> tuple[Float[Tensor, "*rows I"], Float[Tensor, ""]]:
    """What the spikes of `fire` stand for, as `spiking`, and how many inputs fired, as `firing`.

    Both with the gradients told there, from one pass: training is bound by memory here. In those
    gradients the mean magnitude is added up in torch's order.

    Args:
        x: As for `fire`.
        step: As there.
        k: As there.
        band: As there; differentiable.

    Returns:
        Values in the dtype of ``x``, and the number that fired, float32.
    """
    return _SpikingSeen.apply(x, step, k, band)  # type: ignore[no-any-return, no-untyped-call]


def silenced(x: Float[Tensor, "*rows I"], band: Float[Tensor, "*band"]) -> Float[Tensor, "*rows I"]:
    """``x`` with zeros where it is smaller than ``band``: no neuron, the rival.

    Source: Liu et al., "Training-Free Activation Sparsity in Large Language Models" (TEAL),
    arXiv:2408.14690.
    """
    return torch.where(x.float().abs() < band, torch.zeros_like(x), x)
