"""Linear layers with packed weights, for few rows (decoding) and many (prefill).

Letters: O outputs, I inputs, S scale groups; any leading dimensions. The layout is that of
`respike.ops.packed`. Activations are taken as they are, or rounded to int8 first, see
`round_activations`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, pad

from respike.ops import backends
from respike.ops.packed import PackedWeight, unpack

ACTIVATIONS = ("exact", "int8")
"""How ``x`` is read: as it is, or rounded. An index is the kind's number in C++."""

_KERNEL = {torch.float32: "packed_linears_f32", torch.bfloat16: "packed_linears_bf16"}


def round_activations(
    x: Float[Tensor, "*rows I"], group_size: int
) -> tuple[Float[Tensor, "*rows I"], Float[Tensor, "*rows S"]]:
    """Integers -127..127 and their scales, for each row and ``group_size`` inputs; float32.

    The scale is a 127th of the largest magnitude; integers are the nearest, ties to even. A group
    whose scale would be below the normal float32 numbers counts as zeros; the scale of one that is
    not finite is NaN.
    """
    inputs = x.shape[-1]
    groups = -(-inputs // group_size)
    padded = pad(x.float(), (0, groups * group_size - inputs))
    grouped = padded.view(*x.shape[:-1], groups, group_size)
    scales = grouped.abs().amax(-1) / 127
    used = (scales >= torch.finfo(torch.float32).tiny) & scales.isfinite()
    inverse = torch.where(used, 1 / scales, torch.zeros_like(scales))
    integers = torch.where(used[..., None], (grouped * inverse[..., None]).round(), 0.0)
    scales = torch.where(used, scales, torch.where(scales.isfinite(), 0.0, torch.nan))
    return integers.flatten(-2)[..., :inputs], scales


def packed_linear_definition(
    x: Float[Tensor, "*rows I"],
    packed: PackedWeight,
    bias: Float[Tensor, " O"] | None = None,
    activations: str = "exact",
) -> Float[Tensor, "*rows O"]:
    """``x @ weight.T + bias``, in float32 and rounded once to the dtype of ``x``: the definition.

    Args:
        x: Rows.
        packed: The weight (O, I).
        bias: Float32; None has none.
        activations: One of `ACTIVATIONS`. int8, for weights of kind int8 and int4 only, takes what
            `round_activations` makes of ``x`` in the weight's scale groups.

    Raises:
        ValueError: ``activations`` is unknown, or int8 with weights that have no scales.
    """
    _check_activations(activations, packed)
    values = x.float()
    if activations == "int8":
        integers, scales = round_activations(x, packed.group_size)
        each = scales.repeat_interleave(packed.group_size, -1)
        values = integers * each[..., : packed.in_features]
    return linear(values, unpack(packed), bias).to(x.dtype)


def packed_linear(
    x: Float[Tensor, "*rows I"],
    packed: PackedWeight,
    bias: Float[Tensor, " O"] | None = None,
    activations: str = "exact",
) -> Float[Tensor, "*rows O"]:
    """A packed linear layer by the fastest implementation that can run here.

    Same arguments and results as `packed_linear_definition`. The bits do not depend on the number
    of threads. With int8 activations the kernels multiply integers, and their sums over a scale
    group are the same at every level; only the sum over groups is rounded.

    Raises:
        ValueError: ``x``, ``packed``, ``bias`` and ``activations`` do not fit together.
    """
    (out,) = packed_linears(x, (packed,), (bias,), activations)
    return out


def packed_linears(
    x: Float[Tensor, "*rows I"],
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None] | None = None,
    activations: str = "exact",
) -> tuple[Tensor, ...]:
    """Several packed linear layers of the same ``x`` in one go: q, k and v, or gate and up.

    Args:
        x: As for `packed_linear`, as is ``activations``.
        weights: Any kinds and outputs.
        biases: One (O,) or None for each weight; None has none at all.
        activations: As for `packed_linear`.

    Returns:
        For each weight what `packed_linear` returns, bit for bit; as columns of one tensor, so rows
        of several are not contiguous.

    Raises:
        ValueError: As for `packed_linear`, or there are not as many biases as weights.
    """
    biases = (None,) * len(weights) if biases is None else biases
    if len(biases) != len(weights):
        raise ValueError(f"{len(biases)} biases for {len(weights)} weights")
    for packed in weights:
        _check(x, packed, activations)
    kernels = backends.choose("packed_linear", x)
    if kernels is None:
        return tuple(
            packed_linear_definition(x, packed, bias, activations)
            for packed, bias in zip(weights, biases, strict=True)
        )
    inputs, outputs = x.shape[-1], sum(packed.out_features for packed in weights)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    matrices, at = [], out.data_ptr()
    for packed, bias in zip(weights, biases, strict=True):
        width = packed.out_features
        bias_address = 0 if bias is None else _bias_address(bias, x, width)
        matrices.append((*packed.for_kernels, bias_address, width, packed.group_size, at, outputs))
        at += width * out.element_size()
    kernel = getattr(kernels.module, _KERNEL[x.dtype])
    rows = x.numel() // inputs if inputs else 0
    rounded, threads = activations == "int8", torch.get_num_threads()
    kernel(kernels.level, threads, x.data_ptr(), rows, inputs, matrices, rounded)
    return (out,) if len(weights) == 1 else torch.split(out, [w.out_features for w in weights], -1)


def _check_activations(activations: str, packed: PackedWeight) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations {activations!r} are not one of {', '.join(ACTIVATIONS)}")
    if activations == "int8" and packed.scales is None:
        raise ValueError(f"int8 activations need weights of kind int8 or int4, not {packed.kind}")


def _check(x: Tensor, packed: PackedWeight, activations: str) -> None:
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {packed.in_features} inputs")
    if packed.data.device != x.device:
        raise ValueError(f"x is on {x.device}, the packed weight on {packed.data.device}")
    _check_activations(activations, packed)


def _bias_address(bias: Tensor, x: Tensor, out_features: int) -> int:
    fits = bias.shape == (out_features,) and bias.dtype == torch.float32
    if not fits or not bias.is_contiguous() or bias.device != x.device:
        raise ValueError(f"bias is not {out_features} float32 numbers on {x.device}")
    return bias.data_ptr()
