"""The decoder's state: one state a mixer, and how many tokens each sequence has seen.

A state file is safetensors, format "respike-state" version 1: tensors named
``layers.{layer}.{mixer}.{k|v|memory}`` and ``tokens_seen``, and the fingerprint of its model.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from respike.errors import DataError
from respike.layers.state import MixerState

STATE_FORMAT = "respike-state"
STATE_VERSION = "1"


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

    def split(self) -> list["DecoderState"]:
        """One independent state for each sequence of the batch."""
        return [self._rows(slice(row, row + 1)) for row in range(len(self))]

    def _rows(self, index: slice) -> "DecoderState":
        layers = tuple(tuple(part.rows(index) for part in layer) for layer in self.layers)
        return DecoderState(layers, self.tokens_seen[index].clone())

    @staticmethod
    def join(states: Sequence["DecoderState"]) -> "DecoderState":
        """A batch out of several states of the same model, in order; lengths may differ."""
        layers = tuple(
            tuple(type(parts[0]).join(parts) for parts in zip(*same_layer, strict=True))
            for same_layer in zip(*(s.layers for s in states), strict=True)
        )
        return DecoderState(layers, torch.cat([s.tokens_seen for s in states]))

    def save(self, path: Path, fingerprint: str) -> None:
        """Write to ``path`` atomically, readable by its owner only.

        Args:
            path: The file to write; an existing one is replaced.
            fingerprint: Of the model, from `respike.load.Model.fingerprint`.
        """
        tensors = {
            f"layers.{i}.{j}.{name}": tensor.contiguous()
            for i, layer in enumerate(self.layers)
            for j, part in enumerate(layer)
            for name, tensor in part.tensors(self.num_tokens).items()
        }
        tensors["tokens_seen"] = self.tokens_seen
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        meta = {"format": STATE_FORMAT, "version": STATE_VERSION, "model": fingerprint}
        try:
            partial.touch(mode=0o600)
            save_file(tensors, partial, metadata=meta)
            partial.chmod(0o600)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: Path, fingerprint: str) -> "DecoderState":
        """Fill this (empty) state from ``path`` and return it.

        Raises:
            DataError: Not a state file, of another version, of another model, or altered.
        """
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                _check_meta(path, meta, fingerprint)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: not a readable state file: {error}") from error
        seen = tensors.pop("tokens_seen", None)
        if (
            seen is None
            or seen.dtype != torch.int64
            or seen.ndim != 1
            or not len(seen)
            or (seen < 0).any()
        ):
            raise DataError(f"{path}: tokens_seen is missing or not a list of counts")
        checked = []
        for i, layer in enumerate(self.layers):
            for j, part in enumerate(layer):
                prefix = f"layers.{i}.{j}."
                mine = part.tensors(0)
                found = {name: tensors.pop(prefix + name, None) for name in mine}
                for name, tensor in found.items():
                    _check_part(path, prefix + name, tensor, mine[name], seen)
                checked.append((part, {n: t for n, t in found.items() if t is not None}))
        if tensors:
            raise DataError(f"{path}: unexpected tensor {min(tensors)!r}")
        self.tokens_seen = seen
        for part, kept in checked:
            part.restore(kept)
        return self


def _check_meta(path: Path, meta: dict[str, str], fingerprint: str) -> None:
    if meta.get("format") != STATE_FORMAT:
        raise DataError(f"{path}: a safetensors file, but not a respike state")
    if meta.get("version") != STATE_VERSION:
        raise DataError(
            f"{path}: state format version {meta.get('version')}, expected {STATE_VERSION}"
        )
    if meta.get("model") != fingerprint:
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
