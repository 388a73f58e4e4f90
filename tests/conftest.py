"""Settings of every test: one thread, one seed, a share of the cores, and memory that bites.

Nothing here may import respike at module level: the shape checks of `--jaxtyping-packages` are
installed after this file is read, and only for what is imported later.
"""

import os
from collections.abc import Callable

import pytest
import torch

torch.set_num_threads(1)


def _share_cores() -> None:
    """Workers keep to their own cores: threads that spin for each other's cores double the time."""
    worker, workers = (os.environ.get(f"PYTEST_XDIST_WORKER{x}", "") for x in ("", "_COUNT"))
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: int(workers)] or cores)


_share_cores()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(torch.iinfo(tensor.dtype).max)

    return poisoned


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN (integers: the largest), so reading it unset shows."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
