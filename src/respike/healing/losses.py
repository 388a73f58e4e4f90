"""Objectives, computed on chosen positions, a few hundred logit rows at a time.

Letters: N chosen positions, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

HEAD_ROWS = 512
"""Rows of logits that exist at once, of either model."""


class _HeadLoss(torch.autograd.Function):
    """A loss of logits whose gradient is formed together with its value, row block by row block.

    Logits are never kept: what goes back is d loss / d hidden. The head is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        target: Tensor,
        target_head: Tensor | None,
        weights: Tensor,
    ) -> Tensor:
        grad = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for begin in range(0, len(hidden), HEAD_ROWS):
            rows = slice(begin, begin + HEAD_ROWS)
            log_q = linear(hidden[rows], head).float().log_softmax(-1)
            q = log_q.exp()
            if target_head is None:  # target: token ids
                index = target[rows, None]
                each = -log_q.gather(1, index)[:, 0]
                q.scatter_add_(1, index, torch.full_like(index, -1, dtype=q.dtype))
            else:  # target: the original's hidden states
                log_p = linear(target[rows], target_head).float().log_softmax(-1)
                p = log_p.exp()
                each = (p * log_p.sub_(log_q)).sum(-1)
                q -= p
            total += (each.double() * weights[rows]).sum()
            grad[rows] = (q.to(hidden.dtype) @ head) * weights[rows, None]
        ctx.save_for_backward(grad)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * scale.to(grad.dtype), None, None, None, None


def summed_kl(
    hidden: Tensor, head: Tensor, reference: Tensor, reference_head: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum over rows of KL(reference || model), nats, with a gradient for ``hidden``.

    Args:
        hidden: After the model's last norm (N, D).
        head: Its output matrix (V, D), frozen.
        reference: Likewise of the original (N, D).
        reference_head: Its output matrix.
        weights: Of the rows (N,).
    """
    return _HeadLoss.apply(hidden, head, reference, reference_head, weights)  # type: ignore[no-any-return, no-untyped-call]


def summed_nats(hidden: Tensor, head: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Likewise of the negative log-likelihood of ``tokens`` (N,), nats; see `summed_kl`."""
    return _HeadLoss.apply(hidden, head, tokens, None, weights)  # type: ignore[no-any-return, no-untyped-call]


def relative_error(out: Tensor, target: Tensor) -> Tensor:
    """Squared error as a share of the target's square, a head at a time, then the mean.

    Args:
        out: (N, H, K).
        target: Likewise, without a gradient.
    """
    error = (out.float() - target.float()).square().sum((0, 2))
    power = target.float().square().sum((0, 2)).clamp(min=1e-12)
    return (error / power).mean()
