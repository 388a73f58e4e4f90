"""A linear attention beside a layer's own: two sets of projections that read the same input.

Letters: B batch, T tokens, D model width.
"""

from typing import Any

import torch
from torch import Tensor

from respike.layers.attention import Attention
from respike.layers.norm import RMSNorm
from respike.layers.span import Span
from respike.layers.state import MixerState


class Beside(Attention):
    """An attention of memories, merged with the layer's own, the outputs of both normed.

    SpikingBrain-76B with separate projections (arXiv:2509.05276, equation 6) sums the two,
    SpikingBrain2.0 takes their mean.

    Args:
        mean: Merge by the mean, else by the sum.
        softmax_dropout: In training, how often the layer's own attention is left out.
        eps: Of the norms.
        options: As `Attention` takes them.
    """

    def __init__(
        self, *, hidden_size: int, mean: bool, softmax_dropout: float, eps: float, **options: Any
    ) -> None:
        super().__init__(hidden_size=hidden_size, qk_norm_eps=None, **options)
        self.mean, self.softmax_dropout = mean, softmax_dropout
        self.alone = False
        """The layer's own attention is left out, whatever `softmax_dropout` draws."""
        self.softmax_norm = RMSNorm(hidden_size, eps)
        self.memory_norm = RMSNorm(hidden_size, eps)

    def merged(
        self, own: Attention, x: Tensor, span: Span, state: tuple[MixerState, ...]
    ) -> tuple[Tensor, tuple[MixerState, ...]]:
        """Outputs (B, T, D) of ``own`` and of this on ``x``, merged; states of both, own first."""
        count, left_out = len(own.groups), self.leaves_out()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not left_out):
            near, before = own(x, span, state[:count])  # its state goes on in any case
        far, after = self(x, span, state[count:])
        return self.combined(own, near, far, left_out), (*before, *after)

    def leaves_out(self) -> bool:
        """Whether training leaves the softmax out this time; drawn anew at each call."""
        return self.alone or (self.training and float(torch.rand(())) < self.softmax_dropout)

    def combined(self, own: Attention, near: Tensor, far: Tensor, left_out: bool) -> Tensor:
        """The outputs of ``own`` and of this, each normed, merged."""
        near, far = self.softmax_norm(near), self.memory_norm(far)
        if left_out or any("window" in mixer.off for _, mixer in own.arrangement()):
            return far
        if any("memory" in mixer.off for _, mixer in self.arrangement()):
            return near
        return (near + far) / 2 if self.mean else near + far
