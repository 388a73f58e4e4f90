"""lm-evaluation-harness on our models, and the child that runs what a model wrote."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from respike.errors import UsageError
from respike.generation import stream
from respike.loading import Model
from tiny import save_tiny

TASKS = Path(__file__).resolve().parents[1] / "benchmarks" / "harness_tasks"


def task_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, TASKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what a model wrote ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def humaneval() -> Any:
    module = task_module("humaneval")
    if not sys.platform.startswith("linux"):
        pytest.skip("programs are shut in by means of Linux")
    try:
        module.runs("pass")
    except RuntimeError as error:
        pytest.skip(str(error))
    return module


PROBLEM = {
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "test": "def check(candidate):\n    assert candidate(21) == 42\n    assert candidate(0) == 0\n",
    "entry_point": "double",
}


def test_a_problem_is_passed_by_what_passes_its_tests(humaneval: Any) -> None:
    assert humaneval.passed(PROBLEM, ["    return 2 * x\n"]) == {"pass_at_1": 1.0}
    assert humaneval.passed(PROBLEM, ["    return x + 21\n"]) == {"pass_at_1": 0.0}
    assert humaneval.passed(PROBLEM, ["    return (\n"]) == {"pass_at_1": 0.0}


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)", "import os; os._exit(0)", "raise SystemExit(3)",
        "block = bytearray(3 << 30)", "import os; os.fork()",
        "import socket\na = socket.socket(); a.bind(('127.0.0.1', 0)); a.listen()\n"
        "socket.create_connection(a.getsockname(), 1)",
        "open('/tmp/respike-test-file', 'wb').write(bytes(2_000_000))",
    ],
)  # fmt: skip
def test_a_program_cannot_get_out_nor_pretend(humaneval: Any, program: str) -> None:
    assert humaneval.runs("x = 1")
    assert not humaneval.runs(program)


def test_a_program_without_an_end_is_ended(humaneval: Any) -> None:
    assert not humaneval.runs("while True: pass", seconds=1)


def test_what_cannot_be_shut_in_is_not_run(humaneval: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import sys\nprint(sys.argv[1], 'no namespace', file=sys.stderr)\nsys.exit(3)\n"
    monkeypatch.setattr(humaneval, "CHILD", Path("/dev/stdin"))
    with pytest.raises(RuntimeError, match="was not run: no namespace"):
        humaneval.runs(child)


def test_marks_of_wikihow_are_no_text() -> None:
    clean = task_module("hellaswag").without_marks
    assert clean("Bake: [header] How to bake [title] Mix it. [step] Then wait  .") == (
        "Bake: How to bake. Mix it. Then wait ."
    )


# ---- the model -------------------------------------------------------------------------------

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval-harness"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def judge(folder: Path, recwarn: pytest.WarningsRecorder) -> Any:
    """Its packages warn while they are imported; that is not ours to fail for."""
    del recwarn
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from respike.evaluation.harness import HarnessModel

    return HarnessModel(str(folder), dtype="f32", threads=1, max_length=200)


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=a) for a in arguments]


def nats(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward pass a pair, nothing shared."""
    tokens = [*context, *continuation]
    with torch.inference_mode():
        log_p = model.decoder(torch.tensor([tokens]))[0][0].float().log_softmax(-1)
    rows = log_p[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    right = bool((rows.argmax(-1) == target).all())
    return float(rows.gather(1, target[:, None]).sum()), right


@harness
def test_choices_are_scored_as_each_on_its_own(judge: Any) -> None:
    asked = [
        ("the rain in the", " sea"), ("on the sun", " rain and sea"),
        ("the rain in the", " sun on"), ("a", " b"),
        ("the rain in the", " rain"), ("on the sun", " sea"),
    ]  # fmt: skip
    found = judge.loglikelihood(requests(*asked), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(asked, found, strict=True):
        before, after = judge._encode_pair(context, continuation)
        expected, right = nats(judge.model, before, after)
        assert value == pytest.approx(expected, rel=1e-4)
        assert greedy == right
    before = judge.tok_encode("the rain in the")
    with torch.inference_mode():
        best = judge.model.decoder(torch.tensor([before]))[0][0, -1].argmax()
    assert judge._loglikelihood_tokens([("", before, [int(best)])])[0][1] is True


@harness
def test_long_texts_lose_their_beginning_and_rolling_ones_are_cut(judge: Any) -> None:
    tokens = judge.tok_encode("the rain in the sea and the sun " * 30, add_special_tokens=False)
    assert len(tokens) > 300
    value, _ = judge._loglikelihood_tokens([("", tokens[:280], tokens[280:300])])[0]
    expected, _ = nats(judge.model, tokens[100:280], tokens[280:300])
    assert value == pytest.approx(expected, rel=1e-4)
    text = judge.model.tokenizer.decode(tokens[:60])
    whole = judge.loglikelihood_rolling(requests((text,)))[0]
    again = judge.tok_encode(text, add_special_tokens=False)
    assert whole == pytest.approx(nats(judge.model, [judge.prefix_token_id], again)[0], rel=1e-4)


@harness
def test_texts_are_written_as_by_generate_up_to_their_stops(judge: Any) -> None:
    prompts = ["the rain in the sea", "the", "on the sun and the rain in the sea"]
    free = []
    for prompt in prompts:
        text = stream(judge.model, judge.tok_encode(prompt), max_tokens=12)
        free.append("".join(text))
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    found = judge.generate_until(requests(*((p, options) for p in prompts)))
    assert found == free
    stop = free[0][3:5]
    stopped = judge.generate_until(requests((prompts[0], {**options, "until": stop})))
    assert stopped == [free[0][: free[0].index(stop)]]


@harness
def test_what_is_not_greedy_or_unknown_is_refused(judge: Any, folder: Path) -> None:
    for options in ({"do_sample": True}, {"temperature": 0.7}, {"top_k": 5}):
        with pytest.raises(UsageError, match="greedy only"):
            judge.generate_until(requests(("the", options)))
    with pytest.raises(UsageError, match="expected path"):
        type(judge)(str(folder), device="cuda")
    with pytest.raises(UsageError, match="revision"):
        type(judge)(str(folder), revision="main")
