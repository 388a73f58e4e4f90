"""Routing: which few of many memories or experts a token goes to, and whether all get their share.

Letters: N things to choose from, C chosen ones; any leading dimensions.
Source: Shazeer et al., arXiv:1701.06538 (top-k); Fedus et al., arXiv:2101.03961 (balance);
Dai et al., arXiv:2401.06066, and DeepSeek-V3, arXiv:2412.19437 (sigmoid).
"""

from typing import Literal

from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor
from torch.nn.functional import one_hot

Router = Literal["softmax", "sigmoid"]


def route(
    logits: Float[Tensor, "*rows N"], count: int, router: Router = "softmax"
) -> tuple[Float32[Tensor, "*rows N"], Int[Tensor, "*rows C"]]:
    """Shares of everything there is, in float32, and the ``count`` largest, best first.

    Args:
        logits: What each token thinks of each.
        count: C.
        router: ``softmax``: shares sum to one; ``sigmoid``: each by itself.
    """
    x = logits.float()
    shares = x.softmax(-1) if router == "softmax" else x.sigmoid()
    return shares, shares.topk(count, -1).indices


def balance_loss(
    shares: Float32[Tensor, "*rows N"],
    index: Int[Tensor, "*rows C"],
    real: Bool[Tensor, "*rows"] | None = None,
) -> Float32[Tensor, ""]:
    """How unevenly tokens are spread: 1 if evenly, up to N / C.

    ``(N / C) sum_n p_n f_n``, with p_n the mean share of n (shares scaled to sum to one) and f_n
    how often it is chosen, which has no gradient.

    Args:
        shares: From `route`.
        index: From `route`.
        real: Tokens that count. None: all.
    """
    count = shares.shape[-1]
    p = (shares / shares.sum(-1, keepdim=True)).reshape(-1, count)
    chosen = one_hot(index, count).sum(-2).to(p.dtype).reshape(-1, count)
    if real is not None:
        p, chosen = p[real.reshape(-1)], chosen[real.reshape(-1)]
    return count / index.shape[-1] * (p.mean(0) * chosen.mean(0)).sum()


def kept_gates(
    shares: Float32[Tensor, "*rows N"], index: Int[Tensor, "*rows C"], *, normalised: bool
) -> Float32[Tensor, "*rows C"]:
    """The shares of what was chosen, scaled to sum to one if ``normalised``.

    The sum has no gradient. Else the gate of a single choice would be the constant 1 and its router
    would learn nothing.
    """
    gates = shares.gather(-1, index)
    return gates / gates.sum(-1, keepdim=True).detach() if normalised else gates
