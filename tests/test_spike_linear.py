"""Spike products: the dense form and the events of every level have the definition's bits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import at_level, each_product_level, extension, native
from respike.ops.packed import KINDS, PackedWeight, pack, unpack
from respike.ops.placing import place_side_by_side
from respike.ops.spike_linear import (
    Form,
    spike_linear,
    spike_linear_definition,
    spike_linear_dense,
    spike_weights,
)
from tolerance import assert_close

INT_KINDS = ("int8", "int4")
SHAPES = ((1, 1), (64, 64), (70, 33), (200, 577), (65, 300))
"""(O, I): one tile and several, whole and not; groups, whole and not."""

MANY = 33
"""Rows of which the kernels take more than one at a time, and some remain."""
FORMS: tuple[Form, ...] = ("best", "events", "dense")

each_kind = pytest.mark.parametrize("kind", INT_KINDS)
Case = tuple[Tensor, Tensor, PackedWeight, Tensor]


def case(kind: str, outputs: int, inputs: int, rows: int, group: int = 32, most: int = 127) -> Case:
    packed = pack(0.1 * torch.randn(outputs, inputs), kind, group)
    counts = torch.randint(-most, most + 1, (rows, inputs), dtype=torch.int32)
    silent = torch.rand(rows, inputs) < torch.linspace(0, 1, rows)[:, None]
    counts = counts.masked_fill(silent, 0)
    return counts, torch.rand(rows, 1) + 0.01, packed, torch.randn(outputs)


def by_hand(counts: Tensor, step: Tensor, packed: PackedWeight, bias: Tensor) -> Tensor:
    return (counts.double() @ unpack(packed).double().T * step.double() + bias).float()


@each_kind
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_definition_multiplies_what_counts_and_weights_stand_for(kind: str, group: int) -> None:
    counts, step, packed, bias = case(kind, 70, 333, 5, group)
    got = spike_linear_definition(counts, step, packed, bias)
    assert_close(got, by_hand(counts, step, packed, bias))
    whole = spike_linear_definition(counts.view(1, 5, 333), step.view(1, 5, 1), packed)
    assert torch.equal(whole[0] + bias, got)


@each_kind
@pytest.mark.parametrize("most", [1, 127, 40_000, 2**31 - 1])
@pytest.mark.usefixtures("poison")
def test_the_dense_form_has_the_definitions_bits(kind: str, most: int) -> None:
    for outputs, inputs in SHAPES:
        for rows in (1, 3, MANY):
            counts, step, packed, bias = case(kind, outputs, inputs, rows, most=most)
            for b in (bias, None):
                expected = spike_linear_definition(counts, step, packed, b)
                assert torch.equal(spike_linear_dense(counts, step, packed, b), expected)


def test_the_dense_form_is_exact_where_torch_may_round() -> None:
    counts, step, packed, bias = case("int8", 70, 333, 40, 128)
    expected = spike_linear_definition(counts, step, packed, bias)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(spike_linear_dense(counts, step, packed, bias), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@each_kind
def test_silent_rows_and_no_rows(kind: str) -> None:
    counts, step, packed, bias = case(kind, 70, 33, 3)
    nothing = torch.zeros_like(counts)
    for form in (spike_linear, spike_linear_dense):
        assert torch.equal(form(nothing, step, packed, bias), bias.expand(3, -1))
        assert form(counts[:0], step[:0], packed, bias).shape == (0, 70)


def test_what_does_not_fit_is_refused() -> None:
    counts, step, packed, bias = case("int8", 6, 4, 2)
    unchecked = getattr(spike_linear, "__wrapped__", spike_linear)
    for bad, message in (
        ((counts[:, :3], step, packed, bias), "counts has 3 columns"),
        ((counts.long(), step, packed, bias), "counts and step are torch.int64"),
        ((counts, step[:1], packed, bias), "step has shape"),
        ((counts, step, packed, bias[:3]), "bias is not 6 float32"),
        ((counts, step.to("meta"), packed, bias), "counts are on cpu"),
        ((counts, step, pack(torch.randn(6, 4), "bf16"), bias), "kind bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            unchecked(*bad)


# ---- events


def side_by_side(packed: PackedWeight) -> PackedWeight:
    """The same weight in the long rows of memory that it shares with another."""
    other = pack(torch.randn(130, packed.in_features), packed.kind, packed.group_size)
    ((_, placed),) = place_side_by_side([[other, packed]])
    return placed


@native
@each_product_level
@each_kind
@pytest.mark.parametrize("most", [1, 127, 400, 32_767, 40_000, 2**31 - 1])
@pytest.mark.usefixtures("poison")
def test_every_form_has_the_definitions_bits(level: int, kind: str, most: int) -> None:
    for outputs, inputs in SHAPES:
        for rows in (1, 5, MANY):
            counts, step, packed, bias = case(kind, outputs, inputs, rows, most=most)
            expected = spike_linear_definition(counts, step, packed, bias)
            with at_level(level):
                for weight in (packed, side_by_side(packed)):
                    for form in FORMS:
                        got = spike_linear(counts, step, weight, bias, form)
                        assert torch.equal(got, expected), (outputs, inputs, rows, form)
                got = spike_linear(counts[-1], step[-1], packed)
            assert torch.equal(got, spike_linear_definition(counts[-1], step[-1], packed))


def test_rows_in_pieces_are_refused() -> None:
    counts, step, packed, _ = case("int8", 70, 33, 1)
    pieces = packed.data.transpose(1, 2).contiguous().transpose(1, 2)
    broken = PackedWeight("int8", pieces, packed.scales, 33, 70, 32)
    with pytest.raises(ValueError, match="rows in pieces"):
        spike_weights(broken, None)
    assert counts.shape == (1, 33)
    assert step.shape == (1, 1)


@native
@each_product_level
@each_kind
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_largest_sums_do_not_overflow(level: int, kind: str, group: int) -> None:
    packed = pack(torch.where(torch.rand(70, 301) < 0.5, 1.0, -1.0), kind, group)
    for count in (32_767, -32_767, 32_768, -(2**31) + 1):
        counts = torch.full((3, 301), count, dtype=torch.int32)
        counts[1] = -counts[1]
        counts[2, 17:] = 0
        step = torch.rand(3, 1)
        with at_level(level):
            got, dense = (spike_linear(counts, step, packed, None, form) for form in FORMS[1:])
        assert torch.equal(got, spike_linear_definition(counts, step, packed))
        assert torch.equal(dense, got)
        assert torch.equal(spike_linear_dense(counts, step, packed), got)


@native
@each_product_level
@each_kind
def test_bits_do_not_depend_on_the_number_of_threads(level: int, kind: str) -> None:
    counts, step, packed, bias = case(kind, 900, 577, 3)
    with at_level(level):
        alone = spike_linear(counts, step, packed, bias)
        torch.set_num_threads(3)
        try:
            together = spike_linear(counts, step, packed, bias)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(alone, together)


@native
@each_product_level
@each_kind
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("rows", [1, 9])
def test_nothing_is_written_outside_unaligned_buffers(
    level: int, kind: str, form: Form, rows: int
) -> None:
    outputs, inputs = 67, 33
    counts, step, packed, bias = case(kind, outputs, inputs, rows)
    expected = spike_linear_definition(counts, step, packed, bias)
    assert packed.scales is not None
    tensors = dict(counts=counts, step=step, data=packed.data, scales=packed.scales, bias=bias)
    guarded = {}
    for name, t in (tensors | dict(out=torch.zeros_like(expected))).items():
        guard = torch.full((33,), torch.nan if t.is_floating_point() else 127).to(t.dtype)
        guarded[name] = torch.cat([guard, t.flatten(), guard])
    at = {name: t.data_ptr() + 33 * t.element_size() for name, t in guarded.items()}
    weights = [at[name] for name in ("data", "scales", "bias")]
    weight = (KINDS.index(kind), *weights, inputs, outputs, 32, *packed.strides)
    buffers = [at[name] for name in ("counts", "step", "out")]
    extension().spike_linear(level, 1, FORMS.index(form), weight, *buffers, rows)
    out = guarded["out"]
    assert torch.equal(out[33:-33].view(rows, outputs), expected)
    assert out[:33].isnan().all()
    assert out[-33:].isnan().all()


GUARDED = """
import ctypes, mmap, sys
import torch
from respike.ops.packed import PackedWeight, pack
from respike.ops.spike_linear import spike_linear, spike_linear_definition

kind, rows, break_it = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "touch"
row_bytes, tiles, blocks = 64 if kind == "int8" else 32, 4, 6
per_page = mmap.PAGESIZE // (row_bytes * tiles)
inputs, outputs = blocks * per_page, 64 * tiles - 3
packed = pack(torch.randn(outputs, inputs), kind, 32)
counts = torch.randint(-127, 128, (rows, inputs), dtype=torch.int32)
silent = [1, 2, 5]
for block in silent:
    counts[:, block * per_page : (block + 1) * per_page] = 0
counts[-1, :per_page] = 0
step = torch.rand(rows, 1)
expected = spike_linear_definition(counts, step, packed)
if break_it:
    counts[0, 2 * per_page + 3] = 1

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
memory = mmap.mmap(-1, packed.data.nbytes)
data = torch.frombuffer(memory, dtype=packed.data.dtype).view(inputs, tiles, row_bytes)
data.copy_(packed.data.transpose(0, 1))
assert data.data_ptr() % mmap.PAGESIZE == 0
placed = PackedWeight(kind, data.transpose(0, 1), packed.scales, inputs, outputs, 32)
for block in silent:
    assert libc.mprotect(data.data_ptr() + block * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0

assert torch.equal(spike_linear(counts, step, placed, None, "events"), expected)
print("never touched")
"""


@native
@pytest.mark.skipif(sys.platform != "linux", reason="page protection is asked for as on Linux")
@each_product_level
@each_kind
def test_a_silent_inputs_memory_is_never_touched(level: int, kind: str) -> None:
    """Its pages cannot be read: a kernel that touches one dies. In the engine's layout."""
    rows = 2 if kind == "int8" else 1

    def run(how: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", GUARDED, kind, str(rows), how]
        with at_level(level):
            return subprocess.run(
                words, capture_output=True, text=True, check=False, cwd=Path.cwd()
            )

    spared = run("spare")
    assert spared.returncode == 0, spared.stderr
    assert spared.stdout.strip() == "never touched"
    if level == 0:  # and the guard bites: one event there, and the same program dies of it
        died = run("touch")
        assert died.returncode < 0 or "AddressSanitizer: SEGV" in died.stderr
