"""Written-out gradients of the small ops against autograd through their definitions."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gradients import Form, gradients
from kernels import at_torch
from mixers import normal
from respike.ops.gated import swiglu, swiglu_definition
from respike.ops.norm import rms_norm, rms_norm_definition
from respike.ops.rotary import (
    rotary_frequencies,
    rotary_tables,
    rotate,
    rotate_definition,
)
from tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16)
COS, SIN = rotary_tables(
    torch.tensor([[0, 1, 2, 3, 900], [7, 8, 9, 10, 11]]), rotary_frequencies(14, 1e4)
)


class Op(NamedTuple):
    """An op, its definition, and the shapes of what has gradients."""

    form: Form
    definition: Form
    shapes: tuple[tuple[int, ...], ...]


OPS = {
    "rms_norm": Op(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm_definition(x, w, 1e-5),
        ((3, 5, 33), (33,)),
    ),
    "rms_norm of one row": Op(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm_definition(x, w, 1e-5),
        ((7,), (7,)),
    ),
    "rotate": Op(
        lambda x: rotate(x, COS, SIN),
        lambda x: rotate_definition(x, COS, SIN),
        ((2, 5, 3, 14),),
    ),
    "swiglu": Op(swiglu, swiglu_definition, ((3, 5, 33), (3, 5, 33))),
}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def leaves(op: Op, dtype: torch.dtype) -> list[Tensor]:
    return [2 * normal(*shape, seed=i).to(dtype) for i, shape in enumerate(op.shapes)]


def compare(op: Op, dtype: torch.dtype) -> None:
    given = leaves(op, dtype)
    expected = gradients(op.definition, [x.float() for x in given])
    for ours, wanted in zip(gradients(op.form, given), expected, strict=True):
        assert_close(ours, wanted.to(dtype))


@each_op
@each_dtype
def test_gradients_are_those_of_the_definition(op: Op, dtype: torch.dtype) -> None:
    compare(op, dtype)


@each_op
def test_gradients_do_not_need_the_kernels(op: Op) -> None:
    with at_torch():
        compare(op, torch.float32)


@each_op
@each_dtype
def test_the_forward_pass_is_that_of_inference_bit_for_bit(op: Op, dtype: torch.dtype) -> None:
    given = leaves(op, dtype)
    with torch.no_grad():
        expected = op.form(*given)
    assert torch.equal(op.form(*(x.requires_grad_() for x in given)), expected)


@each_op
def test_a_gradient_of_one_input_alone(op: Op) -> None:
    given = leaves(op, torch.float32)
    whole = gradients(op.form, given)
    for i, expected in enumerate(whole):
        alone: Callable[[Tensor], Tensor] = lambda x, i=i: op.form(*given[:i], x, *given[i + 1 :])  # noqa: E731
        assert torch.equal(gradients(alone, [given[i]])[0], expected)


@each_op
def test_a_gradient_of_the_gradient_is_refused(op: Op) -> None:
    given = [x.requires_grad_() for x in leaves(op, torch.float32)]
    (grad,) = torch.autograd.grad(op.form(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_tables_have_no_gradient() -> None:
    with pytest.raises(ValueError, match="follow from positions"):
        rotate(normal(2, 5, 3, 14), COS.clone().requires_grad_(), SIN)
