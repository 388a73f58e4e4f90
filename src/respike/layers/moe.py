"""A mixture of experts in place of the MLP.

Letters: R rows (tokens of all sequences), D model width, N experts, C experts of a token.
Source: Shazeer et al., arXiv:1701.06538; shared experts: Dai et al., arXiv:2401.06066.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from respike.layers.mlp import GatedMLP
from respike.ops.routing import Router, balance_loss, kept_gates, route


class ExpertMLP(nn.Module):
    """``sum over the C best experts of gate_e expert_e(x), plus the shared experts of x``.

    No token is dropped, whatever its experts' load. The router works in float32.

    Args:
        hidden_size: D.
        intermediate_size: Width of each expert.
        experts: N.
        chosen: C.
        shared: Experts that every token passes, with a gate of one.
        router: How shares are made of the router's output.
        normalised: The gates of a token sum to one.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        experts: int,
        chosen: int,
        shared: int,
        router: Router,
        normalised: bool,
    ) -> None:
        super().__init__()
        self.chosen, self.router, self.normalised = chosen, router, normalised
        self.gate = nn.Linear(hidden_size, experts, bias=False)
        sizes = hidden_size, intermediate_size
        self.experts = nn.ModuleList(GatedMLP(*sizes) for _ in range(experts))
        self.shared_experts = nn.ModuleList(GatedMLP(*sizes) for _ in range(shared))
        self.balances: list[tuple[Tensor, int]] | None = None
        """Unless None, every call adds its `respike.ops.routing.balance_loss` and its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        rows = x.reshape(-1, x.shape[-1])
        shares, index = route(
            linear(rows.float(), self.gate.weight.float()), self.chosen, self.router
        )
        if self.balances is not None:
            self.balances.append((balance_loss(shares, index), len(rows)))
        gates = kept_gates(shares, index, normalised=self.normalised)
        out = (self._expert_outputs(rows, index).float() * gates[..., None]).sum(1)
        for expert in self.shared_experts:
            out = out + expert(rows).float()
        return out.to(x.dtype).view_as(x)

    def _expert_outputs(self, rows: Tensor, index: Tensor) -> Tensor:
        """(R, C, D): each expert runs once, on all of its tokens together."""
        places = index.flatten()
        order = places.argsort(stable=True)
        counts = torch.bincount(places, minlength=len(self.experts)).tolist()
        groups = torch.split(rows[order // index.shape[1]], counts)
        outs = [
            expert(group) for expert, group in zip(self.experts, groups, strict=True) if len(group)
        ]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))
        return torch.cat([rows[:0], *outs])[back].view(*index.shape, -1)
