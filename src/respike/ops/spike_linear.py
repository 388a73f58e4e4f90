"""Linear layers that are fed spike counts: integer sums, then scales.

Letters: O outputs, I inputs, S scale groups; any leading dimensions. The layout is that of
`respike.ops.packed`. For each row of counts c with threshold v, and for each output::

    sum_s = the sum of c_i w_i over the inputs i of scale group s      an integer, exact
    total = ((0 + f32(sum_0) scale_0) + f32(sum_1) scale_1) + ...      float32, rounded each time
    out   = total v + bias                                             float32, rounded each time

Every form follows this to the bit, so that an input that stays silent can be left out: the event
form walks the inputs that fired and reads no weight of any other; the dense form multiplies all.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from respike.ops import backends
from respike.ops.packed import KINDS, PackedWeight, from_tiles, unpack_integers

Form = Literal["best", "events", "dense"]
"""How the kernels run a product; an index is its number in C++. best: events if few fired."""

_FLOAT32_INTEGERS, _LARGEST_WEIGHT = 1 << 24, {"int8": 128, "int4": 8}


def spike_linear_definition(
    counts: Int[Tensor, "*rows I"],
    step: Float[Tensor, "*rows 1"],
    packed: PackedWeight,
    bias: Float[Tensor, " O"] | None = None,
) -> Float[Tensor, "*rows O"]:
    """``step * (counts @ weight.T) + bias`` in the order above, float32: the definition.

    Args:
        counts: Spike counts, int32.
        step: Threshold of each row, float32.
        packed: The weight (O, I), int8 or int4.
        bias: Float32; None has none.
    """
    integers = from_tiles(unpack_integers(packed)).long().T
    assert packed.scales is not None
    scales = from_tiles(packed.scales).float().T
    total = torch.zeros(*counts.shape[:-1], len(scales.T), device=counts.device)
    for group, scale in enumerate(scales):
        part = slice(group * packed.group_size, (group + 1) * packed.group_size)
        total = total + (counts[..., part].long() @ integers[part]).float() * scale
    out = total[..., : packed.out_features] * step
    return out if bias is None else out + bias


def spike_linear_dense(
    counts: Int[Tensor, "*rows I"],
    step: Float[Tensor, "*rows 1"],
    packed: PackedWeight,
    bias: Float[Tensor, " O"] | None = None,
) -> Float[Tensor, "*rows O"]:
    """As `spike_linear_definition`, faster: products in floats wide enough to be exact."""
    rows = counts.reshape(1, -1, packed.in_features)
    assert packed.scales is not None
    most = max(abs(int(end)) for end in rows.aminmax()) if rows.numel() else 0
    sums = most * _LARGEST_WEIGHT[packed.kind] * packed.group_size
    plain = torch.get_float32_matmul_precision() == "highest"  # else torch may round to bfloat16
    dtype = torch.float32 if plain and sums <= _FLOAT32_INTEGERS else torch.float64
    integers, rows = unpack_integers(packed), rows.to(dtype)
    total = torch.zeros(len(integers), rows.shape[1], integers.shape[2], device=rows.device)
    for group in range(packed.scales.shape[1]):
        part = slice(group * packed.group_size, (group + 1) * packed.group_size)
        products = torch.matmul(rows[..., part], integers[:, part].to(dtype)).float()
        total += products.mul_(packed.scales[:, group, None].float())
    out = total.transpose(0, 1).flatten(1)[:, : packed.out_features]
    out = out.reshape(*counts.shape[:-1], packed.out_features) * step
    return out if bias is None else out + bias


def spike_linear(
    counts: Int[Tensor, "*rows I"],
    step: Float[Tensor, "*rows 1"],
    packed: PackedWeight,
    bias: Float[Tensor, " O"] | None = None,
    form: Form = "best",
) -> Float[Tensor, "*rows O"]:
    """By events for few, by dot products of int8 for many of them, in torch without kernels.

    Same arguments and results as `spike_linear_definition`, to the bit. ``form`` is for the
    kernels, which take a weight as `respike.ops.packed.pack` or `respike.ops.placing` leave it.

    Raises:
        ValueError: The arguments do not fit together, or the weight is not of integers.
    """
    _check(counts, step, packed, bias)
    kernels = backends.choose("spike_linear", counts)
    if kernels is None:
        return spike_linear_dense(counts, step, packed, bias)
    counts, step = counts.contiguous(), step.contiguous()
    out = step.new_empty(*counts.shape[:-1], packed.out_features)
    kernels.module.spike_linear(
        kernels.level,
        torch.get_num_threads(),
        get_args(Form).index(form),
        spike_weights(packed, bias),
        counts.data_ptr(),
        step.data_ptr(),
        out.data_ptr(),
        step.numel(),
    )
    return out


def spike_weights(packed: PackedWeight, bias: Tensor | None) -> tuple[int, ...]:
    """What the kernels want to know of a weight: kind, addresses, shape, group and strides."""
    assert packed.scales is not None
    return (
        KINDS.index(packed.kind),
        packed.data.data_ptr(),
        packed.scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        packed.in_features,
        packed.out_features,
        packed.group_size,
        *packed.strides,
    )


def _check(counts: Tensor, step: Tensor, packed: PackedWeight, bias: Tensor | None) -> None:
    """Everything a kernel would misread."""
    if packed.scales is None:
        raise ValueError(f"a weight of kind {packed.kind} takes no spike counts")
    if counts.shape[-1] != packed.in_features:
        raise ValueError(f"counts has {counts.shape[-1]} columns, the weight {packed.in_features}")
    if counts.dtype != torch.int32 or step.dtype != torch.float32:
        raise ValueError(f"counts and step are {counts.dtype} and {step.dtype}")
    if step.shape != (*counts.shape[:-1], 1):
        raise ValueError(f"step has shape {tuple(step.shape)}, counts {tuple(counts.shape)}")
    if any(t.device != counts.device for t in (step, packed.data, bias) if t is not None):
        raise ValueError(f"counts are on {counts.device}, something else is not")
    if bias is not None:
        fits = bias.shape == (packed.out_features,) and bias.dtype == torch.float32
        if not fits or not bias.is_contiguous():
            raise ValueError(f"bias is not {packed.out_features} float32 numbers in one piece")
