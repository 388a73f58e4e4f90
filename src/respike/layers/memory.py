"""Linear mixers: a recurrent memory alone, or beside a window with a norm each and summed.

They see no rotary positions: order is in the decay. Letters: B batch, T tokens, D model width,
H query heads, G KV groups, K head dim, R rank of the gate.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu, softplus

from respike.layers.mixer import Mixer
from respike.layers.norm import RMSNorm
from respike.layers.softmax import FullSoftmax, WindowSoftmax
from respike.layers.span import Span
from respike.layers.state import MemoryState, PairState
from respike.ops.delta import delta, unit_silu
from respike.ops.gla import gla, tied_gate
from respike.ops.norm import rms_norm


class Memory(nn.Module):
    """A recurrent memory of some KV groups, (B, G, K, K) in float32; see `Mixer` for arguments.

    Attributes:
        copies: Memories of each group; they stand one after the other, each of all groups.
    """

    copies = 1

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the queries read (B, T, H, K), float32, and the memory after the span."""
        raise NotImplementedError


class GatedLinear(Memory):
    """Gated linear attention with a low-rank gate, as in SpikingBrain-7B.

    ``decay = sigmoid(up(down(x))) ** (1 / normalizer)`` for each key channel.
    Source: Yang et al., arXiv:2312.06635; SpikingBrain, arXiv:2509.05276, section 2.

    Args:
        hidden_size: D.
        num_groups: G.
        head_dim: K.
        gate_rank: R; None has one full matrix instead of two thin ones.
        gate_normalizer: Larger means a longer memory.
        rectify: ReLU on queries and keys, else they are taken as they are.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_groups: int,
        head_dim: int,
        gate_rank: int | None,
        gate_normalizer: float,
        rectify: bool,
    ) -> None:
        super().__init__()
        self.gate_down = (
            None if gate_rank is None else nn.Linear(hidden_size, gate_rank, bias=False)
        )
        self.gate_up = nn.Linear(gate_rank or hidden_size, num_groups * head_dim)
        self.gate_normalizer, self.rectify = gate_normalizer, rectify

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Memory.forward`."""
        if self.rectify:
            q, k = relu(q), relu(k)
        gate = self.gate_up(x if self.gate_down is None else self.gate_down(x)).float()
        gate = gate.view(k.shape)
        log_decay = logsigmoid(gate) / self.gate_normalizer
        k, log_decay = _real(span, k, log_decay)
        return gla(q, k, v, log_decay, state)


class TiedGate(Memory):
    """Gated linear attention whose decay is one minus the key: no weights of its own.

    Source: SpikingBrain-76B, arXiv:2509.05276; the tied gate: HGRN2, arXiv:2404.07904.
    """

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Memory.forward`."""
        del x
        k, log_decay = tied_gate(k.float())
        k, log_decay = _real(span, k, log_decay)
        return gla(q.float().sigmoid(), k, v, log_decay, state)


class GatedDelta(Memory):
    """The gated delta rule: writes only what the memory does not yet know of a key.

    ``decay = exp(-exp(A_log) softplus(a_proj x + dt_bias))``, write strength
    ``sigmoid(b_proj x)``, keys and queries ``l2norm(silu(.))``, values ``silu(.)``.
    Source: Yang et al., arXiv:2412.06464; as in SpikingBrain2.0's released code.

    Args:
        hidden_size: D.
        num_groups: G.
        negative_eigenvalues: Write strength up to 2 (Grazzi et al., arXiv:2411.12537).
    """

    def __init__(self, *, hidden_size: int, num_groups: int, negative_eigenvalues: bool) -> None:
        super().__init__()
        self.a_proj = nn.Linear(hidden_size, num_groups, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_groups, bias=False)
        self.A_log = nn.Parameter(torch.zeros(num_groups))
        self.dt_bias = nn.Parameter(torch.zeros(num_groups))
        self.strongest = 2.0 if negative_eigenvalues else 1.0

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Memory.forward`."""
        log_decay, strength = delta_gates(self, x)
        strength = self.strongest * strength
        k, strength, log_decay = _real(span, unit_silu(k), strength, log_decay)
        v = nn.functional.silu(v.float())
        return delta(unit_silu(q), k, v, strength, log_decay, state)


def delta_gates(memory: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log-decay and write strength (0 to 1) of a delta rule's gates, float32, (B, T, gates)."""
    step = softplus(memory.a_proj(x).float() + memory.dt_bias.float())  # type: ignore[operator]
    log_decay = -memory.A_log.float().exp() * step  # type: ignore[operator]
    return log_decay, memory.b_proj(x).float().sigmoid()  # type: ignore[operator]


def _real(span: Span, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs (B, T, ...) with zeros in place of padding: no decay, nothing written."""
    if span.padding is None:
        return inputs
    return tuple(
        x.masked_fill(span.padding.view(*span.padding.shape, *(1,) * (x.ndim - 2)), 0)
        for x in inputs
    )


def _normed(read: Tensor, norm: RMSNorm, dtype: torch.dtype) -> Tensor:
    """What was read, normed before it is rounded to ``dtype``: a sum may be out of its range."""
    return rms_norm(read, norm.weight.float(), norm.eps).to(dtype)


class Linear(Mixer):
    """A memory alone, its read-out normed for each head.

    Args:
        memory: What remembers.
        head_dim: K.
        eps: Of the norm.
    """

    parts = frozenset({"memory"})

    def __init__(self, memory: Memory, head_dim: int, eps: float) -> None:
        super().__init__()
        self.memory, self.norm = memory, RMSNorm(head_dim, eps)

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> MemoryState:
        """See `Mixer.init_state`."""
        groups *= self.memory.copies
        return MemoryState.empty(batch, groups, head_dim, head_dim, like)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        """See `Mixer.forward`."""
        read, memory = self.memory(x, q, k, v, span, state.memory)
        out = _normed(read, self.norm, v.dtype)
        return (torch.zeros_like(out) if "memory" in self.off else out), MemoryState(memory)


class WindowBesideMemory(Mixer):
    """A window and a memory that read the same input, each normed for each head, then summed.

    SpikingBrain-76B's form (arXiv:2509.05276, equation 6 with weights of one), with q, k, v and o
    shared by both, so that nothing but norms and gates is new.

    Args:
        window: The softmax; over everything before, the window is as long as that.
        memory: What remembers; it sees every token, those in the window included.
        head_dim: K.
        eps: Of the norms.
    """

    parts = frozenset({"window", "memory"})

    def __init__(
        self, window: WindowSoftmax | FullSoftmax, memory: Memory, head_dim: int, eps: float
    ) -> None:
        super().__init__()
        self.window, self.memory = window, memory
        self.window_norm, self.memory_norm = RMSNorm(head_dim, eps), RMSNorm(head_dim, eps)

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> PairState:
        """See `Mixer.init_state`."""
        return PairState(
            self.window.init_state(batch, groups, head_dim, like),
            MemoryState.empty(batch, groups * self.memory.copies, head_dim, head_dim, like),
        )

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: PairState
    ) -> tuple[Tensor, PairState]:
        """See `Mixer.forward`."""
        near, window = self.window(x, q, k, v, span, state.window)
        read, memory = self.memory(x, q, k, v, span, state.memory.memory)
        near, far = self.window_norm(near), _normed(read, self.memory_norm, v.dtype)
        after = PairState(window, MemoryState(memory))
        if "window" in self.off:
            return far, after
        return (near if "memory" in self.off else near + far), after
