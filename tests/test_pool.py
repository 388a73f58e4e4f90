"""The kernels' pool of threads, seen from outside: same bits, and safe at fork and exit."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from kernels import native
from respike.ops.linear import packed_linear
from respike.ops.norm import rms_norm
from respike.ops.packed import PackedWeight, pack

pytestmark = native


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def layer() -> tuple[torch.Tensor, PackedWeight]:
    return torch.randn(33, 130), pack(torch.randn(70 * 64, 130), "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_bits_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, rows: int, activations: str
) -> None:
    x, packed = layer()
    x = x[:rows].to(dtype)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results += [packed_linear(x, packed, None, activations) for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_a_norm_is_cut_by_rows_and_its_bits_are_the_same() -> None:
    x, weight = torch.randn(333, 97), torch.randn(97)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(rms_norm(x, weight, 1e-5))
    assert torch.equal(*results)
    assert torch.equal(results[0][-1:], rms_norm(x[-1:], weight, 1e-5))


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    torch.set_num_threads(3)
    x, packed = layer()
    expected = packed_linear(x, packed)
    wrong = []

    def call() -> None:
        for _ in range(50):
            if not torch.equal(packed_linear(x, packed), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


SCRIPT = """
import importlib, os, sys
import torch
from respike.ops import backends
from respike.ops.linear import packed_linear
from respike.ops.packed import pack

torch.set_num_threads(1)  # torch's own threads do not survive a fork, so none may exist
x, packed = torch.randn(9, 64), pack(torch.randn(6400, 64), "int4")
torch.set_num_threads(3)
expected = packed_linear(x, packed)
workers = importlib.import_module(backends.MODULE).pool_workers
assert workers() == 2
child = os.fork()
if child == 0:
    assert workers() == 0  # threads do not survive a fork
    wanted = expected.numpy().tobytes()
    same = all(packed_linear(x, packed).numpy().tobytes() == wanted for _ in range(50))
    os._exit(0 if same and workers() == 2 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert packed_linear(x, packed).numpy().tobytes() == expected.numpy().tobytes()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_its_own_pool_and_the_process_ends() -> None:
    environment = os.environ | {"RESPIKE_BACKEND": "native"}
    run = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT]
    done = subprocess.run(
        run, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
