"""AMX: its arithmetic on a model of the tiles, and its instructions where they are trapped.

That the kernels equal their definitions is in test_linear.py, test_linear_int8.py and
test_spike_linear.py, at level amx-model.
"""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import at_level, extension, native
from respike.errors import BackendError
from respike.ops import backends
from respike.ops.linear import packed_linear
from respike.ops.packed import PackedWeight, pack
from respike.ops.spike_linear import spike_linear
from tolerance import assert_close

VECTORS = backends.LEVELS.index("avx512bf16")
"""The level whose bits integer products must have."""

TRAP = Path(__file__).with_name("amx_trap.cpp")


def runs(*features: str) -> bool:
    return all(backends.cpu_features().get(name, False) for name in features)


modelled = pytest.mark.skipif(
    not runs("avx512bf16", "avx512vnni"), reason="the model's kernels need AVX-512 with BF16"
)


def model() -> int:
    return int(extension().amx_model)


def at_threads(threads: int, level: int, x: Tensor, packed: PackedWeight, how: str) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with at_level(level):
            return packed_linear(x, packed, None, how)
    finally:
        torch.set_num_threads(before)


@modelled
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.usefixtures("poison")
def test_integer_products_have_the_bits_of_the_vectors(kind: str, group_size: int) -> None:
    for outputs, inputs in ((70, 33), (65, 300), (200, 577)):
        packed = pack(torch.randn(outputs, inputs), kind, group_size)
        for rows in (9, 16, 17, 37, 243):
            x = torch.randn(rows, inputs)
            expected = at_threads(1, VECTORS, x, packed, "int8")
            for threads in (1, 2, 3):
                assert torch.equal(at_threads(threads, model(), x, packed, "int8"), expected)


@modelled
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_bits_depend_neither_on_threads_nor_on_other_rows(kind: str) -> None:
    packed, x = pack(torch.randn(200, 299), kind), torch.randn(243, 299).bfloat16()
    whole = at_threads(1, model(), x, packed, "exact")
    for threads in (2, 3):
        assert torch.equal(at_threads(threads, model(), x, packed, "exact"), whole)
    for first, last in ((0, 9), (5, 21), (200, 243)):
        assert torch.equal(
            at_threads(1, model(), x[first:last], packed, "exact"), whole[first:last]
        )


@modelled
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_what_a_panel_held_before_does_not_matter(kind: str) -> None:
    nothing = pack(torch.full((64, 256), torch.nan), "f32")
    packed, x = pack(torch.randn(70, 33), kind), torch.randn(9, 33).bfloat16()
    expected = at_threads(1, VECTORS, x, packed, "exact")
    assert at_threads(1, model(), torch.ones(9, 256), nothing, "exact").isnan().all()
    assert_close(at_threads(1, model(), x, packed, "exact"), expected)


@modelled
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_spike_counts_have_the_bits_of_the_vectors(kind: str) -> None:
    packed = pack(torch.randn(70, 301), kind)
    counts = torch.randint(-200, 201, (33, 301), dtype=torch.int32)
    step = torch.rand(33, 1)
    results = []
    for level in (VECTORS, model()):
        with at_level(level):
            results.append(spike_linear(counts, step, packed, form="dense"))
    assert torch.equal(*results)


@modelled
def test_even_and_odd_inputs_are_summed_apart_and_subnormals_are_zero() -> None:
    packed = pack(torch.ones(3, 4), "bf16")
    x = torch.zeros(9, 4).bfloat16()
    x[0] = torch.tensor([2.0**30, -(2.0**30), 1.0, 0.0])  # the one is lost beside the even sum
    x[1] = torch.tensor([2.0**30, 1.0, -(2.0**30), 0.0])  # and kept here
    x[2] = torch.tensor([1e-39, 1e-39, 1e-39, 1e-39])
    with at_level(model()):
        got = packed_linear(x, packed)
    assert got[:3, 0].tolist() == [0.0, 1.0, 0.0]
    assert not got[3:].any()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What runs is found out again, in the test and after it."""
    backends.kernels.cache_clear()
    yield monkeypatch
    backends.kernels.cache_clear()


@native
def test_nobody_can_ask_for_the_model(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("RESPIKE_CPU", "amx-model")
    with pytest.raises(BackendError, match=r"'amx-model' is not one of portable, .*, amx$"):
        backends.kernels()


@native
def test_what_is_known_of_the_kernels_here(fresh: pytest.MonkeyPatch) -> None:
    module, _ = backends._load_native()
    features = dict.fromkeys(("amx-tile", "amx-bf16", "amx-int8"), True)
    fresh.delenv("RESPIKE_CPU", raising=False)
    fresh.setattr(module, "cpu_features", lambda: features)
    for level, begins in (("amx", "runs products"), ("avx512bf16", "compiled, not run: switched")):
        fresh.setattr(module, "cpu_level", lambda level=level: level)
        backends.kernels.cache_clear()
        assert backends.amx_status().startswith(begins)
    features["amx-int8"] = False
    assert "not run on this processor (no amx-int8)" in backends.amx_status()
    features.clear()
    assert backends.amx_status() == "not compiled"


@modelled
@pytest.mark.skipif(runs("amx-tile"), reason="this processor has AMX: nothing to trap")
@pytest.mark.skipif(platform.system() != "Linux", reason="the trap is written for Linux")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the trap with")
def test_trapped_instructions_do_what_the_model_does(tmp_path: Path) -> None:
    program = tmp_path / "trap"
    subprocess.run(["g++", "-std=c++17", "-O2", TRAP, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 1000, done.stdout
