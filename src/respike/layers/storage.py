"""Where growing caches live: in memory, or in a file that the system pages in and out.

A copy of a large cache shares its pages until it writes them: asking a text of a million tokens
copies no gigabytes. Caches only ever grow, and neither reads what the other wrote behind its end.

``RESPIKE_CACHE_DIR`` names a directory for the caches of block-sparse mixers. Each is then mapped
from a file there that has no name any more, so nothing is left behind whatever happens; on a
file system in memory (tmpfs) this gains nothing. Unset: memory.

Letters: B batch, G KV groups, S slots, C channels.
"""

import os
import tempfile
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from respike.errors import UsageError
from respike.layers.span import Span

VARIABLE = "RESPIKE_CACHE_DIR"
MAPPED_SLOTS = 1 << 16
"""Slots a mapped cache begins with: files have holes, so what is not written costs nothing."""

LARGE_BYTES = 64 << 20
"""Smaller caches are copied whole."""


def put_rows(data: Tensor, new: Tensor, span: Span) -> None:
    """Store ``new`` (B, G, T, C) in the slots (B, G, S, C) of the span, padding left out."""
    if span.offset is not None:
        data[:, :, span.offset : span.end] = new
        return
    for row, (start, count) in enumerate(zip(span.starts, span.valids, strict=True)):
        data[row, :, start : start + count] = new[row, :, :count]


def capacity(have: int, slots: int) -> int:
    """How many slots to make when ``slots`` are needed: a quarter more bounds copies and slack."""
    return max(slots, have + have // 4, 64)


class Rows:
    """A growing buffer (B, G, S, C); slots that were never written are zero."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self._shared: str | None = None
        """A file in memory that holds ``data``."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot of one group."""
        return self.data.shape[3] * self.data.element_size()

    def put(self, new: Tensor, span: Span, align: int) -> None:
        """Store ``new`` (B, G, T, C) at the span's positions, padding left out.

        Args:
            new: The rows.
            span: Where they stand.
            align: Slots are made in multiples of this.
        """
        self.reserve(-(-span.end // align) * align, align)
        put_rows(self.data, new, span)

    def reserve(self, slots: int, align: int = 1) -> None:
        """Make room for ``slots``, copying rarely: amortised, a slot is copied a few times."""
        have = self.data.shape[2]
        if slots <= have:
            return
        mapped = os.environ.get(VARIABLE) and self.data.device.type == "cpu"
        slots = max(slots, MAPPED_SLOTS, 2 * have) if mapped else capacity(have, slots)
        slots = -(-slots // align) * align
        shape = (*self.data.shape[:2], slots, self.data.shape[3])
        grown = _mapped(shape, self.data.dtype) if mapped else self.data.new_zeros(shape)
        grown[:, :, :have] = self.data
        self.data, self._shared = grown, None

    def copy(self) -> Tensor:
        """The buffer, to be written to; a large one takes memory only where it is."""
        plain = self.data.nbytes < LARGE_BYTES or self.data.device.type != "cpu"
        if plain or os.environ.get(VARIABLE) or not hasattr(os, "memfd_create"):
            return self.data.clone()
        if self._shared is None:
            self._share()
        assert self._shared is not None
        return _from_file(self._shared, tuple(self.data.shape), self.data.dtype, shared=False)

    def _share(self) -> None:
        """Move to a file in memory, of which copies are private views; room is free there."""
        batch, groups, slots, width = self.data.shape
        shape = batch, groups, 2 * slots, width
        file = os.memfd_create("respike-cache")
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, 2 * self.data.nbytes)
        self._shared = f"/proc/self/fd/{file}"
        held = _from_file(self._shared, shape, self.data.dtype, shared=True)
        held[:, :, :slots] = self.data
        self.data = held

    @staticmethod
    def join(parts: Sequence["Rows"]) -> Tensor:
        """One batch from several, in order."""
        slots = max(part.data.shape[2] for part in parts)
        pad = torch.nn.functional.pad
        return torch.cat([pad(p.data, (0, 0, 0, slots - p.data.shape[2])) for p in parts])


def _from_file(path: str, shape: tuple[int, ...], dtype: torch.dtype, *, shared: bool) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.from_file(path, shared=shared, size=size, dtype=dtype).view(shape)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    folder = os.environ[VARIABLE]
    count = torch.Size(shape).numel()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="respike-cache-") as file:
            file.truncate(count * dtype.itemsize)
            return _from_file(file.name, shape, dtype, shared=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{VARIABLE}={folder!r}: a cache cannot be mapped there: {error}",
            hint="name a writable directory on a disk, or unset it to keep caches in memory",
        ) from error
