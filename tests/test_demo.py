"""The demo's report from made-up results, and the timing scripts on pico models and layers."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import chunked
import firing
import report
import stage
import steps
import worth
from committed import Committed, as_context, read_committed

from respike.errors import DataError
from respike.evaluation import Reference, Task, Vocabulary, recall
from respike.loading import load
from respike.ops import backends
from respike.text import contexts
from tiny import save_tiny

ROLES = ("original", "converted", "window")
CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


# ---- made-up results -------------------------------------------------------------------------


def bucket(low: int, high: int, kl: float) -> dict[str, Any]:
    return {
        "from_tokens": low, "to_tokens": high, "predictions": 4 * (high - low),
        "nats_reference": 2.5, "nats": 2.5 + kl, "nats_added": kl,
        "nats_added_95": [0.9 * kl, 1.1 * kl], "kl_nats": kl, "kl_nats_95": [0.8 * kl, 1.2 * kl],
        "top1_agreement_frac": 0.93,
    }  # fmt: skip


def check(scale: float) -> dict[str, Any]:
    edges = [(0, 256), (256, 512), (512, 1024), (1024, 2048)]
    buckets = [bucket(*edge, kl=scale * i) for i, edge in enumerate(edges)]
    return {"buckets": buckets, "beyond": bucket(256, 2048, 2 * scale)}


def recall_row(task: str, reach: int, found: tuple[float, float, float]) -> dict[str, Any]:
    scores = {
        role: {
            "accuracy_frac": value,
            "accuracy_95": [max(0, value - 0.2), min(1, value + 0.1)],
            "lost_frac": found[0] - value,
            "lost_95": [found[0] - value - 0.1, found[0] - value + 0.1],
        }
        for role, value in zip(ROLES, found, strict=True)
    }
    return {"task": task, "trials": 6, "chance_frac": 0.01, "reach_tokens": reach, "scores": scores}


def around(value: float) -> dict[str, float]:
    return {"median": value, "min": 0.9 * value, "max": 1.2 * value}


def timing(models: tuple[str, ...], lengths: tuple[int, ...]) -> dict[str, Any]:
    rows = []
    for length in lengths:
        for number, model in enumerate(models):
            seconds = length / 1000 * (1 + length / (8000 * (1 + 3 * number)))
            rate = 40 / (1 + length / 8000 / (1 + number))
            rows.append(
                {
                    "model": model, "context_tokens": length, "n": 3,
                    "ttft_seconds": around(seconds),
                    "prefill_tokens_per_second": around(length / seconds),
                    "decode_tokens_per_second": around(rate),
                    "state_bytes": 23040 * length // (1 + 4 * number),
                    "peak_rss_bytes": 700 << 20,
                }
            )  # fmt: skip
    machine = {
        "processor": "Made-up 9000", "cores": 2, "threads": 2, "cpu_features": ["avx2", "fma"],
        "kernels": {"rms_norm": "native avx2"},
    }  # fmt: skip
    return {
        "machine": machine, "date": "2026-01-02", "commit": "abc1234", "rows": rows,
        "skipped": [{"model": "original", "context_tokens": 1 << 20, "reason": "too slow here"}],
        "settings": {"repeats": 3, "path": "made-up kernels"},
        "models": {m: {"fingerprint": f"{m}-print", "dtype": "bf16"} for m in models},
    }  # fmt: skip


def conversion(recipe: str, kept: int) -> dict[str, Any]:
    return {
        "folder": f"demo/out/{recipe}", "recipe": recipe, "window_tokens": 256, "sink_tokens": 4,
        "fingerprint": recipe, "softmax_groups": kept, "kv_groups": 90,
        "growth_bytes_per_token": 256 * kept,
        "calibration": {
            "text_tokens": 8192, "recall_tokens": 4096, "heads": 216, "shut": 31,
            "error_shut_frac": 0.3012, "error_frac": 0.2034, "share_frac": 0.11,
        } if recipe == "retrieval" else {},
    }  # fmt: skip


def memory() -> dict[str, Any]:
    rows = [
        ("KL beyond the window", 4, 0.0246, 0.0521, 0.0275),
        ("passkey length 1024 depth 0.25", 2, 0.83, 0.67, 0.16),
    ]
    return {
        "kinds": ["far"], "groups": 72, "features": [64],
        "rows": [
            {
                "measure": name, "digits": digits, "on": on, "on_95": [on / 2, on * 1.1],
                "cut": cut, "cut_95": [cut / 2, cut * 1.1],
                "worth": gain, "worth_95": [gain / 2, gain * 1.1],
            }
            for name, digits, on, cut, gain in rows
        ],
        "share": {
            "from_tokens": 512, "context_tokens": 2048, "heads": 216, "mean_frac": 0.123,
            "largest_frac": 0.77, "layers": {str(i): 0.01 * i for i in range(30)},
        },
    }  # fmt: skip


def spiking() -> dict[str, Any]:
    """A run's spikes: three tokens, two channels, four sites in two layers."""
    names = ("qkv", "o", "mlp", "down")
    total = {
        "silent_frac": 0.345,
        "skipped_frac": 0.313,
        "weight_bytes": 200 << 20,
        "weight_bytes_touched": 137 << 20,
        "mean_abs_count": 3.21,
        "events": 5.0,
        "bit_sparsity": {"signed-bitwise": {"zero_frac": 0.77, "steps": 7}},
        "three_step_windows": {"with_0_1_2_3_spikes_frac": [0.66, 0.2, 0.1, 0.04]},
    }
    return {
        "total": total, "distance": bucket(0, 512, 0.111), "runs": "by events", "not_spiked": [],
        "text": {"held_out_tokens": 1024}, "neuron": {"neuron": "dead-zone"},
        "sites": [
            {"layer": i, "site": name, "mean_abs_count": 2.0 * (i + 1) + 0.5 * j}
            for i in range(2)
            for j, name in enumerate(names)
        ],
        "raster": {
            "layer": 1, "tokens": ["The", " <key>", " &"],
            "counts": {name: [[3, 0], [0, -2], [40, 1]] for name in names},
            "fired": {name: [1, 1, 2] for name in names},
            "neurons": {name: [2, 2, 2] for name in names},
        },
    }  # fmt: skip


def speed_frontier() -> dict[str, Any]:
    rows = [
        {
            "name": f"{kind} {weights}, {skipped:.0%}", "kind": kind, "weights": weights,
            "skipped_frac": skipped, "kl_nats": 0.02 + skipped, "kl_nats_95": [0.01, 0.9],
            "token_bytes": 1e8 * (1 - skipped), "fingerprint": "0123456789abcdef",
            "tokens_per_second": {n: around(100 * int(n) * (1 + skipped)) for n in ("1", "2")},
        }
        for kind, weights, skipped in (
            ("dense", "int8", 0.0), ("events", "int8", 0.31), ("events", "int8", 0.53),
            ("events", "int4", 0.51), ("llama.cpp", "q8_0", 0.0),
        )
    ]  # fmt: skip
    return {
        "model": "Pico-1M.gguf", "machine": {"processor": "Made-up 9000", "threads": 2},
        "date": "2026-01-04", "commit": "fed9876", "text": "12 contexts", "settings": "5 rounds",
        "rows": rows,
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    """A complete run, with numbers that are easy to find again."""
    tokens = [1 << n for n in range(8, 21)]
    shares = {"original": 23040, "converted": 4608, "window": 0}
    return copy.deepcopy({
        "command": "python demo/run.py", "commit": "abc1234", "date": "2026-01-02",
        "versions": {"python": "3.11", "torch": "2.13", "respike": "0.1.0"},
        "steps": [{"title": "Look", "commands": ["respike inspect <M>"], "seconds": 1.5}],
        "original": {
            "name": "Pico-1M.gguf", "family": "llama", "license": "apache-2.0",
            "parameters": 1234567, "layers": 30, "heads": 9, "groups_per_layer": 3,
            "trained_tokens": 8192, "growth_bytes_per_token": 23040,
        },
        "convert": {
            "converted": conversion("retrieval", 18), "window": conversion("window", 0),
            "about": "Keeps what recall needs.", "layers": [("0-29", "window 256 + 4 sinks")],
            "keeps_softmax": [[(i + g) % 5 == 0 for g in range(3)] for i in range(30)],
        },
        "state": {
            "tokens": tokens,
            "bytes": {r: [5990400 + share * n for n in tokens] for r, share in shares.items()},
            "parts": {
                str(n): {"softmax": 4608 * n, "window": 4792320, "memory": 1198080}
                for n in (1024, 8192, 65536, 1 << 20)
            },
        },
        "memory": memory(),
        "fingerprints": {r: f"{r}-print" for r in ROLES},
        "check": {
            "text": "made-up text", "contexts": 4, "context_tokens": 2048,
            "models": {"converted": check(0.0123), "window": check(0.0456)},
        },
        "recall": [
            recall_row("copy lag 512", 512, (0.17, 0.16, 0.0)),
            recall_row("passkey length 1024 depth 0.1", 922, (1.0, 0.83, 0.0)),
            recall_row("multi-query pairs 16", 128, (0.7, 0.7, 0.7)),
        ],
        "question": {
            "fact": "The key is in the tin.", "question": "Where is the key?",
            "prompt_tokens": 640, "max_tokens": 48,
            "answers": {r: f"<b>{r}</b> says & so" for r in ROLES},
        },
        "context": timing(ROLES[:2], (1024, 2048, 4096, 8192)),
        "spikes": spiking(),
    })  # fmt: skip


def frontier() -> dict[str, Any]:
    rows = []
    kinds = [
        ("original", 90),
        ("window", 0),
        ("even", 24),
        *(("retrieval", n) for n in (6, 12, 18)),
    ]
    for kind, groups in kinds:
        size = {str(n): 5990400 + 256 * groups * n for n in (2048, 8192, 65536)}
        copied = {"accuracy_frac": groups / 100, "accuracy_95": [groups / 120, groups / 90]}
        rows.append({
            "name": f"{kind} {groups}", "kind": kind, "softmax_groups": groups,
            "state_bytes": size, "beyond": bucket(256, 2048, 0.1 / (1 + groups)), "copy": copied,
        })  # fmt: skip
    return {
        "model": "Pico-1M.gguf", "machine": {"processor": "Made-up 9000", "threads": 2},
        "date": "2026-01-03", "commit": "def5678", "text": "12 made-up contexts", "rows": rows,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A results folder with two context files, of which the later counts, and a frontier."""
    old = timing(("original",), (32768,)) | {"date": "2025-01-01"}
    (tmp_path / "context_old.json").write_text(json.dumps(old))
    new = timing(("original", "converted"), (16384, 65536)) | {"date": "2026-02-02"}
    new["models"]["converted"]["fingerprint"] = "of another recipe"
    (tmp_path / "context_new.json").write_text(json.dumps(new))
    (tmp_path / "frontier_pico.json").write_text(json.dumps(frontier()))
    (tmp_path / "spikes_frontier_pico.json").write_text(json.dumps(speed_frontier()))
    return tmp_path


# ---- the report ------------------------------------------------------------------------------


class Page(HTMLParser):
    """What matters of a page: open tags, ids, addresses, text."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.labels += [values["aria-label"] or ""] if tag == "svg" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_well_formed(results: dict, folder: Path) -> None:
    html = report.render(results, read_committed(folder))
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"https?://", html)
    assert not re.search(r"@import|url\((?!#)", html)
    assert all(address.startswith("#") for address in page.addresses)
    assert {a[1:] for a in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_every_section_and_plot_is_there(results: dict, folder: Path) -> None:
    page = Page(report.render(results, read_committed(folder)))
    assert {name for name, _, _ in report.SECTIONS} <= set(page.ids)
    assert len(page.labels) == 14
    assert all(len(label) > 30 for label in page.labels)


def test_figures_of_the_run_and_of_the_files_are_shown(results: dict, folder: Path) -> None:
    text = Page(report.render(results, read_committed(folder))).text
    assert "18 of 90 KV groups" in text
    assert "KL 0.025 nats a token [0.020, 0.030]" in text  # KL beyond the window
    assert "passkey length 1024 depth 0.1 (6 trials): original 1.00, converted 0.83" in text
    assert "22.5 GiB" in text  # the original's state at 1M tokens
    assert "original-prin" in text
    assert "too slow here" in text
    assert "65,536" in text
    assert "context_new.json" in text
    assert "context_old.json" not in text
    assert "Other weights or another recipe than this run's: converted" in text
    assert "12 made-up contexts" in text
    assert "<b>converted</b> says & so" in text  # a model's words are never markup


def test_the_memory_is_shown_and_nothing_is_called_trained(results: dict, folder: Path) -> None:
    page = Page(report.render(results, read_committed(folder)))
    assert "fitted to 8,192 tokens of text, not trained" in page.text
    assert "nothing was trained" not in page.text
    assert "31 of 216 heads stayed shut" in page.text
    assert "0.301 with all shut and 0.203 fitted" in page.text
    assert "+0.0275 [0.0138, 0.0303]" in page.text
    assert "KL beyond the window 0.0246 against 0.0521; passkey" in page.text
    assert any("mean of heads 0.123, most in layer 29: 0.290" in label for label in page.labels)
    # By part, at 65,536 tokens: softmax groups, windows and sinks, memories, together.
    assert "65,536288.0 MiB4.6 MiB1.1 MiB293.7 MiB" in page.text


def test_that_no_head_stayed_shut_is_said_in_words(results: dict, folder: Path) -> None:
    results["convert"]["converted"]["calibration"]["shut"] = 0
    assert "None of 216 heads stayed shut" in report.render(results, read_committed(folder))


def test_only_the_tasks_of_the_run_are_explained(results: dict, folder: Path) -> None:
    html = report.render(results, read_committed(folder))
    assert "passkey: a number hidden in filler" in html
    assert "multi-query: word pairs" in html
    results["recall"] = results["recall"][:2]
    html = report.render(results, read_committed(folder))
    assert "passkey: a number hidden in filler" in html
    assert "word pairs" not in html


def test_a_memory_that_is_no_part_of_attention_has_no_share(results: dict, folder: Path) -> None:
    results["memory"] |= {"kinds": ["gla"], "features": [], "share": None}
    results["convert"]["converted"]["calibration"] = {}
    page = Page(report.render(results, read_committed(folder)))
    assert "a linear memory (gla) of constant size" in page.text
    assert "as they start, not fitted" in page.text
    assert len(page.labels) == 13


def test_a_far_memory_without_calibration_is_called_shut(results: dict, folder: Path) -> None:
    results["convert"]["converted"]["calibration"] = {}
    assert "Every head is shut" in report.render(results, read_committed(folder))


def test_missing_results_are_said(results: dict, tmp_path: Path) -> None:
    committed = read_committed(tmp_path / "nothing")
    text = Page(report.render(results, committed)).text
    assert "no committed benchmarks/results/context_*.json" in text
    assert "no committed benchmarks/results/frontier_*.json" in text
    assert len(committed.lines()) == 2


def test_a_run_without_timed_points_still_has_a_report(results: dict, tmp_path: Path) -> None:
    results["context"]["rows"] = []
    assert "too slow for a timed run" in report.render(results, read_committed(tmp_path))


def test_small_differences_in_speed_are_ties(results: dict) -> None:
    assert "(1.6x), decode 19.8 against 26.5 tokens/s (1.3x)" in report.summary_lines(results)[-1]
    for row in results["context"]["rows"]:
        row["decode_tokens_per_second"]["median"] = 20.0
    assert "decode 20.0 against 20.0 tokens/s (a tie)" in report.summary_lines(results)[-1]


def test_a_committed_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "context_x.json").write_text('{"rows": []}')
    with pytest.raises(DataError, match=r"context_x.json: not a result of its kind: machine"):
        read_committed(tmp_path)


def test_the_repository_s_own_results_are_of_their_kinds() -> None:
    committed = read_committed(Path(__file__).parent.parent / "benchmarks/results")
    assert committed.context
    assert {row["model"] for row in committed.context["rows"]} == {"original", "converted"}


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: make system-deps")
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_its_window(results: dict, folder: Path, width: int, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(report.render(results, read_committed(folder)))
    # In a frame, because a window of Chromium may not be as narrow as a phone.
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;'
        'height:9000px" onload="document.title=contentDocument.documentElement.scrollWidth">'
    )
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", f"--window-size={max(width, 500)},9000"]
    address = f"file://{tmp_path}/frame.html"
    subprocess.run([*command, f"--screenshot={shot}", address], capture_output=True, check=True)
    assert len(np.unique(imread(shot)[:, :width].reshape(-1, 4), axis=0)) > 50, "blank"
    dump = subprocess.run([*command, "--dump-dom", address], capture_output=True, check=True)
    (needed,) = re.findall(rb"<title>(\d+)</title>", dump.stdout)
    assert int(needed) <= width, "the page is wider than its window"


# ---- the steps -------------------------------------------------------------------------------

PICO_RECIPE = """\
recipe: 1
name: pico
layers:
- {at: all, mixer: window%s}
softmax_groups: {1: [2], 3: [0, 1, 2]}
window_tokens: 16
sink_tokens: 3
far: {features: 5, calibration_tokens: 512}
"""


def steps_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> stage.Run:
    """The steps up to the memory's worth, on a pico model with small settings."""
    save_tiny(tmp_path / "pico")
    (tmp_path / "pico.yaml").write_text(PICO_RECIPE % memory)
    for name, value in {
        "CONTEXT_TOKENS": 96, "MAX_TOKENS": 192, "TRIALS": 2, "RECALL": ("copy:40", "copy:24"),
    }.items():  # fmt: skip
        monkeypatch.setattr(steps, name, value)
    monkeypatch.setattr(worth, "TASKS", ("copy:24",))
    run = stage.Run(tmp_path / "pico", str(tmp_path / "pico.yaml"), tmp_path / "out", 1, "f32")
    titles = [step.title for step in steps.STEPS]
    stage.perform(run, steps.STEPS[: titles.index("What the memory is worth") + 1], total=5)
    json.dumps(run.results)
    return run


def test_spikes_are_drawn_counted_and_set_against_speed(results: dict, folder: Path) -> None:
    page = Page(report.render(results, read_committed(folder)))
    for said in ("34.5%", "31.3%", "137.0 MiB of 200.0 MiB", "77.0% of 7 steps", "66.0%"):
        assert said in page.text
    assert "events int4, 51%" in page.text
    assert "fed9876" in page.text
    drawn = [label for label in page.labels if "aster of the sentence" in label]
    assert drawn == ["Spike raster of the sentence 'The <key> &'"]
    assert len([label for label in page.labels if label.startswith("KL against")]) == 3
    assert any("into down 4.50" in label for label in page.labels)
    del results["spikes"]
    bare = Page(report.render(results, Committed()))
    assert "No spikes were counted" in bare.text
    assert "no frontier of speed" in bare.text


def test_a_raster_draws_what_fired_and_nothing_else() -> None:
    drawn = firing.raster_plot(spiking()["raster"])
    assert drawn.count('class="up"') == 4 * 3
    assert drawn.count('class="down"') == 4


def test_the_sentence_is_shown_as_it_fired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: dict
) -> None:
    save_tiny(tmp_path / "pico")
    for name, value in {
        "CALIBRATION_TOKENS": 64, "HELD_OUT_TOKENS": 96, "CONTEXT_TOKENS": 32,
    }.items():  # fmt: skip
        monkeypatch.setattr(firing, name, value)
    run = stage.Run(tmp_path / "pico", "retrieval", tmp_path / "out", 1, "f32")
    firing.show_spikes(run)
    found = json.loads(json.dumps(run.results["spikes"]))
    drawn = found["raster"]
    assert "".join(drawn["tokens"]).endswith(firing.SENTENCE)
    assert drawn["layer"] == 2
    assert set(drawn["counts"]) == {"qkv", "o", "mlp", "down"}
    for name, counts in drawn["counts"].items():
        assert len(counts) == len(drawn["tokens"])
        assert 0 < sum(drawn["fired"][name]) < sum(drawn["neurons"][name])
    assert 0.15 < found["total"]["skipped_frac"] < 0.45
    (command,) = firing.spike_commands(run)
    assert "--silent 0.3" in command
    assert (
        "Its own sentence in layer 2"
        in Page(report.render(results | {"spikes": found}, Committed())).text
    )


def test_the_memory_is_measured_on_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: dict
) -> None:
    run = steps_run(tmp_path, monkeypatch, ", memory: far")
    made, found = run.results["convert"]["converted"], run.results["memory"]
    assert made["calibration"]["text_tokens"] == 512
    assert made["calibration"]["heads"] == 4 * 6 - 2 * (1 + 3)
    assert (found["kinds"], found["groups"], found["features"]) == (["far"], 4 * 3 - 4, [5])
    # Every figure again, from the folder: the memory cut by shutting every head.
    original, model = load(run.model, dtype="f32"), load(run.paths["converted"], dtype="f32")
    text = contexts([], model.tokenizer, context_tokens=96, max_tokens=192)
    reference, vocabulary = Reference(original.decoder, text), Vocabulary(model.tokenizer)
    figures = {}
    for way in ("on", "cut"):
        kl = reference.compare(model.decoder).kl[:, 15:].mean()
        score = recall(model.decoder, vocabulary, Task("copy", 24), trials=2)
        figures[way] = [float(kl), float(score.per_trial.mean())]
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(".beta"):
                parameter.data.fill_(-math.inf)
    for way, expected in figures.items():
        assert [row[way] for row in found["rows"]] == pytest.approx(expected, rel=1e-3)
    assert figures["on"][0] != pytest.approx(figures["cut"][0], rel=1e-2)
    kl = found["rows"][0]
    assert kl["worth"] == pytest.approx(kl["cut"] - kl["on"], rel=1e-4)
    share = found["share"]
    assert share["from_tokens"] == 32
    assert set(share["layers"]) == {"0", "1", "2"}
    assert 0 < share["mean_frac"] < share["largest_frac"] < 1
    parts = run.results["state"]["parts"]["8192"]
    assert parts["memory"] == 8 * 4 * 5 * 9
    text_of = Page(report.render(results | shown(run), Committed())).text
    assert "fitted to 512 tokens of text" in text_of


def test_a_model_without_a_memory_says_so_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    results: dict,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = steps_run(tmp_path, monkeypatch, "")
    assert run.results["memory"] is None
    assert "nothing to measure: no mixer of this model has a memory" in capsys.readouterr().out
    text = Page(report.render(results | shown(run), Committed())).text
    assert "has no memory" in text
    assert "nothing was trained" in text
    assert "fitted" not in text


def shown(run: stage.Run) -> dict[str, Any]:
    """What the steps measured, without the positions and tasks that the made-up rest has."""
    return {key: run.results[key] for key in ("convert", "memory", "state")}


# ---- what a bench looks like to the report ---------------------------------------------------


def test_of_a_bench_the_report_shows_the_model_and_its_original(tmp_path: Path) -> None:
    facts = {"dtype": "bf16"}
    bench = {
        "machine": {}, "date": "2026-01-02", "commit": "abc1234", "settings": {"repeats": 2},
        "points": [
            {"contender": "folder", "facts": facts}, {"contender": "original", "facts": facts},
            {"contender": "folder", "error": "no"}, {"contender": "peer", "facts": {}},
        ],
        "found": {"fingerprints": {"ours": "f00", "original": "0f0"}},
        "rows": [
            {"contender": name, "group": group, "context_tokens": 64}
            for name, group in (("folder", "ours"), ("original", "original"), ("peer", "peer"))
        ],
        "skipped": [{"contender": "original", "length": 128, "reason": "too slow"}],
    }  # fmt: skip
    shown = as_context(bench)
    assert [row["model"] for row in shown["rows"]] == ["converted", "original"]
    assert shown["models"]["original"] == {"fingerprint": "0f0", "dtype": "bf16"}
    assert shown["skipped"][0] == {
        "model": "original", "context_tokens": 128, "reason": "too slow"
    }  # fmt: skip
    assert "process of its own" in shown["settings"]["path"]
    (tmp_path / "bench_x.json").write_text(json.dumps(bench))
    read = read_committed(tmp_path).context
    assert read is not None
    assert read == shown | {"file": "bench_x.json"}


# ---- benchmarks/chunked.py -------------------------------------------------------------------

FLOATS = [torch.bfloat16, torch.float32]


def chunked_rows(layer: Any, once_above: float = 60, most: float = 600) -> list[dict[str, Any]]:
    chunks = {"gla": 4, "gla, one decay": 8, "delta": 16}
    limits = {"repeats": 3, "once_above_seconds": once_above, "max_seconds": most}
    return list(chunked.measure(layer, [16, 40], FLOATS, chunks, **limits))


def test_every_op_is_timed_at_every_length() -> None:
    rows = chunked_rows(chunked.Layer(6, 3, 10, 7))
    assert {(r["op"], r["dtype"], r["tokens"]) for r in rows} == {
        (op, dtype, tokens)
        for op in chunked.ops_here()
        for dtype in ("bf16", "f32")
        for tokens in (16, 40)
    }
    for row in rows:
        spread = row["microseconds_per_token"]
        assert row["n"] == 3
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    json.dumps(rows)
    assert "skipped" not in chunked.text_table(rows)


def test_what_is_timed_is_the_layer_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = chunked.Layer(6, 3, 10, 7)
    for op, name in (("gla", "gla"), ("gla, one decay", "gla"), ("delta", "delta")):
        seen: list[Any] = []
        monkeypatch.setattr(chunked, name, lambda *a, seen=seen, **k: seen.append((a, k)))
        layer.ready(op, 33, torch.bfloat16, 5)()
        (((q, k, v, *_, decay, state), named),) = seen
        assert [tuple(x.shape) for x in (q, k, v)] == [
            (1, 33, 6, 10),
            (1, 33, 3, 10),
            (1, 33, 3, 7),
        ]
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert decay.shape[3:] == {"gla": (10,), "gla, one decay": (1,), "delta": ()}[op]
        assert decay.max() <= 0
        assert state.shape == (1, 3, 10, 7)
        assert named == {"chunk_tokens": 5}
    assert layer.ready("softmax", 33, torch.bfloat16, 0)().shape == (1, 33, 6, 7)
    out, memory = layer.ready("far", 33, torch.bfloat16, 0)()
    assert (out.dtype, out.shape, memory.shape) == (torch.bfloat16, (1, 33, 6, 7), (1, 3, 10, 8))
    out, memory = layer.ready("far, native", 1, torch.float32, 0)()
    assert (out.shape, memory.shape) == ((1, 1, 180, 7), (1, 90, 10, 8))


def test_an_op_is_timed_by_the_backend_it_is_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.delenv("RESPIKE_BACKEND", raising=False)
    for op in chunked.ops_here():
        chunked.seconds(lambda: seen.append(backends.table()[0].backend), chunked.backend_of(op))
    assert seen == ["native" if "native" in op else "torch" for op in chunked.ops_here()]
    assert "RESPIKE_BACKEND" not in os.environ


def test_slow_points_are_measured_once_or_not_at_all() -> None:
    once = chunked_rows(chunked.Layer(6, 3, 10, 7), once_above=-1)
    assert all(row["n"] == 1 for row in once)
    assert chunked.text_table(once).count("(n = 1)") == len(once)
    skipped = chunked_rows(chunked.Layer(6, 3, 10, 7), most=-1)
    assert all("would take about" in row["skipped"] for row in skipped)
    assert chunked.text_table(skipped).count("skipped") == len(skipped)


def test_heads_must_divide_into_groups() -> None:
    with pytest.raises(ValueError, match="6 query heads do not divide into 4 groups"):
        chunked.Layer(6, 4, 10, 7)
