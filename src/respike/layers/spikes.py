"""Neurons, and linear layers behind them: with integer events, or with float products."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from respike.layers.linear import PackedLinear
from respike.ops.packed import PackedWeight
from respike.ops.spike_linear import spike_linear
from respike.ops.spikes import (
    absmax_step,
    adaptive_step,
    fire,
    firing,
    mean_magnitude,
    silenced,
    spiking,
    spiking_seen,
)

Step = Literal["mean", "absmax", "none"]


class Neuron(nn.Module):
    """The neurons in front of one or more linear layers that share their input.

    Args:
        step: Threshold: ``mean``, mean|x| / k; ``absmax``, max|x| / 127; ``none``, inputs pass as
            they are but for the band (the rival TEAL).
        k: Thresholds in a mean magnitude.
        band: Inputs smaller than this stay silent: in units of the token's mean magnitude (step
            ``none``: of the input). (1,) or (I,); learnable. None has none.
    """

    band: nn.Parameter | None

    def __init__(self, step: Step, k: float = 3.0, band: Tensor | None = None) -> None:
        super().__init__()
        if step == "none" and band is None:
            raise ValueError("neither threshold nor band: nothing would ever be silent")
        self.step, self.k = step, k
        self.remembers = False
        """While True, layers that share an input share what the neurons make of it."""
        self._held: tuple[Tensor, Tensor, Tensor] | None = None
        self.band = None if band is None else nn.Parameter(band.detach().float())

    def _threshold(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Threshold and silent band of each token, constants of ``x`` to the gradient."""
        x = x.detach()
        step = adaptive_step(x, self.k) if self.step == "mean" else absmax_step(x)
        return step, None if self.band is None else self.band * mean_magnitude(x)

    @property
    def for_engine(self) -> tuple[bool, float, Tensor | None]:
        """Whether the threshold is max|x| / 127, k, and the band."""
        return self.step == "absmax", self.k, None if self.band is None else self.band.detach()

    def fire(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Spike counts, int32, and the threshold of each token.

        Raises:
            ValueError: This is the rival, which has no counts.
        """
        if self.step == "none":
            raise ValueError("TEAL keeps magnitudes, it has no spike counts")
        return fire(x, self.step, self.k, self.band)

    def forward(self, x: Tensor) -> Tensor:
        """What the spikes stand for, in the dtype of ``x``."""
        if self.step == "none":
            assert self.band is not None
            return silenced(x, self.band)
        if self.remembers:
            return self.seen(x)[0]
        return spiking(x, *self._threshold(x))

    def firing(self, x: Tensor) -> Tensor:
        """1 where neurons fire and 0 where they are silent, (..., I), float32; differentiable.

        Raises:
            ValueError: This is the rival, which does not fire.
        """
        if self.step == "none":
            raise ValueError("TEAL keeps magnitudes, it does not fire")
        return firing(x, *self._threshold(x))

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the spikes stand for, as `forward`, and how many fired, (), float32; differentiable.

        Raises:
            ValueError: This is the rival, which does not fire.
        """
        if self.step == "none":
            raise ValueError("TEAL keeps magnitudes, it does not fire")
        if self._held is None or self._held[0] is not x:
            found = spiking_seen(x, self.step, self.k, self.band)
            if not self.remembers:
                return found
            self._held = (x, *found)
        return self._held[1:]

    def remember(self, whether: bool) -> None:
        """Begin or end to share, see ``remembers``; what is held is forgotten."""
        self.remembers, self._held = whether, None

    def extra_repr(self) -> str:
        """What `print` shows in the parentheses."""
        return f"step={self.step}, k={self.k:g}, band={self.band is not None}"


class SpikedLinear(nn.Linear):
    """A float linear layer behind a neuron: trains, and emulates events with a dense product."""

    def __init__(self, like: nn.Linear, neuron: Neuron) -> None:
        super().__init__(
            like.in_features, like.out_features, bias=like.bias is not None, device="meta"
        )
        self.weight, self.bias = like.weight, like.bias
        self.neuron = neuron
        self.heeds_neuron = True
        """False lets inputs pass as they are: what is this neuron worth?"""

    def heard(self, x: Tensor) -> Tensor:
        """What the neuron lets through."""
        return self.neuron(x) if self.heeds_neuron else x

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(self.heard(x), self.weight, self.bias)


class SpikeLinear(PackedLinear):
    """A packed linear layer behind a neuron: integer sums of the inputs that fired.

    See `respike.ops.spike_linear`.
    """

    def __init__(self, packed: PackedWeight, neuron: Neuron, bias: Tensor | None = None) -> None:
        super().__init__(packed, bias)
        self.neuron = neuron

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        counts, step = self.neuron.fire(x)
        return spike_linear(counts, step, self.packed, self._buffers["bias"]).to(x.dtype)
