"""Samples packed into batches of equal length, without loss and with their borders kept.

Every row of a batch is a lane of its own: what does not fit goes on in the same row of the next
batch, so that a state can be carried along. Letters: B rows, T tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from respike.data.sources import Mixture, Sample, Source
from respike.data.store import Array
from respike.errors import DataError, UsageError

MAX_WAITING = 4
"""Whole samples a lane puts off because the rest of its row is too short for them. One more, and
the row is padded instead."""


@dataclass(frozen=True)
class Batch:
    """What a step is trained on.

    Attributes:
        tokens: Token ids; 0 where padded.
        documents: Which document of its row a token belongs to, from 1; 0 where padded. A token
            may look at those of its own document only.
        positions: Place of the token in its document, which may have begun in an earlier batch.
        loss_mask: Tokens that may be predicted: they count for the loss, and the token before them
            stands in the same row and document. Logits at t - 1 predict token t.
        answers: Those among them that are answers of a recall task: always to be supervised.
        sources: Index of the token's source; -1 where padded.
        continues: Whether a row begins inside the document its lane ended with one batch before.
    """

    tokens: Int[Tensor, "B T"]
    documents: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    answers: Bool[Tensor, "B T"]
    sources: Int[Tensor, "B T"]
    continues: Bool[Tensor, " B"]

    def shard(self, rank: int, world: int) -> "Batch":
        """The rows of one of ``world`` processes that all draw the same batches.

        Raises:
            UsageError: The rows cannot be shared out evenly.
        """
        rows = len(self.tokens)
        if rows % world or not 0 <= rank < world:
            raise UsageError(f"{rows} rows cannot be shared out evenly, rank {rank} of {world}")
        return self.rows(slice(rank * rows // world, (rank + 1) * rows // world))

    def rows(self, index: slice) -> "Batch":
        """Some of its rows."""
        return Batch(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass
class _Lane:
    """What one row is in the middle of: (source, number) of a sample, and how much was used."""

    name: tuple[int, int] | None = None
    sample: Sample | None = None
    offset: int = 0
    waiting: list[tuple[int, int, Sample]] = field(default_factory=list)


class Loader:
    """Endless batches of a mixture; can be stopped and taken up again at any batch.

    Args:
        sources: Sources and their weights; shares of tokens are exact over time (`Mixture`).
        batch_size: Rows of a batch.
        context_tokens: Tokens of a row.
        cursor: From `cursor`: goes on with the very batch that would have come next.

    Raises:
        DataError: The cursor is of other sources, weights or sizes.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        *,
        batch_size: int,
        context_tokens: int,
        cursor: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or context_tokens < 2:
            raise UsageError(
                f"batch_size {batch_size} and context_tokens {context_tokens}: expected at least 1 "
                "and 2"
            )
        self.mixture = Mixture(sources)
        self.context_tokens = context_tokens
        self.batches = self.padded_tokens = 0
        self._used_tokens = [0] * len(sources)
        self._lanes = [_Lane() for _ in range(batch_size)]
        if cursor is not None:
            self._take_up(cursor)

    def __iter__(self) -> Iterator[Batch]:
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch; there always is one."""
        shape = (len(self._lanes), self.context_tokens)
        rows: dict[str, Array] = {
            name: np.zeros(shape, np.int64) for name in ("tokens", "documents", "positions")
        }
        rows |= {name: np.zeros(shape, np.bool_) for name in ("loss_mask", "answers")}
        rows["sources"] = np.full(shape, -1, np.int64)
        continues = [lane.sample is not None for lane in self._lanes]
        for index, lane in enumerate(self._lanes):
            self._fill(lane, {name: array[index] for name, array in rows.items()})
        self.batches += 1
        tensors = {name: torch.from_numpy(array) for name, array in rows.items()}
        return Batch(**tensors, continues=torch.tensor(continues))

    def ledger(self) -> dict[str, Any]:
        """What was handed out so far, by source: tokens, samples begun, epochs if there are any."""
        mixture, rows = self.mixture, {}
        for index, source in enumerate(mixture.sources):
            row: dict[str, Any] = {
                "tokens": self._used_tokens[index],
                "samples": mixture.numbers[index],
            }
            if source.epoch_samples:
                row["epochs"] = mixture.numbers[index] / source.epoch_samples
            rows[source.name] = row
        return {
            "batches": self.batches,
            "tokens": sum(self._used_tokens),
            "padded_tokens": self.padded_tokens,
            "sources": rows,
        }

    def cursor(self) -> dict[str, Any]:
        """The position after the batches so far, as small JSON."""
        mixture = self.mixture
        return {
            **self._identity(),
            "batches": self.batches,
            "padded_tokens": self.padded_tokens,
            "used_tokens": list(self._used_tokens),
            "drawn_tokens": list(mixture.drawn_tokens),
            "numbers": list(mixture.numbers),
            "lanes": [
                {
                    "sample": None if lane.name is None else [*lane.name, lane.offset],
                    "waiting": [[index, number] for index, number, _ in lane.waiting],
                }
                for lane in self._lanes
            ],
        }

    def _identity(self) -> dict[str, Any]:
        mixture = self.mixture
        return {
            "sources": [[source.name, source.fingerprint] for source in mixture.sources],
            "weights": list(mixture.weights),
            "batch_size": len(self._lanes),
            "context_tokens": self.context_tokens,
        }

    def _take_up(self, cursor: Mapping[str, Any]) -> None:
        for name, mine in self._identity().items():
            if cursor.get(name) != mine:
                raise DataError(
                    f"cursor: {name} was {str(cursor.get(name))[:120]}, now it is {str(mine)[:120]}"
                )
        mixture = self.mixture
        self.batches, self.padded_tokens = cursor["batches"], cursor["padded_tokens"]
        self._used_tokens = list(cursor["used_tokens"])
        mixture.drawn_tokens = list(cursor["drawn_tokens"])
        mixture.numbers = list(cursor["numbers"])
        for lane, saved in zip(self._lanes, cursor["lanes"], strict=True):
            if saved["sample"] is not None:
                index, number, lane.offset = saved["sample"]
                lane.name, lane.sample = (index, number), mixture.sources[index].draw(number)
            lane.waiting = [(i, n, mixture.sources[i].draw(n)) for i, n in saved["waiting"]]

    def _fill(self, lane: _Lane, row: Mapping[str, Array]) -> None:
        """Write one row, from what its lane is in the middle of to the end."""
        used, document = 0, 0
        while used < self.context_tokens:
            if lane.sample is None and not self._begin(lane, self.context_tokens - used):
                self.padded_tokens += self.context_tokens - used
                return
            sample, name = lane.sample, lane.name
            assert sample is not None
            assert name is not None
            document += 1
            size = min(self.context_tokens - used, len(sample.tokens) - lane.offset)
            here, there = slice(used, used + size), slice(lane.offset, lane.offset + size)
            row["tokens"][here] = sample.tokens[there]
            row["documents"][here] = document
            row["positions"][here] = np.arange(lane.offset, lane.offset + size)
            row["loss_mask"][here] = True if sample.counted is None else sample.counted[there]
            if sample.answers is not None:
                row["answers"][here] = sample.answers[there]
            row["loss_mask"][used] = False
            row["answers"][here] &= row["loss_mask"][here]
            row["sources"][here] = name[0]
            self._used_tokens[name[0]] += size
            used += size
            lane.offset += size
            if lane.offset == len(sample.tokens):
                lane.name = lane.sample = None
                lane.offset = 0

    def _begin(self, lane: _Lane, room: int) -> bool:
        """Give the lane a sample that may begin where ``room`` tokens are left; False: pad."""
        for place, (index, number, sample) in enumerate(lane.waiting):
            if len(sample.tokens) <= room:
                del lane.waiting[place]
                lane.name, lane.sample = (index, number), sample
                return True
        while len(lane.waiting) < MAX_WAITING:
            index, number, sample = self.mixture.next()
            if not sample.whole or not room < len(sample.tokens) <= self.context_tokens:
                lane.name, lane.sample = (index, number), sample
                return True
            lane.waiting.append((index, number, sample))
        return False
