"""Documents made up for measuring: what is asked for is in there, once and where it should be."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import documents
import reading
import tables
from records import KINDS, STYLES, make_case, make_document


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_case_holds_its_facts_at_their_depth_and_nothing_that_gives_it_away(
    kind: str, style: str
) -> None:
    for seed, depth in enumerate((0.0, 0.3, 0.9)):
        case = make_case(kind, style, 800, depth, seed, count)
        assert case == make_case(kind, style, 800, depth, seed, count)
        assert 700 < count(case.text) < 1100
        places = [case.text.index(fact) / len(case.text) for fact in case.facts]
        assert places == sorted(places)
        assert places[0] == pytest.approx(depth, abs=0.12)
        assert all(case.text.count(fact) == 1 for fact in case.facts)
        for word in (*case.answers, *case.wrong):
            assert case.text.count(word) >= 1
            assert word not in case.question
    assert case != make_case(kind, style, 800, 0.9, 99, count)


@pytest.mark.parametrize("style", STYLES)
def test_a_document_of_all_kinds_mixes_none_of_them(style: str) -> None:
    for seed in range(20):
        cases = make_document(style, 900, seed, count)
        assert [case.kind for case in cases] == list(KINDS)
        assert cases == make_document(style, 900, seed, count)
        text = cases[0].text
        assert all(case.text == text for case in cases)
        assert 800 < count(text) < 1300
        for case in cases:
            assert all(text.count(fact) == 1 for fact in case.facts)
            places = [text.index(fact) for fact in case.facts]
            assert places == sorted(places)
            assert places[0] / len(text) == pytest.approx(case.depth_frac, abs=0.2)
            for word in {*case.answers, *case.wrong}:
                assert text.count(word) == sum(word in fact for fact in case.facts)
        absent = cases[KINDS.index("absent")]
        asked = absent.question.removeprefix("What is the ").removesuffix("?")
        assert asked not in text
    assert make_document(style, 900, 0, count) != make_document(style, 900, 1, count)


def test_what_counts_as_right() -> None:
    single = make_case("single", "contract", 300, 0.5, 0, count)
    assert single.correct(f"It is {single.answers[0]} crowns.", abstained=False)
    assert single.correct(f"{single.answers[0][0]},{single.answers[0][1:]}", abstained=False)
    assert not single.correct(f"It is {single.answers[0]} crowns.", abstained=True)
    assert not single.correct("It is 7.", abstained=False)
    changed = make_case("amendment", "record", 300, 0.5, 0, count)
    assert changed.correct(changed.answers[0], abstained=False)
    assert not changed.correct(f"{changed.wrong[0]} {changed.answers[0]}", abstained=False)
    absent = make_case("absent", "record", 300, 0.5, 0, count)
    asked = absent.question.removeprefix("What is the ").removesuffix("?")
    assert asked not in absent.text
    assert absent.correct("", abstained=True)
    assert not absent.correct("7", abstained=False)


# ---- the benchmarks, from end to end -----------------------------------------------------------


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico")
    tiny.save_tiny(folder)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    monkeypatch.setattr(module, "ANSWER_TOKENS", 3)
    module.main()


def test_documents_go_on_where_they_stopped_and_make_a_table(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "documents_x.json"
    same = [pico, f"twin={pico}", "--out", out, "--weights", "stored", "--truncate", 100]
    call(monkeypatch, documents, *same, "--documents", "40:1", "--minutes", 0)
    assert "4 readings were not begun" in capsys.readouterr().err
    assert json.loads(out.read_text())["rows"] == []
    call(monkeypatch, documents, *same, "--documents", "40:1")
    first = json.loads(out.read_text())["rows"]
    assert len(first) == 4 * len(KINDS)
    call(monkeypatch, documents, *same, "--documents", "40:2")
    result = json.loads(out.read_text())
    assert result["rows"][: len(first)] == first
    assert len(result["rows"]) == 2 * len(first)
    by_name = {row["contender"]: row for row in result["rows"]}
    assert by_name["original, last 100"]["tokens"] < by_name["BM25 + original"]["tokens"]
    assert by_name["BM25 + original"]["tokens"] < by_name["original"]["tokens"]
    assert by_name["twin"]["said"] == by_name["original"]["said"]
    table = tables.documents_table(result)
    header = "| 40 tokens, 2 documents | original | original, last 100 | BM25 + original | twin |"
    assert header in table
    assert all(f"| {kind} |" in table for kind in KINDS)


def test_a_long_reading_is_taken_up_and_makes_a_table(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "reading_x.json", tmp_path / "work"
    arguments = [pico, "--tokens", 300, "--weights", "stored", "--out", out, "--work", work]
    call(monkeypatch, reading, *arguments, "--threads", 1)
    whole = json.loads(out.read_text())
    assert len(whole["answers"]) == reading.FACTS
    out.write_text(json.dumps(whole | {"answers": whole["answers"][:4]}))
    call(monkeypatch, reading, *arguments, "--threads", 1)
    again = json.loads(out.read_text())
    assert again["read"] == whole["read"], "it is not read twice"
    assert [a["said"] for a in again["answers"]] == [a["said"] for a in whole["answers"]]
    table = tables.reading_table(again)
    assert f"| tokens | {whole['read']['tokens']:,} |" in table
    assert table.count("\n| 0.") == reading.FACTS
