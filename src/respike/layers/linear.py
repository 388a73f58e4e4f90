"""A linear layer whose weight is packed for reading; for running, not for training."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from respike.ops.linear import packed_linear
from respike.ops.packed import PackedWeight, pack


class PackedLinear(nn.Module):
    """`respike.ops.linear.packed_linear` with its weight.

    Args:
        packed: The weight.
        bias: One number for each output, kept in float32; None has none.
        activations: How the input is read, one of `respike.ops.linear.ACTIVATIONS`.
    """

    data: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None = None, activations: str = "exact"
    ) -> None:
        super().__init__()
        self.activations = activations
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.set_packed(packed)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, kind: str, group_size: int = 32, activations: str = "exact"
    ) -> "PackedLinear":
        """The same layer with its weight rounded to ``kind``, see `respike.ops.packed.pack`."""
        return cls(pack(linear.weight.detach(), kind, group_size), linear.bias, activations)

    def set_packed(self, packed: PackedWeight) -> None:
        """Exchange the weight."""
        self.kind, self.group_size = packed.kind, packed.group_size
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.register_buffer("data", packed.data)
        self.register_buffer("scales", packed.scales)
        self._packed = packed

    @property
    def packed(self) -> PackedWeight:
        """The weight, sharing memory with this layer."""
        buffers = self._buffers
        data, scales = buffers["data"], buffers["scales"]
        if data is not self._packed.data or scales is not self._packed.scales:  # moved or loaded
            assert data is not None
            self._packed = replace(self._packed, data=data, scales=scales)
        return self._packed

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return packed_linear(x, self.packed, self._buffers["bias"], self.activations)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves to another device, never casts: what each bit means is fixed by the layout."""
        super()._apply(lambda t: fn(t.view(torch.uint8)).view(t.dtype), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """What `print` shows in the parentheses."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        how = f"kind={self.kind}, activations={self.activations}"
        return f"{sizes}, {how}, bias={self.bias is not None}"
