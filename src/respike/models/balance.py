"""The balance loss of a model whose tokens choose experts or partitions, while it trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from respike.layers.moe import ExpertMLP
from respike.layers.sse import SparseDelta
from respike.models.decoder import Decoder


@contextmanager
def watch_balance(decoder: Decoder) -> Iterator[Callable[[], Tensor]]:
    """While the block runs, the value calls back the sum over layers of their balance losses.

    A layer that was called several times, as for the documents of a packed row, counts by the mean
    over tokens. To be added to the loss, times a small number such as 0.001 (SpikingBrain2.0)::

        with watch_balance(decoder) as balance:
            logits, _ = decoder(tokens)
            loss = cross_entropy(...) + 0.001 * balance()

    A model that chooses nothing has a balance of zero.
    """
    routed = [m for m in decoder.modules() if isinstance(m, ExpertMLP | SparseDelta)]

    def total() -> Tensor:
        found = torch.zeros((), device=decoder.embedding.device)
        for module in routed:
            tokens = sum(count for _, count in module.balances or ())
            for loss, count in module.balances or ():
                found = found + loss * (count / max(tokens, 1))
        return found

    try:
        for module in routed:
            module.balances = []
        yield total
    finally:
        for module in routed:
            module.balances = None
