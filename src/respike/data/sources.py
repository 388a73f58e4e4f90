"""Endless, numbered streams of samples, and their mixture by weight.

A source gives its n-th sample for every n, whatever was drawn before: so a position in a stream is
one number, and drawing again after a restart gives the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from respike.data.store import Array, Split, TokenStore
from respike.errors import DataError, UsageError

MAX_DOCUMENT_TOKENS = 1 << 15
"""Longer documents are drawn in pieces, so that one book does not fill a whole run."""
HELDOUT_FRAC = 0.01
KEPT_ORDERS = 4
"""Epochs whose order is remembered: lanes can be in two, filler comes from the first."""


@dataclass(frozen=True)
class Sample:
    """One document, or a piece of one.

    Attributes:
        tokens: Ids (N,), int64.
        counted: Which tokens count for the loss (N,), bool; None for all.
        answers: Which tokens are answers of a recall task (N,), bool; None for none.
        whole: Not to be cut if that can be avoided: what it asks for stands in itself.
    """

    tokens: Array
    counted: Array | None = None
    answers: Array | None = None
    whole: bool = False


@runtime_checkable
class Source(Protocol):
    """A numbered stream of samples.

    Attributes:
        name: For ledger and cursor; differs from those of other sources.
        fingerprint: Equal where all samples are equal.
        epoch_samples: Samples until they come round again, or None if they never do.
    """

    name: str
    fingerprint: str
    epoch_samples: int | None

    def draw(self, number: int) -> Sample:
        """The sample of this number, from 0; depends on nothing else."""


class TextSource:
    """Documents of a store in an order that differs by epoch, without an end.

    Args:
        name: For the ledger.
        store: From `prepare`.
        seed: Of the order.
        split: ``train`` or ``heldout``.
        heldout_frac: Share of the documents that is held out, by the hash of their text.
        max_document_tokens: Longer ones come in pieces, each of them a sample of its own.
        min_document_tokens: Shorter ones, and shorter pieces, are left out.

    Raises:
        DataError: The split has no document.
    """

    def __init__(
        self,
        name: str,
        store: TokenStore,
        *,
        seed: int = 0,
        split: Split = "train",
        heldout_frac: float = HELDOUT_FRAC,
        max_document_tokens: int = MAX_DOCUMENT_TOKENS,
        min_document_tokens: int = 1,
    ) -> None:
        if not 0 <= heldout_frac <= 1 or max_document_tokens < 1 or not 0 <= seed < 1 << 63:
            raise UsageError(
                f"source {name!r}: heldout_frac {heldout_frac}, max_document_tokens "
                f"{max_document_tokens}, seed {seed}; expected 0 to 1, at least 1, at least 0"
            )
        self.name, self.store, self.seed = name, store, seed
        self.fingerprint = (
            f"{store.key} {split} {heldout_frac} {min_document_tokens} {max_document_tokens} {seed}"
        )
        self._spans = store.spans(split, heldout_frac, max_document_tokens, min_document_tokens)
        if not len(self._spans):
            raise DataError(
                f"{store.folder}: no document of at least {min_document_tokens} tokens is in the "
                f"split {split!r}"
            )
        self.epoch_samples: int | None = len(self._spans)
        self._orders: dict[int, Array] = {}

    @property
    def epoch_tokens(self) -> int:
        """Tokens of an epoch."""
        return int((self._spans[:, 1] - self._spans[:, 0]).sum())

    def draw(self, number: int) -> Sample:
        """Each epoch has every piece once."""
        epoch, place = divmod(number, len(self._spans))
        begin, end = self._spans[self._order(epoch)[place]]
        counted = self.store.counted
        return Sample(
            np.asarray(self.store.tokens[begin:end], dtype=np.int64),
            None if counted is None else np.array(counted[begin:end]),
        )

    def _order(self, epoch: int) -> Array:
        if epoch not in self._orders:
            key = np.array([self.seed, epoch], np.uint64)
            # Raw bits and a stable sort: the same order with every version of numpy.
            drawn = np.random.Philox(key=key).random_raw(len(self._spans))
            if len(self._orders) == KEPT_ORDERS:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = np.argsort(drawn, kind="stable")
        return self._orders[epoch]


class Mixture:
    """Draws from several sources so that their tokens keep to their weights at every moment.

    The next sample comes from the source that is furthest behind its share: no chance is involved,
    and no share is ever off by more than the longest sample.

    Args:
        sources: Sources and their weights, in any unit.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]]) -> None:
        names = [source.name for source, _ in sources]
        if not sources or len(set(names)) != len(names):
            raise UsageError(f"a mixture needs sources with different names, got {names}")
        for source, weight in sources:
            if not 0 < weight < float("inf"):
                raise UsageError(f"source {source.name!r}: weight {weight}, expected above 0")
        self.sources = [source for source, _ in sources]
        self.weights = [weight for _, weight in sources]
        self.numbers = [0] * len(sources)
        self.drawn_tokens = [0] * len(sources)

    def next(self) -> tuple[int, int, Sample]:
        """Index of a source, a number, and the sample it names."""
        behind = [taken / w for taken, w in zip(self.drawn_tokens, self.weights, strict=True)]
        index = min(range(len(behind)), key=behind.__getitem__)
        number = self.numbers[index]
        sample = self.sources[index].draw(number)
        if not len(sample.tokens):
            raise DataError(f"source {self.sources[index].name!r}: sample {number} is empty")
        self.numbers[index] += 1
        self.drawn_tokens[index] += len(sample.tokens)
        return index, number, sample
