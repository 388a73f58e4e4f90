"""What every mixer of KV groups is: a module that maps a span of tokens and a state to both.

Letters: B batch, T tokens, D model width, H query heads, G KV groups, K head dim.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from respike.layers.span import Span
from respike.layers.state import MixerState


class Mixer(nn.Module):
    """Mixes tokens for some KV groups of a layer.

    Attributes:
        parts: Which of "window" and "memory" the mixer has.
        off: Those that are switched off; for measuring what they are worth.
        observer: Called, by mixers that attend to all that was read, with what each row's last
            query gives to each token: weights (B, H, S), float32. The outputs stay what they are.
    """

    parts: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.off: frozenset[str] = frozenset()
        self.observer: Callable[[Tensor], None] | None = None

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> MixerState:
        """The state before the first token; dtype and device of ``like``."""
        raise NotImplementedError

    def observe(self, q: Tensor, span: Span, state: Any) -> None:
        """Tell the observer.

        Args:
            q: Queries (B, T, H, K), not rotated.
            span: Where they stand.
            state: After the span.
        """
        del q, span, state

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, MixerState]:
        """Outputs (B, T, H, K) and the next state.

        Args:
            x: The layer's input after its norm (B, T, D), from which gates are computed.
            q: Queries (B, T, H, K), not rotated.
            k: Keys (B, T, G, K), not rotated.
            v: Values (B, T, G, K).
            span: Where the tokens stand.
            state: Before the span; consumed.
        """
        raise NotImplementedError
