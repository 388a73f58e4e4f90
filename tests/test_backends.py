import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec

import pytest
import torch

from kernels import native
from respike.errors import BackendError
from respike.ops import backends
from respike.ops.norm import rms_norm


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the environment asked for is read again, in the test and after it."""
    monkeypatch.delenv("RESPIKE_BACKEND", raising=False)
    monkeypatch.delenv("RESPIKE_CPU", raising=False)
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget() -> None:
    backends.kernels.cache_clear()
    backends._load_native.cache_clear()


def pretend_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)


def pretend_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise ImportError("libstdc++.so.6: version `GLIBCXX_9' not found")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr("importlib.import_module", refuse)


def ones() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2, 8), torch.ones(8)


@native
@pytest.mark.parametrize("asked", ["", "auto", "native"])
def test_native_runs_when_it_can(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESPIKE_BACKEND", asked)
    (row,) = [row for row in backends.table() if row.op == "rms_norm"]
    assert row.backend == "native"
    assert row.level in backends.LEVELS
    assert row.others.keys() == {"torch"}
    assert backends.choose("rms_norm", *ones()) is not None


def test_torch_runs_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESPIKE_BACKEND", "torch")
    assert backends.choose("rms_norm", *ones()) is None
    assert all(row.backend == "torch" and row.level is None for row in backends.table())


def test_an_unknown_backend_is_refused_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESPIKE_BACKEND", "nativ")
    with pytest.raises(BackendError, match="'nativ' is not one of auto, torch, native") as caught:
        rms_norm(*ones(), 1e-5)
    assert caught.value.hint == "did you mean `native`?"


def test_without_the_extension_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_not_built(monkeypatch)
    assert not backends.native_status().available
    assert backends.choose("rms_norm", *ones()) is None
    assert all("RESPIKE_NATIVE=0" in row.others["native"] for row in backends.table())


def test_without_the_extension_native_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_not_built(monkeypatch)
    monkeypatch.setenv("RESPIKE_BACKEND", "native")
    with pytest.raises(BackendError, match="not built: respike was installed with"):
        rms_norm(*ones(), 1e-5)


def test_a_broken_extension_keeps_its_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_broken(monkeypatch)
    assert "`GLIBCXX_9' not found" in backends.native_status().reason
    monkeypatch.setenv("RESPIKE_BACKEND", "native")
    with pytest.raises(BackendError, match=r"does not import: .*GLIBCXX_9"):
        rms_norm(*ones(), 1e-5)


@native
@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.ones(2, 8).half(), torch.ones(8).half(), "no kernel for torch.float16"),
        (torch.ones(2, 8).bfloat16(), torch.ones(8), "mix torch.bfloat16 and torch.float32"),
        (torch.ones(2, 8, device="meta"), torch.ones(8), "a tensor is on meta"),
        (torch.ones(2, 8, requires_grad=True), torch.ones(8), "a gradient is needed"),
    ],
    ids=["dtype", "mixed", "device", "gradient"],
)
def test_what_kernels_cannot_do_runs_in_torch_or_raises_if_native_was_asked_for(
    x: torch.Tensor, weight: torch.Tensor, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backends.choose("rms_norm", x, weight) is None
    forget()
    monkeypatch.setenv("RESPIKE_BACKEND", "native")
    with pytest.raises(BackendError, match=reason):
        backends.choose("rms_norm", x, weight)


@native
def test_a_gradient_that_nobody_records_is_no_obstacle() -> None:
    x, weight = ones()
    with torch.no_grad():
        assert backends.choose("rms_norm", x, weight.requires_grad_()) is not None


@native
@pytest.mark.parametrize("level", backends.LEVELS)
def test_the_level_can_be_lowered_but_not_raised(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESPIKE_CPU", level)
    module, _ = backends._load_native()
    assert module is not None
    if backends.LEVELS.index(level) > backends.LEVELS.index(module.cpu_level()):
        with pytest.raises(BackendError, match="more than this processor can run"):
            backends.kernels()
    else:
        assert backends.table()[0].level == level


@native
def test_more_than_the_processor_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = backends._load_native()
    monkeypatch.setattr(module, "cpu_level", lambda: "portable")
    monkeypatch.setenv("RESPIKE_CPU", "avx2")
    with pytest.raises(BackendError, match="'avx2' is more than this processor") as caught:
        backends.kernels()
    assert caught.value.hint is not None
    assert "portable" in caught.value.hint


@native
def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESPIKE_CPU", "avx1024")
    with pytest.raises(BackendError, match="'avx1024' is not one of portable, avx2, avx512"):
        backends.kernels()


@native
def test_the_environment_of_a_process_decides() -> None:
    code = "from respike.ops import backends; print(backends.table()[0].level)"
    environment = os.environ | {"RESPIKE_CPU": "portable", "RESPIKE_BACKEND": "native"}
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("portable\n", "")


def test_features_are_named() -> None:
    features = backends.cpu_features()
    assert all(isinstance(has, bool) for has in features.values())
    ready = backends.kernels()
    if ready and backends.LEVELS[ready.level] == "avx512":
        assert features["avx512f"]
        assert features["avx2"]
