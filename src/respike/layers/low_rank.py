"""A frozen linear layer with a trained product of two thin matrices beside it.

Letters: O outputs, I inputs, R rank.
Source: Hu et al., "LoRA", arXiv:2106.09685.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from respike.layers.spikes import Neuron, SpikedLinear


class LowRank(nn.Module):
    """``base(x) + up (down x)``; ``up`` begins at zero, so it begins as ``base``.

    Where ``base`` stands behind a neuron, all of it does.

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

    @property
    def in_features(self) -> int:
        """I."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.base.out_features

    @property
    def neuron(self) -> Neuron | None:
        """What stands in front of ``base``."""
        return self.base.neuron if isinstance(self.base, SpikedLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if isinstance(self.base, SpikedLinear):
            x = self.base.heard(x)
        out = linear(x, self.base.weight, self.base.bias)
        return out + linear(linear(x, self.down), self.up)


def merged(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The weight (O, I) of a plain layer that does the same, in the dtype of ``weight``."""
    return torch.addmm(weight.float(), up.float(), down.float()).to(weight.dtype)
