"""Benchmarks run for hours and are run seldom: at least they begin."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_all_that_a_benchmark_imports_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "harness":
        pytest.importorskip("lm_eval")
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert importlib.import_module(name).__doc__
