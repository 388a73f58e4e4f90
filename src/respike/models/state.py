"""The decoder's state: one state a mixer, and how many tokens each sequence has seen.

A state file is safetensors, format "respike-state" version 1: tensors named
``layers.{layer}.{mixer}.{k|v|memory|kept_..}`` and ``tokens_seen``, the fingerprint of its model
and a checksum. Whoever saves one may add tensors of their own; see `respike.documents.reading`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from respike.errors import DataError
from respike.layers.state import MixerState
from respike.models.state_file import check_digest, read_file, write_file

STATE_FORMAT = "respike-state"
STATE_VERSION = "1"
MORE = "document."
"""What names of further tensors begin with."""


@dataclass
class DecoderState:
    """Everything a model remembers of a batch of sequences.

    Attributes:
        layers: For each layer, the states of its mixers in order.
        tokens_seen: Tokens of each sequence so far, int64 (B,), on the processor.
    """

    layers: tuple[tuple[MixerState, ...], ...]
    tokens_seen: Tensor

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.tokens_seen)

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.tokens_seen.max())

    def nbytes(self) -> int:
        """Bytes the tokens seen so far need, over all sequences."""
        return sum(
            part.nbytes(n)
            for n in self.tokens_seen.tolist()
            for layer in self.layers
            for part in layer
        )

    def clone(self) -> "DecoderState":
        """An independent copy: continue the one, keep the other."""
        layers = tuple(tuple(part.clone() for part in layer) for layer in self.layers)
        return DecoderState(layers, self.tokens_seen.clone())

    def compact(self) -> "DecoderState":
        """An independent copy that takes the memory its tokens need: no room for more."""
        return self._rows(slice(None), self.num_tokens).clone()

    def split(self) -> list["DecoderState"]:
        """One independent state for each sequence of the batch."""
        return [self._rows(slice(row, row + 1)).clone() for row in range(len(self))]

    def row(self, index: int) -> "DecoderState":
        """An independent state of one sequence, `compact`."""
        return self._rows(slice(index, index + 1), int(self.tokens_seen[index])).clone()

    def keep(self, rows: Sequence[bool]) -> list["DecoderState"]:
        """States of the sequences marked in ``rows``, in order, runs of them as one, to be joined.

        They share memory with this state, which what `join` makes does not. They have room for as
        many tokens again as the longest of them has seen, at most: what a longer one needed that
        has left is given back.
        """
        longest = max((int(n) for n, k in zip(self.tokens_seen, rows, strict=True) if k), default=0)
        found, begin = [], 0
        for kept, run in groupby(rows):
            end = begin + len(list(run))
            if kept:
                found.append(self._rows(slice(begin, end), 2 * longest))
            begin = end
        return found

    def _rows(self, index: slice, room: int | None = None) -> "DecoderState":
        layers = tuple(tuple(part.rows(index, room) for part in layer) for layer in self.layers)
        return DecoderState(layers, self.tokens_seen[index])

    @staticmethod
    def join(states: Sequence["DecoderState"]) -> "DecoderState":
        """A batch out of several states of the same model, in order; lengths may differ."""
        layers = tuple(
            tuple(type(parts[0]).join(parts) for parts in zip(*same_layer, strict=True))
            for same_layer in zip(*(s.layers for s in states), strict=True)
        )
        return DecoderState(layers, torch.cat([s.tokens_seen for s in states]))

    def save(
        self,
        path: Path,
        fingerprint: str,
        *,
        more: Mapping[str, Tensor] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Write to ``path`` atomically, readable by its owner only; equal states, equal bytes.

        Args:
            path: The file to write; an existing one is replaced.
            fingerprint: Of the model, from `respike.loading.Model.fingerprint`.
            more: Further tensors; their names begin with `MORE`.
            notes: Further metadata.
        """
        tensors = {
            f"layers.{i}.{j}.{name}": tensor
            for i, layer in enumerate(self.layers)
            for j, part in enumerate(layer)
            for name, tensor in part.tensors(self.num_tokens).items()
        }
        tensors["tokens_seen"] = self.tokens_seen
        meta = {"format": STATE_FORMAT, "version": STATE_VERSION, "model": fingerprint}
        write_file(path, tensors | dict(more or {}), dict(notes or {}) | meta)

    def load(self, path: Path, fingerprint: str) -> "DecoderState":
        """Fill this (empty) state from ``path`` and return it.

        Raises:
            DataError: Not a state file, of another version, of another model, or altered.
        """
        self.load_with_more(path, fingerprint)
        return self

    def load_with_more(
        self, path: Path, fingerprint: str
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """As `load`; returns what `save` was given as ``more``, and all metadata."""
        tensors, meta = read_file(path)
        check_notes(path, meta, fingerprint)
        seen = tensors.pop("tokens_seen", None)
        if (
            seen is None
            or seen.dtype != torch.int64
            or seen.ndim != 1
            or not len(seen)
            or (seen < 0).any()
        ):
            raise DataError(f"{path}: tokens_seen is missing or not a list of counts")
        more = {name: tensors.pop(name) for name in list(tensors) if name.startswith(MORE)}
        checked = []
        for i, layer in enumerate(self.layers):
            for j, part in enumerate(layer):
                prefix = f"layers.{i}.{j}."
                mine = part.tensors(0)
                found = {name: tensors.pop(prefix + name, None) for name in mine}
                for name, tensor in found.items():
                    _check_part(path, prefix + name, tensor, mine[name], seen)
                device = next(iter(mine.values())).device
                kept = {n: t.to(device) for n, t in found.items() if t is not None}
                checked.append((part, kept))
        if tensors:
            raise DataError(f"{path}: unexpected tensor {min(tensors)!r}")
        check_digest(path, meta)
        self.tokens_seen = seen
        for part, kept in checked:
            part.restore(kept)
        return more, meta


def check_notes(path: Path, meta: Mapping[str, str], fingerprint: str | None = None) -> None:
    """Whether metadata is that of a state we can read, of the model with this fingerprint.

    Args:
        path: For the message.
        meta: The file's metadata.
        fingerprint: None does not look at the model.

    Raises:
        DataError: It is not.
    """
    if meta.get("format") != STATE_FORMAT:
        raise DataError(f"{path}: a safetensors file, but not a respike state")
    if meta.get("version") != STATE_VERSION:
        raise DataError(
            f"{path}: state format version {meta.get('version')}, expected {STATE_VERSION}"
        )
    if fingerprint is not None and meta.get("model") != fingerprint:
        raise DataError(
            f"{path}: belongs to model {meta.get('model', '?')[:12]}, "
            f"this model is {fingerprint[:12]}",
            hint="a state can only be continued by the very model that made it",
        )


def _check_part(
    path: Path, name: str, found: Tensor | None, mine: Tensor, tokens_seen: Tensor
) -> None:
    """A stored part must have this model's dtype and shape, but for batch and growing axis."""
    if found is None:
        raise DataError(f"{path}: tensor {name!r} is missing")
    grows = mine.shape[2] == 0
    expected = (len(tokens_seen), mine.shape[1], None if grows else mine.shape[2], mine.shape[3])
    ok = found.ndim == 4 and all(
        e is None or e == f for e, f in zip(expected, found.shape, strict=True)
    )
    if grows and ok:
        ok = found.shape[2] >= int(tokens_seen.max())
    if not ok or found.dtype != mine.dtype:
        raise DataError(
            f"{path}: tensor {name!r} is {found.dtype} {tuple(found.shape)}, "
            f"expected {mine.dtype} {expected}"
        )
