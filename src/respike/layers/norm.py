"""Root-mean-square norm with a learned weight."""

import torch
from torch import Tensor, nn

from respike.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """`respike.ops.norm.rms_norm` with its weight.

    Args:
        width: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps)
