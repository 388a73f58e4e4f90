"""What tests of gradients share: those of two forms of an op, under the same random weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixers import normal

Form = Callable[..., Tensor | tuple[Tensor, ...]]


def gradients(form: Form, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a random weighting of every output of ``form``, by each of ``leaves``."""
    fresh = [x.detach().clone().requires_grad_() for x in leaves]
    outputs = form(*fresh)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    weights = [normal(*o.shape, seed=70 + i).to(o.dtype) for i, o in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, fresh, weights))
