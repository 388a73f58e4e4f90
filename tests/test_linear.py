"""Packed linear layers: every kind and level against the definition."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kernels import at_level, each_product_level, extension, native
from respike.layers.linear import PackedLinear
from respike.ops.linear import (
    packed_linear,
    packed_linear_definition,
    packed_linears,
)
from respike.ops.packed import KINDS, PackedWeight, pack, unpack
from tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 65)
SHAPES = ((1, 1), (64, 64), (70, 33), (200, 577), (65, 300))
"""(O, I): one tile and several, whole and not; groups, chunks and panels, whole and not."""


def layer(kind: str, outputs: int, inputs: int) -> tuple[PackedWeight, Tensor]:
    return pack(0.1 * torch.randn(outputs, inputs), kind), torch.randn(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_multiplies_what_the_packed_weight_stands_for(kind: str) -> None:
    packed, bias = layer(kind, 70, 33)
    x = torch.randn(2, 3, 33)
    expected = torch.einsum("bti,oi->bto", x.double(), unpack(packed).double()) + bias
    assert_close(packed_linear_definition(x, packed, bias), expected.float())


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_every_level_matches_the_definition(level: int, kind: str, dtype: torch.dtype) -> None:
    with at_level(level):
        for outputs, inputs in SHAPES:
            packed, bias = layer(kind, outputs, inputs)
            for rows in ROWS:
                x = torch.randn(rows, inputs).to(dtype)
                got = packed_linear(x, packed, bias)
                assert_close(got, packed_linear_definition(x, packed, bias))


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_rows_beyond_a_block(level: int, kind: str, dtype: torch.dtype) -> None:
    packed, bias = layer(kind, 70, 45)
    for rows in (239, 241, 485):
        x = torch.randn(rows, 45).to(dtype)
        with at_level(level):
            got = packed_linear(x, packed, bias)
        assert_close(got, packed_linear_definition(x, packed, bias))


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 65])
def test_bf16_is_rounded_once_and_products_are_exact(level: int, kind: str, rows: int) -> None:
    packed, _ = layer(kind, 128, 577)
    x = torch.randn(rows, 577).bfloat16()
    expected = x.double() @ unpack(packed).double().T
    with at_level(level):
        got = packed_linear(x, packed)
    # Only the rounding of the output: weights or activations rounded to bfloat16 would double it.
    assert (got.double() - expected).norm() / expected.norm() < 1.8e-3
    assert (got != expected.bfloat16()).float().mean() < 0.01


@native
@each_product_level
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_larger_groups(level: int, kind: str, group_size: int) -> None:
    packed = pack(torch.randn(65, 301), kind, group_size)
    for rows in (2, 13):
        for dtype in DTYPES:
            x = torch.randn(rows, 301).to(dtype)
            with at_level(level):
                got = packed_linear(x, packed)
            assert_close(got, packed_linear_definition(x, packed))


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 33), (5, 33), (11, 33), (11, 34), (19, 34)])
def test_nothing_is_written_or_read_outside_unaligned_buffers(
    level: int, kind: str, dtype: torch.dtype, rows: int, inputs: int
) -> None:
    outputs = 67
    packed, bias = layer(kind, outputs, inputs)
    x = torch.randn(rows, inputs).to(dtype)
    expected = packed_linear_definition(x, packed, bias)
    guarded = {}
    result = torch.zeros_like(expected)
    scales = packed.scales if packed.scales is not None else torch.zeros(1).half()
    for name, t in dict(x=x, data=packed.data, scales=scales, bias=bias, out=result).items():
        filler = 127 if not t.is_floating_point() else torch.nan
        guard = torch.full((33,), filler, dtype=t.dtype)
        guarded[name] = torch.cat([guard, t.flatten(), guard])
    at = {name: t.data_ptr() + 33 * t.element_size() for name, t in guarded.items()}
    if packed.scales is None:
        at["scales"] = 0
    suffix = "f32" if dtype == torch.float32 else "bf16"
    kernel = getattr(extension(), f"packed_linears_{suffix}")
    buffers = (KINDS.index(kind), at["data"], at["scales"], at["bias"])
    matrix = (*buffers, outputs, 32, at["out"], outputs)
    kernel(level, 1, at["x"], rows, inputs, [matrix], False)
    out = guarded["out"]
    assert_close(out[33:-33].view(rows, outputs), expected)
    assert out[:33].isnan().all()
    assert out[-33:].isnan().all()


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [2.0**-12, 2.0**10])
def test_extreme_scales(level: int, kind: str, scale: float) -> None:
    packed = pack(scale * torch.randn(64, 96), kind)
    for rows in (2, 12):
        for dtype in DTYPES:
            x = (torch.randn(rows, 96) / scale).to(dtype)
            with at_level(level):
                got = packed_linear(x, packed)
            assert_close(got, packed_linear_definition(x, packed))


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 12])
def test_zeros_stay_zero_and_nan_stays_in_its_row(level: int, kind: str, rows: int) -> None:
    packed, _ = layer(kind, 70, 33)
    for dtype in DTYPES:
        x = torch.randn(rows, 33).to(dtype)
        x[1], x[2, 32] = 0.0, torch.nan
        with at_level(level):
            got = packed_linear(x, packed)
        assert torch.equal(got[1], torch.zeros_like(got[1]))
        assert got[2].isnan().all()
        assert not got[[i for i in range(rows) if i != 2]].isnan().any()


@native
@each_product_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 40), (40,), (0, 40), (1, 40)], ids=["B T I", "I", "none", "one"]
)
def test_leading_dimensions_and_strides(
    level: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    packed, bias = layer("int8", 70, 40)
    wide = torch.randn(*shape[:-1], 80).to(dtype)
    with at_level(level):
        got = packed_linear(wide[..., ::2], packed, bias)
    assert got.shape == (*shape[:-1], 70)
    assert_close(got, packed_linear_definition(wide[..., ::2], packed, bias))


@native
@each_product_level
def test_a_row_does_not_depend_on_its_company(level: int) -> None:
    packed, bias = layer("int4", 70, 100)
    x = torch.randn(8, 100)
    with at_level(level):
        together = packed_linear(x, packed, bias)
        assert torch.equal(packed_linear(x[4:], packed, bias), together[4:])


@native
@each_product_level
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_several_matrices_give_what_each_gives_alone(
    level: int, activations: str, dtype: torch.dtype
) -> None:
    sizes = (("int8", 70, 32), ("int4", 5, 128), ("int8", 129, 64), ("int4", 64, 32))
    weights = [pack(torch.randn(outputs, 77), kind, group) for kind, outputs, group in sizes]
    if activations == "exact":
        weights += [pack(torch.randn(66, 77), kind) for kind in ("bf16", "f32")]
    biases = [torch.randn(w.out_features) if i % 2 else None for i, w in enumerate(weights)]
    for rows in (1, 7, 19, 243):
        x = torch.randn(rows, 77).to(dtype)
        with at_level(level):
            together = packed_linears(x, weights, biases, activations)
            alone = [
                packed_linear(x, w, b, activations) for w, b in zip(weights, biases, strict=True)
            ]
        assert [t.shape for t in together] == [a.shape for a in alone]
        assert all(torch.equal(t, a) for t, a in zip(together, alone, strict=True))


def test_several_matrices_in_torch() -> None:
    weights = [layer(kind, outputs, 33)[0] for kind, outputs in (("int8", 7), ("f32", 70))]
    x = torch.randn(2, 3, 33, requires_grad=True)
    results = packed_linears(x, weights)
    for got, packed in zip(results, weights, strict=True):
        assert torch.equal(got, packed_linear_definition(x, packed))
    unchecked = getattr(packed_linears, "__wrapped__", packed_linears)
    with pytest.raises(ValueError, match="1 biases for 2 weights"):
        unchecked(x, weights, [None])


def test_what_does_not_fit_is_refused() -> None:
    packed, bias = layer("int8", 6, 4)
    x = torch.randn(2, 4)
    unchecked = getattr(packed_linear, "__wrapped__", packed_linear)
    with pytest.raises(ValueError, match="x has 3 columns, the weight 4 inputs"):
        unchecked(x[:, :3], packed, bias)
    with pytest.raises(ValueError, match="x is on meta"):
        unchecked(x.to("meta"), packed, bias)


@native
def test_buffers_that_a_kernel_would_misread_are_refused() -> None:
    packed, bias = layer("int8", 6, 4)
    x = torch.randn(2, 4)
    unchecked = getattr(packed_linear, "__wrapped__", packed_linear)
    assert packed.scales is not None
    for bad in (bias[:3], bias.double(), bias.repeat(2)[::2]):
        with at_level(0), pytest.raises(ValueError, match="bias is not 6 float32"):
            unchecked(x, packed, bad)
    for bad in (packed.scales.float(), torch.stack([packed.scales] * 2, -1)[..., 0]):
        with at_level(0), pytest.raises(ValueError, match="a buffer is"):
            unchecked(x, replace(packed, scales=bad), bias)


def test_gradients_reach_the_input() -> None:
    packed, bias = layer("int8", 6, 4)
    x = torch.randn(2, 4, requires_grad=True)
    packed_linear(x, packed, bias).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, unpack(packed).sum(0).expand(2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_stands_in_for_a_linear_one(kind: str, bias: bool) -> None:
    linear = nn.Linear(33, 70, bias=bias).bfloat16()
    packed = PackedLinear.from_linear(linear, kind)
    x = torch.randn(2, 5, 33).bfloat16()
    got, expected = packed(x), linear(x)
    assert got.shape == expected.shape
    assert got.dtype == torch.bfloat16
    rms = (got - expected).float().norm() / expected.float().norm()
    assert rms < {"f32": 5e-3, "bf16": 5e-3, "int8": 1e-2, "int4": 0.15}[kind]
    assert not list(packed.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_does_not_cast_packed_weights(kind: str) -> None:
    layer = PackedLinear.from_linear(nn.Linear(33, 70), kind)
    before = [b.clone() for b in layer.buffers()]
    assert layer.packed.data is layer.data
    for after in (layer.bfloat16(), layer.double(), layer.to("cpu", torch.float16)):
        assert all(torch.equal(a, b) for a, b in zip(after.buffers(), before, strict=True))
    assert layer(torch.randn(2, 33)).dtype == torch.float32


def test_a_loaded_state_replaces_the_weight() -> None:
    layer, other = (PackedLinear.from_linear(nn.Linear(33, 70), "int8") for _ in range(2))
    x = torch.randn(2, 33)
    expected = other(x)
    assert not torch.equal(layer(x), expected)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer(x), expected)
