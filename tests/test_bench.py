"""bench and plan: the gate, who runs when, resuming, fits, counts, and how they refuse."""

import importlib
import io
import json
import sys
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from kernels import native
from refusal import one_line
from respike.account import flops_per_token, moved_bytes_per_token, num_parameters, state_bytes
from respike.bench import contenders, gate, machine, predict, run, session
from respike.bench.contenders import Contender, Field, Subject, find_original
from respike.bench.fits import fit, predicted_seconds
from respike.bench.process import ChildError, Outcome, TooSlowError, run_child
from respike.bench.prompts import Prompts
from respike.bench.report import fitted_rows, ratios, row_of
from respike.bench.results import Results
from respike.bench.run import quoted
from respike.bench.rwkv7 import write_rwkv7
from respike.bench.session import Session, Settings, parse_lengths
from respike.bench.shapes import SHAPES, random_checkpoint, shape_config
from respike.checkpoint import open_checkpoint
from respike.cli import main
from respike.cli.bench_text import best_of_groups
from respike.conversion import convert, plan
from respike.errors import BackendError, CheckpointError, DataError, RespikeError, UsageError
from respike.layers.span import Span
from respike.loading import load_decoder, load_tokenizer
from respike.models.engine import Engine, LayerStates
from respike.ops import backends
from respike.recipe import load_recipe
from tiny import D, F, H, K, V, full, model_config, save_tiny, window, write_gguf


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original and its conversion, side by side."""
    place = tmp_path_factory.mktemp("bench")
    write_gguf(place / "tiny.gguf", save_tiny(place / "tiny"))
    recipe = load_recipe("window", ["window_tokens=16"])
    convert(plan(place / "tiny.gguf", recipe), place / "win")
    convert(plan(place / "tiny", recipe), place / "of-folder")
    return place


def local(module: str, job: Mapping[str, Any], **_: Any) -> Outcome:
    """`run_child` without a process."""
    began = time.time()
    try:
        prepare = importlib.import_module(f"respike.bench.{module}").prepare
        facts, work = prepare(dict(job) | {"began": began})
        return Outcome(facts, work(), 1 << 20, 2 << 20, began)
    except RespikeError as error:
        raise ChildError(str(error), hint=error.hint) from error


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in (run, session, contenders):
        monkeypatch.setattr(user, "run_child", local)


@pytest.fixture
def respike(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(predict, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 20)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["respike", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


SHORT = ("--threads", 1, "--decode", 2, "--repeats", 2)


# ---- processes -------------------------------------------------------------------------------


def child(tmp_path: Path, body: str) -> str:
    """A module for `run_child`; the body is that of ``run``, with ``job`` at hand."""
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    text = f"import os, sys, time\ndef prepare(job):\n    def run():\n{lines}\n"
    (tmp_path / "job.py").write_text(text + "    return {'twice': 2 * job['n']}, run\n")
    return str(tmp_path / "job")


def test_a_process_says_what_it_found_and_what_it_used(tmp_path: Path) -> None:
    body = "print('noise')\nblock = bytearray(b'x' * (64 << 20))\nreturn {'n': job['n']}"
    outcome = run_child(child(tmp_path, body), {"n": 21})
    assert outcome.facts == {"twice": 42}
    assert outcome.result == {"n": 21}
    if outcome.peak_rss_bytes is not None:
        assert outcome.base_rss_bytes is not None
        assert outcome.peak_rss_bytes - outcome.base_rss_bytes > 60 << 20


def test_a_process_that_dies_or_fails_is_an_error_that_says_why(tmp_path: Path) -> None:
    dying = child(tmp_path, "print('last words', file=sys.stderr, flush=True)\nos._exit(7)")
    with pytest.raises(ChildError, match="code 7: last words"):
        run_child(dying, {"n": 1})
    with pytest.raises(ChildError, match="KeyError: 'missing'"):
        run_child(child(tmp_path, "return job['missing']"), {"n": 1})
    with pytest.raises(ChildError, match="no-such-python: cannot be started"):
        run_child(dying, {"n": 1}, python="/no-such-python")


def test_a_process_is_ended_at_its_limit(tmp_path: Path) -> None:
    began = time.perf_counter()
    with pytest.raises(TooSlowError, match="more than 0 s"):
        run_child(child(tmp_path, "time.sleep(60)"), {"n": 1}, max_seconds=0.4)
    assert time.perf_counter() - began < 20


# ---- fits ------------------------------------------------------------------------------------


def test_fits_find_the_polynomial_they_were_made_of() -> None:
    points = [(n, 0.5 + 3e-3 * n + 2e-6 * n * n) for n in (100, 1000, 4000, 9000)]
    found = fit(points, 2)
    assert found is not None
    assert found.coefficients == pytest.approx((0.5, 3e-3, 2e-6))
    assert found.largest_error_frac < 1e-9
    assert found.at(100_000) == pytest.approx(0.5 + 300 + 20_000)
    assert found.points == 4


def test_a_fit_has_no_negative_part_and_errs_relatively() -> None:
    # Least squares with signs would take a negative constant and cross zero.
    falling = fit([(1000, 1.0), (2000, 4.2), (4000, 17.0)], 2)
    assert falling is not None
    assert min(falling.coefficients) >= 0
    assert falling.at(10) > 0
    assert falling.at(8000) == pytest.approx(67, rel=0.1)
    rates = fit([(1000, 10.0), (2000, 9.0), (3000, 11.0)], 1)
    assert rates is not None
    assert rates.at(10**6) < 10 * 2**9
    assert 0.05 < rates.largest_error_frac < 0.12


def test_two_points_are_no_fit() -> None:
    assert fit([(1, 1.0), (2, 2.0)], 1) is None


def test_seconds_are_predicted_by_the_last_trend() -> None:
    assert predicted_seconds([], 64) == 0
    assert predicted_seconds([(10, 1.0)], 20) == 4
    assert predicted_seconds([(10, 1.0)], 20, grows=False) == 2
    assert predicted_seconds([(10, 1.0), (20, 2.0)], 40) == pytest.approx(4)
    assert predicted_seconds([(10, 1.0), (20, 9.0)], 40) == pytest.approx(36)
    assert predicted_seconds([(10, 2.0), (20, 1.0)], 40) == pytest.approx(2)


# ---- lengths and prompts ---------------------------------------------------------------------


def test_lengths_are_read_as_people_write_them() -> None:
    assert parse_lengths("64k,512, 1M,512") == (512, 65536, 1 << 20)


@pytest.mark.parametrize("text", ["", "k", "1", "0x10", "-5", "1.5k", "1k,,2k", "17M", "\u0665k"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected 2 to 16M tokens") as caught:
        parse_lengths(text)
    one_line(caught.value)


def test_prompts_are_text_and_never_the_same(place: Path) -> None:
    source = open_checkpoint(place / "tiny.gguf")
    tokenizer = load_tokenizer(source)
    prompts = Prompts(tokenizer, source.config)
    longer = 3 * len(prompts.ids) // 2
    for length in (37, longer):
        one, two = prompts.make(length, 0), prompts.make(length, 1)
        assert len(one) == len(two) == length
        assert one == prompts.make(length, 0)
        assert one[:20] != two[:20]
    text = tokenizer.decode(list(prompts.make(60, 0)))
    whole = tokenizer.decode(prompts.ids)
    assert text[3:-3] in whole
    random = Prompts(None, source.config).make(5000, 0)
    assert 0 <= min(random) < max(random) < V


def test_a_long_prompt_does_not_repeat_itself_in_step(place: Path) -> None:
    source = open_checkpoint(place / "tiny.gguf")
    prompts = Prompts(load_tokenizer(source), source.config)
    size = len(prompts.ids)
    ids = np.array(prompts.make(3 * size, 0))
    assert (ids[size:] == ids[:-size]).mean() < 0.5  # tiling would give 1


# ---- the session -----------------------------------------------------------------------------


def contender(name: str, group: str | None = None, *, grows: bool = False) -> Contender:
    return Contender(name, group or name, "ours", {"name": name}, grows)


class Fake:
    """`run_child` with made-up seconds, by contender and length."""

    def __init__(self, seconds: Callable[[str, int], float]) -> None:
        self.seconds, self.calls = seconds, list[tuple[str, int]]()

    def __call__(self, _: str, job: Mapping[str, Any], **limits: Any) -> Outcome:
        length = Path(job["tokens_file"]).stat().st_size // 4
        self.calls.append((job["name"], length))
        took = self.seconds(job["name"], length)
        if took < 0:
            raise ChildError("its process ended with code -9")
        if took > limits["max_seconds"]:
            raise TooSlowError("took too long")
        result = {"ttft_seconds": took, "decode_seconds": took / 4, "state_bytes": 8 * length}
        return Outcome({"weight_bytes": 1000}, result, 1, 2, 0.0)


def settings(*lengths: int, repeats: int = 1, limit: float = 100.0) -> Settings:
    return Settings(lengths, repeats, 2, 1, float(limit))


def measured(
    fake: Fake, names: list[Contender], how: Settings, results: Results, folder: Path
) -> Session:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "run_child", fake)
        made = Session(names, how, results, Prompts(None, model_config()), folder)
        made.run(lambda *_: None)
    return made


def test_contenders_take_turns(tmp_path: Path) -> None:
    fake, results = Fake(lambda *_: 1.0), Results(None, {}, {})
    measured(fake, [contender("a"), contender("b")], settings(8, repeats=3), results, tmp_path)
    assert [name for name, _ in fake.calls] == ["a", "b", "b", "a", "a", "b"]
    assert [p["repeat"] for p in results.points] == [0, 0, 1, 1, 2, 2]


def test_a_crash_loses_nothing_and_a_second_call_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    broken = True

    def seconds(name: str, length: int) -> float:
        return -1.0 if broken and name == "b" and length == 16 else 1.0

    how, names = settings(8, 16, repeats=2), [contender("a"), contender("b")]
    first = measured(Fake(seconds), names, how, Results(out, {"k": 1}, {}), tmp_path)
    stored = json.loads(out.read_text())["points"]
    assert sum("error" not in p for p in stored) == 6
    assert [(s["contender"], s["length"]) for s in first.skipped] == [("b", 16)]
    assert "-9" in first.skipped[0]["reason"]
    broken = False
    again = Fake(seconds)
    second = measured(again, names, how, Results(out, {"k": 1}, {}), tmp_path)
    assert again.calls == [("b", 16), ("b", 16)]
    assert second.skipped == []
    stored = json.loads(out.read_text())["points"]
    assert len(stored) == 8
    assert not any("error" in p for p in stored)
    assert list(tmp_path.glob(".out*")) == []


def test_what_would_take_too_long_is_not_tried(tmp_path: Path) -> None:
    fake = Fake(lambda _, n: (n / 10) ** 2)
    made = measured(
        fake, [contender("a")], settings(10, 20, 200, limit=50), Results(None, {}, {}), tmp_path
    )
    assert fake.calls == [("a", 10), ("a", 20)]
    assert "would take about 500 s, more than 50 s" in made.skipped[0]["reason"]


def test_what_was_ended_is_not_tried_again_unless_given_longer(tmp_path: Path) -> None:
    out, names = tmp_path / "out.json", [contender("a")]

    def again(limit: float) -> Fake:
        fake = Fake(lambda *_: 60.0)
        how = settings(10, 20, limit=limit)
        measured(fake, names, how, Results(out, {}, {}), tmp_path)
        return fake

    assert again(40).calls == [("a", 10)]
    assert again(40).calls == []
    assert again(500).calls == [("a", 10), ("a", 20)]


def test_a_slow_point_is_measured_once(tmp_path: Path) -> None:
    fake = Fake(lambda name, _: 700.0 if name == "slow" else 1.0)
    names = [contender("slow"), contender("fast")]
    measured(fake, names, settings(8, repeats=3, limit=9999), Results(None, {}, {}), tmp_path)
    assert fake.calls.count(("slow", 8)) == 1
    assert fake.calls.count(("fast", 8)) == 3


def test_a_setting_beaten_at_both_is_dropped_at_longer_lengths(tmp_path: Path) -> None:
    times = {"peer, good": 1.0, "peer, bad": 1.6, "peer, close": 1.4, "other": 9.0}
    fake = Fake(lambda name, _: times[name])
    names = [contender(n, n.partition(",")[0]) for n in times]
    made = measured(fake, names, settings(8, 16, 32), Results(None, {}, {}), tmp_path)
    for length in (16, 32):
        left = [name for name, n in fake.calls if n == length]
        assert left == ["peer, good", "peer, close", "other"]
    gap, later = made.skipped
    assert gap["contender"] == later["contender"] == "peer, bad"
    assert made.beaten == {"peer, bad"}
    assert "1.6 times slower than peer, good" in gap["reason"]


def test_a_result_file_of_another_call_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    Results(out, {"model": "abc", "threads": 1}, {})
    with pytest.raises(UsageError, match=r"threads was 1, is 2") as caught:
        Results(out, {"model": "abc", "threads": 2}, {})
    one_line(caught.value, out)
    for text in ("[]", "nonsense", '{"benchmark": "bench"}'):
        out.write_text(text)
        with pytest.raises(DataError, match="not a result of `respike bench`"):
            Results(out, {}, {})
        assert out.read_text() == text
    with pytest.raises(UsageError, match="cannot be written"):
        Results(tmp_path / "missing" / "out.json", {}, {})


# ---- the report ------------------------------------------------------------------------------


def point(length: int, first: float, decode: float, **facts: int) -> dict[str, Any]:
    return {
        "length": length, "ttft_seconds": first, "decode_seconds": decode, "state_bytes": 300,
        "peak_rss_bytes": length, "facts": {"weight_bytes": 1000} | facts,
    }  # fmt: skip


def test_a_row_counts_what_a_step_moves() -> None:
    points = [point(50, t, 2.0, step_weight_bytes=600, memory_bytes=40) for t in (1.0, 2.0, 4.0)]
    row = row_of(contender("a"), points, 10, read=9400.0)
    assert row["ttft_seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert row["prefill_tokens_per_second"]["median"] == 25
    assert row["decode_tokens_per_second"]["median"] == 5
    assert row["moved_bytes_per_token"] == 600 + 300 + 40
    assert row["moved_bytes_per_second"] == 4700
    assert row["read_frac"] == 0.5
    assert row["ideal_decode_tokens_per_second"] == 10
    some = [p | {"step_state_bytes": 100} for p in points]  # a step reads a part of the state
    assert row_of(contender("a"), some, 10, read=9400.0)["moved_bytes_per_token"] == 740
    peer = Contender("p", "p", "x", {}, True, lambda n: 2.0 * n, looked_up_frac=0.25)
    assert row_of(peer, [point(50, 1.0, 2.0)], 10, 1.0)["moved_bytes_per_token"] == 850


def rows_of(who: Contender, law: Callable[[int], float], *lengths: int) -> list[dict[str, Any]]:
    return [row_of(who, [point(n, law(n), 1.0 + n / 100)], 10, 1e4) for n in lengths]


def test_what_was_not_reached_is_fitted_and_says_so() -> None:
    grows, flat = contender("grows", grows=True), contender("flat", "ours")
    rows = rows_of(grows, lambda n: n + n * n / 10, 10, 20, 40)
    rows += rows_of(flat, lambda n: 2.0 * n, 10, 20, 40, 1000)
    (far,) = fitted_rows(grows, rows, (10, 1000), 1e4)
    assert far["fitted"] is True
    assert far["context_tokens"] == 1000
    assert far["ttft_seconds"] == pytest.approx(1000 + 100_000)
    assert far["decode_tokens_per_second"] == pytest.approx(10 / 11)
    assert far["fit_points"] == 3
    assert fitted_rows(flat, rows, (10, 1000), 1e4) == []
    assert fitted_rows(grows, rows[:2], (1000,), 1e4) == []
    found = {r["context_tokens"]: r for r in ratios(rows, [far])}
    assert found[1000]["ttft_times"] == pytest.approx(101_000 / 2000)
    assert found[1000]["ttft_fitted"]
    assert not found[10]["ttft_fitted"]


def test_the_best_of_a_peer_is_chosen_for_prefill_and_decode_apart() -> None:
    ours = row_of(contender("x", "ours"), [point(50, 1.0, 1.0)], 10, 1e4)
    quick = row_of(contender("p, a", "p"), [point(50, 3.0, 9.0)], 10, 1e4)
    steady = row_of(contender("p, b", "p"), [point(50, 8.0, 4.0)], 10, 1e4)
    (found,) = ratios([ours, quick, steady], [])
    assert (found["ttft_best"], found["decode_best"]) == ("p, a", "p, b")
    assert (found["ttft_times"], found["decode_times"]) == (3, 4)
    assert found["decode_times_of_ideal"] == pytest.approx(10 / (1e4 / 1300))
    neither = row_of(contender("p, c", "p"), [point(50, 5.0, 5.0)], 10, 1e4)
    rows = [ours, quick, neither, steady]
    assert quoted({"rows": rows}) == ["x", "p, a", "p, b"]
    assert best_of_groups(rows) == [ours, quick, steady]


def test_the_picture_shows_measured_and_fitted(tmp_path: Path) -> None:
    from respike.bench.plot import draw, short

    who = contender("grows", grows=True)
    rows = rows_of(who, lambda n: 1.0 * n * n, 1024, 2048, 3000)
    draw(rows, fitted_rows(who, rows, (1 << 20,), 1e4), ["grows"], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert [short(n) for n in (1 << 20, 65536, 1000)] == ["1M", "64k", "1000"]


# ---- the gate --------------------------------------------------------------------------------


def test_every_native_op_is_checked_before_a_speed() -> None:
    assert set(gate.CHECKS) <= set(backends.NATIVE_OPS)


@native
def test_kernels_that_are_right_pass_and_a_broken_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(gate.check_kernels()) == set(gate.CHECKS)
    for op in ("swiglu", "rms_norm", "packed_linear", "rotate"):
        with monkeypatch.context() as patch:
            right = getattr(gate, op)
            patch.setattr(gate, op, lambda *a, right=right: right(*a) * 1.01)
            with pytest.raises(BackendError, match=f"no speed is printed: kernel {op}") as caught:
                gate.check_kernels()
            one_line(caught.value)
            patch.setattr(gate, op, lambda *a, right=right: right(*a) * torch.nan)
            with pytest.raises(BackendError, match=f"kernel {op}"):
                gate.check_kernels()


CONFIG = model_config(((full(0, 1, 2),), (full(1), window(0, 2, tokens=16, sinks=2))))


@native
def test_a_small_model_shows_what_no_single_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    small = gate.narrowed(CONFIG)
    assert small.num_hidden_layers == 2
    assert small.num_attention_heads == H
    rms = gate.check_model(CONFIG)
    assert rms is not None
    assert rms < 0.02
    right = Engine.run

    def late(
        self: Engine, x: torch.Tensor, span: Span, states: LayerStates, begin: int, end: int | None
    ) -> LayerStates:
        after = right(self, x, span, states, begin, end)
        x.copy_(x.roll(1, 1))
        return after

    monkeypatch.setattr(Engine, "run", late)
    with pytest.raises(BackendError, match="native kernels and torch differ") as caught:
        gate.check_model(CONFIG)
    one_line(caught.value)
    assert backends.kernels() is not None


def test_a_peer_must_be_the_same_model() -> None:
    ours = 3 * torch.randn(40, 50)
    near = gate.check_peer("p", ours, ours + 0.02 * torch.randn(40, 50))
    assert near["kl_nats"] < 0.01
    assert near["agreement_frac"] > 0.9
    with pytest.raises(BackendError, match="no speed is printed: on the original weights p is"):
        gate.check_peer("p", ours, ours.roll(1, 0))
    with pytest.raises(BackendError, match="has 50 tokens in its vocabulary, we have 49"):
        gate.check_peer("p", ours[:, :49], ours)
    sure = torch.zeros(1000, 50)
    sure[:, 3] = 9.0
    wrong = sure.clone()
    wrong[0] = sure[0].roll(1)  # one confident mistake in a thousand: KL is small
    with pytest.raises(BackendError, match="at 1 of 1000 sure tokens"):
        gate.check_peer("p", sure, wrong)


# ---- the verb --------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_bench_measures_model_and_original_and_goes_on(
    respike: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "p.png"
    words = ("bench", "win", "--vs", "original", *SHORT, "-o", out, "--quality-cap", 64)
    code, text, err = respike(*words, "--lengths", "64,128", "--plot", picture)
    assert code == 0, err
    for word in (
        "original",
        "win",
        "ours against",
        "quality of model",
        "reads",
        "copy lag 32",
        "KL",
    ):
        assert word in text, word
    assert picture.exists()
    stored = json.loads(out.read_text())
    assert len(stored["points"]) == 8
    assert stored["key"]["model"] in stored["found"]["fingerprints"].values()
    code, text, err = respike(*words, "--lengths", "64,128,200,256", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["points"][:8] == stored["points"]
    assert len(found["points"]) == 16
    states = {(r["group"], r["context_tokens"]): r["state_bytes"] for r in found["rows"]}
    config = open_checkpoint("tiny.gguf").config
    assert states["original", 256] == state_bytes(config, 256)
    assert states["ours", 256] == states["ours", 64] < states["original", 64]
    (quality,) = found["quality"]
    assert quality["length"] == 64
    assert quality["kl_beyond_nats"] > 0
    assert {r["group"] for r in found["ratios"]} == {"original"}


def test_bench_in_real_processes(respike: Callable[..., tuple[int, str, str]]) -> None:
    once = ("--threads", 1, "--decode", 2, "--repeats", 1, "--no-quality", "--json")
    code, text, err = respike("bench", "win", "--lengths", "64", *once)
    assert code == 0, err
    (row,) = json.loads(text)["rows"]
    assert row["n"] == 1
    assert row["decode_tokens_per_second"]["median"] > 0
    assert row["peak_rss_bytes"] is None or row["peak_rss_bytes"] > 50 << 20
    assert json.loads(text)["quality"] == "not measured: --no-quality"


@native
@pytest.mark.usefixtures("in_process")
def test_no_speed_of_a_wrong_kernel(
    respike: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gate.swiglu
    monkeypatch.setattr(gate, "swiglu", lambda *a: right(*a) + 0.1)
    code, text, err = respike("bench", "win", "--lengths", "64", *SHORT)
    assert code == 1
    assert text == ""
    assert "no speed is printed: kernel swiglu" in err


@pytest.mark.usefixtures("in_process")
def test_no_speed_beside_a_peer_that_disagrees(
    respike: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same folder passes in transformers; other weights do not."""
    words = (
        "bench",
        "of-folder",
        "--vs",
        "transformers",
        "--lengths",
        "64",
        "--no-quality",
        *SHORT,
    )
    code, text, err = respike(*words)
    assert code == 0, err
    assert "transformers on the original weights: KL 0.0" in text
    other = save_tiny(tmp_path / "other", seed=5)

    def swapped(module: str, job: Mapping[str, Any], **limits: Any) -> Outcome:
        peer = module == "peer_transformers" and "path" in job
        return local(module, dict(job) | ({"path": str(other)} if peer else {}), **limits)

    monkeypatch.setattr(run, "run_child", swapped)
    code, text, err = respike(*words)
    assert code == 1
    assert text == ""
    assert "no speed is printed: on the original weights transformers is" in err


@pytest.mark.usefixtures("in_process")
def test_bench_of_a_shape_and_cold_start(
    respike: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from respike.bench.shapes import Shape

    monkeypatch.setitem(SHAPES, "pico", Shape("qwen2", V, D, F, 2, 6, 3, 8, 1e4, 256, False))
    code, text, err = respike(
        "bench", "--shape", "pico", "--vs", "original", "--lengths", "300", *SHORT
    )
    assert code == 0, err
    assert "pico constant" in text
    assert "none: the weights are random" in text
    code, text, err = respike("bench", "win", "--cold-start", "--threads", 1, "--repeats", 1)
    assert code == 0, err
    for step in ("interpreter, imports", "load", "prefill", "first token", "all"):
        assert step in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "give either MODEL or --shape"),
        (("win", "--shape", "qwen2.5-7b"), 2, "give either MODEL or --shape"),
        (("--shape", "qwen2.5-8b"), 2, "no shape 'qwen2.5-8b'"),
        (("--shape", "qwen2.5-7b", "--recipe", "constnat"), 1, "no recipe 'constnat'"),
        (("--shape", "qwen2.5-7b", "--vs", "llama.cpp"), 2, "needs weights on disk"),
        (("win", "--recipe", "window"), 2, "--recipe belongs to --shape"),
        (("win", "--vs", "vllm"), 2, "--vs vllm: not one of original, transformers"),
        (("win", "--lengths", "1k,zwei"), 2, "length 'zwei'"),
        (("win", "--weights", "int3", "--lengths", "64"), 2, "--weights"),
        (("win", "--dtype", "f8"), 1, "dtype 'f8'"),
        (("win", "-o", "missing/out.json"), 2, "its folder does not exist"),
        (("win", "-o", "win"), 2, "is a folder"),
        (("win", "-o", "tiny.gguf", "--lengths", "64"), 1, "not a result of `respike bench`"),
        (("win", "--plot", "p.jpg"), 2, "ends in .png"),
        (("win", "--force"), 2, "--force means nothing"),
        (("win", "--peer-setting", "flash on"), 2, "no peer has it"),
        (("nowhere",), 1, "no such folder or file"),
        (("tiny.gguf", "--vs", "original"), 2, "is an original itself"),
        (("win", "--original", "tiny"), 1, "not what win was converted from"),
        (("win", "--vs", "llama.cpp", "--peer-python", "/no/python"), 1, "llama-cpp-python"),
        (("tiny", "--vs", "transformers", "--peer-python", "/no/python"), 1, "pip install"),
    ],
)
def test_bench_refuses_in_one_line(
    respike: Callable[..., tuple[int, str, str]], words: tuple[str, ...], code: int, message: str
) -> None:
    got, out, err = respike("bench", *words, "--threads", 1)
    assert (got, out) == (code, ""), err
    assert message in err
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2


def test_settings_of_a_peer_are_kept_by_their_names() -> None:
    def who(name: str, group: str) -> Contender:
        return Contender(name, group, "ours", {}, grows=True)

    names = [f"llama.cpp q8_0, flash {flash}, f16 cache" for flash in ("on", "off")]
    others = [who("mine", "ours"), who("rwkv7 in llama.cpp, random q8_0", "rwkv7")]
    everyone = Field(CONFIG, [*others, *(who(n, "llama.cpp q8_0") for n in names)])
    everyone.keep(())
    assert len(everyone.contenders) == 4
    with pytest.raises(UsageError, match="no peer has it") as caught:
        everyone.keep(("flash on", "q4_0"))
    assert names[0] in str(caught.value.hint)
    everyone.keep(("flash off",))
    assert [c.name for c in everyone.contenders] == [*(c.name for c in others), names[1]]


def test_the_original_is_found_by_its_hash(place: Path, tmp_path: Path) -> None:
    folder = place / "win"
    assert find_original(Subject(path=folder), needed=True) == place / "tiny.gguf"
    assert find_original(Subject(path=place / "tiny"), needed=True) == place / "tiny"
    alone = tmp_path / "a" / "b" / "win"
    alone.parent.mkdir(parents=True)
    alone.symlink_to(folder)
    copied = tmp_path / "c" / "win"
    copied.mkdir(parents=True)
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied.parent / "tiny.gguf").write_bytes((place / "tiny.gguf").read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="neither beside it") as caught:
        find_original(Subject(path=copied), needed=True)
    assert "--original" in str(caught.value.hint)
    assert find_original(Subject(path=copied), needed=False) is None
    given = Subject(path=copied, original=place / "tiny.gguf")
    assert find_original(given, needed=True) == place / "tiny.gguf"


# ---- shapes, rivals, plan --------------------------------------------------------------------


def test_shapes_have_the_parameters_their_makers_state() -> None:
    known = {
        "smollm2-135m": 134_515_008,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-4b": 4_022_468_096,
    }
    assert {name: num_parameters(shape_config(name)) for name in SHAPES} == known


def test_random_weights_run_with_every_gate_open() -> None:
    source = random_checkpoint(model_config((((full(0, 1, 2)),),)), load_recipe("constant"))
    decoder = load_decoder(source)
    betas = [p for name, p in decoder.named_parameters() if name.endswith("beta")]
    assert len(betas) == 1
    assert (betas[0] > -torch.inf).all()
    with torch.inference_mode():
        logits, _ = decoder(torch.arange(300)[None] % V)
    assert logits.isfinite().all()
    assert logits.float().std() > 1e-3


def test_the_recurrent_rival_is_about_as_large(tmp_path: Path) -> None:
    config = model_config((((full(0, 1, 2)),),) * 8, hidden_size=128, intermediate_size=384)
    reader = GGUFReader(write_rwkv7(tmp_path / "r.gguf", config))
    count = sum(int(np.prod(t.shape)) for t in reader.tensors)
    layers = num_parameters(config) - V * 128
    assert 0.5 < (count - 2 * V * 128) / layers < 2
    assert {t.tensor_type.name for t in reader.tensors} == {"F32", "Q8_0"}


MIX = model_config(((full(0), window(1, 2, tokens=16, sinks=2)),))


def test_flops_are_counted_by_hand() -> None:
    linear = D * H * K * 2 + 2 * D * 3 * K + 3 * D * F
    assert flops_per_token(MIX, 99) == {
        "linear": 2 * linear,
        "head": 2 * V * D,
        "softmax": 4 * K * (2 * 100 + 4 * 18),
        "memory": 0,
    }
    assert flops_per_token(MIX, 4)["softmax"] == 4 * K * 6 * 5
    far = random_checkpoint(model_config(((full(0, 1, 2),),)), load_recipe("constant")).config
    likes, moves = 2 * 64 * K, 2 * 64 * (K + 1)
    assert flops_per_token(far, 10)["memory"] == (H + 3) * (likes + moves)


def test_moved_bytes_are_weights_and_state() -> None:
    params = num_parameters(MIX)
    cache = 2 * K * 2 * (100 + 2 * 18)
    assert moved_bytes_per_token(MIX, 100) == 2 * params + cache
    assert moved_bytes_per_token(MIX, 100, "int8") == int(params * 8.5 / 8) + cache
    untied = MIX.model_copy(update={"tie_word_embeddings": False})
    assert moved_bytes_per_token(untied, 100) == 2 * params + cache


def test_plan_counts_and_predicts(respike: Callable[..., tuple[int, str, str]]) -> None:
    words = ("plan", "constant", "--target", "tiny.gguf", "--length", "1k,1M", "--threads", 1)
    code, text, err = respike(*words, "--json")
    assert code == 0, err
    found = json.loads(text)
    short, far = found["rows"]
    assert short["state_bytes"] == far["state_bytes"]
    assert far["read_seconds"] == pytest.approx(1024 * short["read_seconds"])
    assert found["parameters"] == num_parameters(
        random_checkpoint(open_checkpoint("tiny.gguf").config, load_recipe("constant")).config
    )
    assert "assumed" in found
    again = json.loads(respike(*words, "--json")[1])
    assert again == found  # measured once
    code, text, err = respike("plan", "identity", "--target", "qwen2.5-7b", "--no-time")
    assert code == 0, err
    assert "7,615,616,512 (0 new)" in text
    assert "minutes" not in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("constant",), 2, "--target"),
        (("constnat", "--target", "qwen2.5-7b"), 1, "no recipe 'constnat'"),
        (("constant", "--target", "qwen2.5-7"), 2, "neither a model on disk nor one of"),
        (("constant", "--target", "qwen2.5-7b", "--length", "much"), 2, "length 'much'"),
        (("retrieval", "--target", "qwen2.5-7b", "--no-time"), 1, "was measured on"),
    ],
)
def test_plan_refuses_in_one_line(
    respike: Callable[..., tuple[int, str, str]], words: tuple[str, ...], code: int, message: str
) -> None:
    got, out, err = respike("plan", *words)
    assert (got, out) == (code, ""), err
    assert message in err
    assert len(err.splitlines()) <= 2


def test_reading_memory_has_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 8 << 20)
    assert 1e8 < machine.read_bytes_per_second(1) < 1e13
    with gate.torch_only():
        assert 1e8 < machine.read_bytes_per_second(1) < 1e13


def test_tokens_travel_by_file(tmp_path: Path) -> None:
    prompts = Prompts(None, model_config())
    file = prompts.write(tmp_path / "t", 33, 0)
    assert array("i", file.read_bytes()) == prompts.make(33, 0)
