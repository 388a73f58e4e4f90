"""The balance loss of a model whose tokens choose experts or partitions, while it trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from respike.layers.moe import ExpertMLP
from respike.layers.sse import SparseDelta
from respike.models.decoder import Decoder


@contextmanager
def watch_balance(decoder: Decoder) -> Iterator[Callable[[], Tensor]]:
    """While the block runs, the value calls back the sum over layers for the last forward call.

    To be added to the loss, times a small number such as 0.001 (SpikingBrain2.0) or 0.01::

        with watch_balance(decoder) as balance:
            logits, _ = decoder(tokens)
            loss = cross_entropy(...) + 0.001 * balance()

    A model that chooses nothing has a balance of zero.
    """
    routed = [m for m in decoder.modules() if isinstance(m, ExpertMLP | SparseDelta)]

    def total() -> Tensor:
        found = [m.balance for m in routed if m.balance is not None]
        zero = decoder.embedding.new_zeros(())
        return sum(found, zero)

    before = [m.watch for m in routed]
    try:
        for module in routed:
            module.watch = True
        yield total
    finally:
        for module, watch in zip(routed, before, strict=True):
            module.watch, module.balance = watch, None
