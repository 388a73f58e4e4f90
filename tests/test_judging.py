"""The scripts that judge healed models, on toy models: rows, parts that are kept, differences."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import healing
import recall_length
from resultfile import counts, named_folder, rows_before
from tables import healing_table, recall_table

from respike.conversion import convert, plan
from respike.evaluation import Reference
from respike.evaluation.distance import hidden_of_last
from respike.loading import load
from respike.recipe import load_recipe
from tiny import full, model_config, random_decoder, random_tokens, save_tiny, window

LAYERS = ((full(0, 1, 2),), (window(0, 1, 2, tokens=5, sinks=2),))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "tiny")
    for tokens in (16, 40):
        recipe = load_recipe("window", [f"window_tokens={tokens}"])
        convert(plan(place / "tiny", recipe), place / f"window{tokens}")
    (place / "texts").mkdir()
    sentence = "the rain in the sea and the sun on {}\n"
    for number in range(3):
        lines = "".join(sentence.format(i * (number + 3)) for i in range(120))
        (place / "texts" / f"{number}.txt").write_text(lines)
    return place


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    threads = torch.get_num_threads()
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)


def judged(place: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> dict[str, Any]:
    out = place / "healing.json"
    monkeypatch.setattr(healing, "BEYOND_TOKENS", 24)
    run(
        healing, monkeypatch, place / "tiny", f"narrow={place / 'window16'}", "-o", out,
        "--data", place / "texts", "--contexts", "90:3", "--generate", 6, "--prompts", 3,
        "--prompt-tokens", 50, "--dtype", "f32", "--threads", 1, *more,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_healing_judges_every_row_and_goes_on_where_it_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = judged(place, monkeypatch)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "original", "original, other chunks", "original, last 16 tokens", "narrow",
        "narrow, memory off", "narrow, window off",
    ]  # fmt: skip
    assert "memory" in rows["narrow, memory off"]["missing"], "a window alone has none"
    text, written = "text 90 x 3", "write 6 after 3 x 50"
    original, narrow = (rows[name]["parts"] for name in ("original", "narrow"))
    assert original[text]["beyond"]["kl_nats"] == 0
    assert original[written]["agreement_frac"] == 1
    reference = Reference(load(place / "tiny", dtype="f32").decoder, healing_text(place))
    distances = reference.compare(load(place / "window16", dtype="f32").decoder)
    assert narrow[text]["beyond"]["kl_nats"] == pytest.approx(
        float(distances.kl[:, 23:].mean()), rel=1e-3
    )
    differences = {
        (d["better"], d["than"], d["part"], d["measure"]): d for d in result["differences"]
    }
    gain = differences["narrow", "narrow, window off", text, "kl_nats"]
    off = rows["narrow, window off"]["parts"][text]["beyond"]["kl_nats"]
    assert gain["gain"] == pytest.approx(off - narrow[text]["beyond"]["kl_nats"], rel=1e-4)
    assert gain["n"] == 3
    assert "kept" not in capsys.readouterr().out
    again = judged(place, monkeypatch, f"wide={place / 'window40'}", "--difference", "wide:narrow")
    said = capsys.readouterr().out
    assert said.count("kept") == 2 * 5
    assert [row["name"] for row in again["rows"]][-1] == "wide"
    assert again["rows"][3] == result["rows"][3]
    assert {(d["better"], d["than"]) for d in again["differences"]} == {("wide", "narrow")}
    assert "| wide against narrow |" in healing_table(again)
    fewer = judged(place, monkeypatch, "--skip", "off", "--skip", "chunks")
    assert {row["name"] for row in fewer["rows"]} == {row["name"] for row in again["rows"]}


def healing_text(place: Path) -> torch.Tensor:
    from respike.text import contexts

    files = sorted((place / "texts").glob("*.txt"))
    tokenizer = load(place / "tiny").tokenizer
    return contexts(files, tokenizer, context_tokens=90, max_tokens=270)


def test_an_unknown_row_in_a_difference_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="no row is called 'cured'"):
        judged(place, monkeypatch, "--difference", "cured:narrow")
    with pytest.raises(SystemExit, match="two rows are called 'narrow'"):
        judged(place, monkeypatch, f"narrow={place / 'window40'}")


def test_recall_by_length_pairs_trials_and_goes_on_where_it_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "recall.json"
    words = (place / "tiny", f"narrow={place / 'window16'}", "-o", out, "--threads", 1)
    lengths = ("--lengths", "1024:3,1500:2", "--dtype", "f32", "--families", "passkey,questions")
    run(recall_length, monkeypatch, *words, *lengths, "--original-max-tokens", 1100)
    result = json.loads(out.read_text())
    original, narrow = (row["parts"] for row in result["rows"])
    assert set(original) == {"passkey 1024 x 3", "questions 1024 x 3"}
    assert set(narrow) == {*original, "passkey 1500 x 2", "questions 1500 x 2"}
    assert len(narrow["questions 1024 x 3"]["per_trial"]) == 3
    assert "lost_95" in narrow["passkey 1024 x 3"]
    assert "lost_95" not in narrow["passkey 1500 x 2"]
    assert result["evidence"] == {"passkey": False, "questions": False}, "a random model"
    assert "(no evidence)" in recall_table(result)
    original["passkey 1024 x 7"] = {**original["passkey 1024 x 3"], "trials": 7}
    lines = [line for line in recall_table(result).splitlines() if line.startswith("| 1,024")]
    assert [line.split("|")[2].strip() for line in lines] == ["3", "7", "3"]
    assert lines[1].endswith("| - | - |"), "what another number of trials found is no neighbour"
    capsys.readouterr()
    run(recall_length, monkeypatch, *words, *lengths)
    assert capsys.readouterr().out.count("kept") == 2 + 4
    tasks = recall_length.tasks_of("passkey", 1024, 7)
    assert [(task.depth_frac, count) for task, count in tasks] == [
        (0.1, 2), (0.3, 2), (0.5, 1), (0.7, 1), (0.9, 1),
    ]  # fmt: skip


def test_a_file_of_another_question_is_refused_and_left(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"asked": {"dtype": "bf16"}, "rows": [{"name": "a"}]}))
    assert rows_before(path, {"dtype": "bf16"}) == [{"name": "a"}]
    with pytest.raises(SystemExit, match=r"x\.json holds another .*: dtype was 'bf16', is 'f32'"):
        rows_before(path, {"dtype": "f32"})
    assert rows_before(tmp_path / "y.json", {}) == []
    assert counts("2048:20,8192:6") == {2048: 20, 8192: 6}
    for wrong in ("2048", "a:b", "0:3", ""):
        with pytest.raises(Exception, match="LENGTH:COUNT"):
            counts(wrong)
    with pytest.raises(Exception, match="NAME=FOLDER"):
        named_folder("folder")
    with pytest.raises(Exception, match="does not exist"):
        named_folder(f"a={tmp_path / 'none'}")


@pytest.mark.parametrize("total", [7, 12, 13, 40])
def test_what_is_shown_little_is_predicted_from_three_quarters_to_all_of_it(total: int) -> None:
    decoder, last = random_decoder(model_config(LAYERS)), 12
    tokens = random_tokens(1, total)[0]
    with torch.inference_mode():
        found = hidden_of_last(decoder, tokens, last)[0]
        assert len(found) == total
        for place in range(total):
            begin = max(0, -(-(place + 1 - last) // 3) * 3)
            seen = tokens[begin : place + 1]
            assert len(seen) <= last
            assert len(seen) > last - 3 or begin == 0
            expected = decoder.hidden(seen[None])[0][0, -1]
            torch.testing.assert_close(found[place], expected, rtol=1e-4, atol=1e-5)
