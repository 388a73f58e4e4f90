"""Continuous batching: sequences that decode together, joining and leaving at any step."""

from collections.abc import Iterator

import torch

from respike.documents.passages import Attention, observing
from respike.documents.reading import keeps_all
from respike.loading import Model
from respike.models.state import DecoderState
from respike.server.jobs import Sequence

OBSERVED_TOKENS = 32
"""Of a choice that is looked at, see `respike.documents.passages`."""
SMALLEST_BUCKET_TOKENS = 1024


class Batch:
    """Sequences whose states are joined in one."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.rows: list[Sequence] = []
        self._state: DecoderState | None = None
        self._joining: list[tuple[Sequence, DecoderState]] = []

    def __len__(self) -> int:
        """Sequences, those that join at the next step included."""
        return len(self.rows) + len(self._joining)

    def add(self, row: Sequence, state: DecoderState) -> None:
        """Let a sequence join at the next step; its state is consumed."""
        self._joining.append((row, state))

    def members(self) -> Iterator[Sequence]:
        """All sequences."""
        yield from self.rows
        for row, _ in self._joining:
            yield row

    def step(self) -> list[tuple[Sequence, DecoderState]]:
        """One token for each sequence; returns those that ended, if their job wants them kept."""
        self._rebuild()
        if self._state is None:
            return []
        decoder = self._model.decoder
        new = torch.tensor([[row.tokens[-1]] for row in self.rows])
        with torch.inference_mode(), observing(decoder, _Looks(self.rows)):
            logits, self._state = decoder(
                new.to(decoder.embedding.device), self._state, logits="last"
            )
        for row, values in zip(self.rows, logits[:, 0].float().cpu(), strict=True):
            if not row.job.cancelled:
                row.take(values)
        kept = []
        for index, row in enumerate(self.rows):
            if row.ended and row.job.keep and row.index == 0 and not row.job.cancelled:
                kept.append((row, self._state.row(index)))
        return kept

    def _rebuild(self) -> None:
        """Let those that ended leave and those that wait join: one copy of the states."""
        stay = [not (row.ended or row.job.cancelled) for row in self.rows]
        joining = [(row, s) for row, s in self._joining if not row.job.cancelled]
        self._joining = []
        if all(stay) and not joining:
            return
        parts = [] if self._state is None else self._state.keep(stay)
        parts += [state for _, state in joining]
        self.rows = [row for row, s in zip(self.rows, stay, strict=True) if s]
        self.rows += [row for row, _ in joining]
        self._state = DecoderState.join(parts) if parts else None


class Batches:
    """A batch for each size of state, as rows of a batch have caches of equal length.

    A state that does not grow has one size. Others are put with those at most twice as long.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._grows = model, keeps_all(model.config)
        self._all: dict[int, Batch] = {}

    def add(self, row: Sequence, state: DecoderState) -> None:
        """Let a sequence join the batch of its size."""
        size = max(SMALLEST_BUCKET_TOKENS, state.num_tokens).bit_length() if self._grows else 0
        self._all.setdefault(size, Batch(self._model)).add(row, state)

    def __len__(self) -> int:
        """Sequences in all."""
        return sum(len(batch) for batch in list(self._all.values()))  # other threads ask too

    def __iter__(self) -> Iterator[Batch]:
        """The batches that have sequences; empty ones are forgotten."""
        self._all = {size: batch for size, batch in self._all.items() if len(batch)}
        return iter(list(self._all.values()))

    def members(self) -> Iterator[Sequence]:
        """All sequences."""
        for batch in self:
            yield from batch.members()


class _Looks(Attention):
    """Hands what is observed of a batch to those of its rows that want it."""

    def __init__(self, rows: list[Sequence]) -> None:
        self._wanted = [
            (index, row.job.look)
            for index, row in enumerate(rows)
            if row.job.look is not None and row.index == 0 and len(row.tokens) < OBSERVED_TOKENS
        ]

    @property
    def wanted(self) -> bool:
        return bool(self._wanted)

    def add(self, weights: torch.Tensor, layer: int) -> None:
        """See `Attention.add`."""
        for index, look in self._wanted:
            look.add(weights[index : index + 1], layer)
