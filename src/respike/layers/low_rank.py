"""A frozen linear layer with a trained product of two thin matrices beside it.

Letters: O outputs, I inputs, R rank.
Source: Hu et al., "LoRA", arXiv:2106.09685.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class LowRank(nn.Module):
    """``base(x) + up (down x)``; ``up`` begins at zero, so it begins as ``base``.

    Args:
        base: The layer as it is; frozen.
        rank: R.
        seed: Of ``down``, which begins random, with entries of variance 1 / I.
    """

    def __init__(self, base: nn.Linear, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(rank, base.in_features, generator=generator) * base.in_features**-0.5
        self.down = nn.Parameter(down.to(base.weight))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        out: Tensor = self.base(x)
        return out + linear(linear(x, self.down), self.up)


def merged(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The weight (O, I) of a plain layer that does the same, in the dtype of ``weight``."""
    return torch.addmm(weight.float(), up.float(), down.float()).to(weight.dtype)
