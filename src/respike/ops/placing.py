"""Where packed weights lie: one behind the other in memory, in the order a model reads them.

A model reads its weights in the same order for every token; few and large pages save the processor
the address translation (measured: 15 to 25 % of the speed). Memory for all of them is asked for at
once, before there is any of them, but taken page by page as they come.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from respike.ops import backends
from respike.ops.packed import PackedWeight, packed_parts

_HUGE_PAGE = 1 << 21

Form = tuple[int, int, str, int]
"""What is known of a weight before it is there: outputs, inputs, kind, group size."""


def form_of(weight: PackedWeight) -> Form:
    """The form of a weight that is there."""
    return weight.out_features, weight.in_features, weight.kind, weight.group_size


class Room:
    """Memory for weights to come, under huge pages where there are any.

    Args:
        units: Their forms, in the order in which they will be placed: one, or several that are fed
            by the same inputs in the same groups and will lie side by side.
        device: Where the memory is.
    """

    def __init__(self, units: Sequence[Sequence[Form]], device: torch.device) -> None:
        sizes = [size for unit in units for size in _unit_bytes(unit)]
        self._rest = iter(_memory(sizes, device))

    def place(self, weight: PackedWeight) -> PackedWeight:
        """A copy of the next weight, in its place.

        Raises:
            ValueError: It is not of the form that was announced.
        """
        data = self._copy(weight.data)
        scales = None if weight.scales is None else self._copy(weight.scales)
        return replace(weight, data=data, scales=scales)

    def place_side_by_side(self, unit: Sequence[PackedWeight]) -> list[PackedWeight]:
        """The same for weights behind neurons: see the text of `respike.ops.packed`.

        Raises:
            ValueError: They are not of the forms that were announced.
        """
        data = self._copy_rows([w.data for w in unit])
        scales = self._copy_rows([w.scales for w in unit if w.scales is not None])
        return [replace(w, data=d, scales=s) for w, d, s in zip(unit, data, scales, strict=True)]

    def _next(self, nbytes: int) -> Tensor:
        place = next(self._rest, None)
        announced = 0 if place is None else len(place)
        if place is None or announced != nbytes:
            raise ValueError(f"{nbytes} bytes of a weight come where {announced} were announced")
        return place

    def _copy(self, part: Tensor) -> Tensor:
        return self._next(part.nbytes).view(part.dtype).view(part.shape).copy_(part)

    def _copy_rows(self, parts: list[Tensor]) -> list[Tensor]:
        tiles = [len(part) for part in parts]
        _, rows, columns = parts[0].shape
        place = self._next(sum(part.nbytes for part in parts)).view(parts[0].dtype)
        whole = place.view(rows, sum(tiles), columns).transpose(0, 1)
        pairs = zip(torch.split(whole, tiles), parts, strict=True)
        return [target.copy_(part) for target, part in pairs]


def place_together(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """Copies of weights that are there already, one behind the other."""
    if not weights:
        return []
    room = Room([[form_of(w)] for w in weights], weights[0].data.device)
    return [room.place(w) for w in weights]


def place_side_by_side(units: Sequence[Sequence[PackedWeight]]) -> list[list[PackedWeight]]:
    """The same for units of weights behind neurons."""
    if not units:
        return []
    room = Room([[form_of(w) for w in unit] for unit in units], units[0][0].data.device)
    return [room.place_side_by_side(unit) for unit in units]


def _unit_bytes(unit: Sequence[Form]) -> list[int]:
    """Of the data of all weights of a unit, and of their scales if they have any."""
    parts = [[prod(shape) * dtype.itemsize for shape, dtype in packed_parts(*w)] for w in unit]
    return [sum(same) for same in zip(*parts, strict=True)]


def _memory(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Pieces of so many bytes, each on a cache line, one behind the other under huge pages."""
    *places, total = accumulate((-(-size // 64) * 64 for size in sizes), initial=0)
    memory = torch.empty(total + _HUGE_PAGE, dtype=torch.uint8, device=device)
    memory = memory[-memory.data_ptr() % _HUGE_PAGE :]
    ready = backends.kernels()
    if ready is not None and device.type == "cpu":  # before the first write: as it is mapped
        ready.module.advise_huge_pages(memory.data_ptr(), total)
    return [memory[place : place + size] for place, size in zip(places, sizes, strict=True)]
