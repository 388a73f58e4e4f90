"""The gated MLP (SwiGLU): ``down(silu(gate x) * up x)``. Source: Shazeer, arXiv:2002.05202."""

from torch import Tensor, nn
from torch.nn.functional import silu


class GatedMLP(nn.Module):
    """Keeps the source's tensor names: ``gate_proj, up_proj, down_proj``, without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
