"""Documents made up for measuring: what is asked for is in there, once and where it should be."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

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
                if case.kind != "hops3":  # whose towns may be drawn twice, and then mean nothing
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
