"""The page, in a real browser: keyboard only, no internet, a phone's screen, pictures for docs/.

RESPIKE_PAGE_MODEL names a model to take the pictures with; a pico model answers nonsense.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from chromium import PROGRAM, Page, chromium
from respike.documents.judging import LEAST
from respike.documents.prompt import NOT_FOUND
from respike.loading import load
from serving import Served, pico_model, serving

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="chromium is not installed: make system-deps"
)

DOCS = Path(__file__).parent.parent / "docs"
REAL = os.environ.get("RESPIKE_PAGE_MODEL")
TEXT = """SERVICE AGREEMENT

The Supplier keeps the moorings in good order and reports every storm to the harbour master.

The mooring fee is 4350 crowns.

Notices are given in writing and take effect on the day they arrive.
"""
FILLER = (
    "Clause {}. Nothing in this clause limits the rights that the law gives to either party.\n\n"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = load(REAL, weights="int8") if REAL else pico_model(tmp_path_factory.mktemp("pico"))
    name = "smollm2-135m-healed" if REAL else "pico"
    with serving(model, name, hosts=("127.0.0.1",)) as running:
        yield running


@pytest.fixture
def page(served: Served, tmp_path: Path) -> Iterator[Page]:
    with chromium(tmp_path / "profile") as tab:
        tab.size(1280, 800)
        tab.open(served.address)
        yield tab
        assert not tab.errors
        assert tab.requests
        assert all(url.startswith((served.address, "data:")) for url in tab.requests)


def document(folder: Path) -> Path:
    path = folder / "agreement.txt"
    path.write_text("".join(FILLER.format(i) for i in range(12)) + TEXT
                    + "".join(FILLER.format(i) for i in range(12, 20)))  # fmt: skip
    return path


def read_document(page: Page, folder: Path) -> None:
    page.choose_file("#file", document(folder))
    page.wait("document.querySelector('#documents input:checked')?.id.startsWith('ddoc-')")
    page.wait("document.activeElement.id === 'text'")


def ask(page: Page, question: str) -> None:
    page.type(question)
    page.press("Enter")
    page.wait("document.getElementById('send').textContent === 'Send' && "
              "!!document.querySelector('.turn.assistant:last-child details')")  # fmt: skip


def test_chat_with_a_document_by_keyboard_alone(page: Page, served: Served, tmp_path: Path) -> None:
    read_document(page, tmp_path)
    if not REAL:  # it answers nonsense, which would not be found
        page.value("document.getElementById('abstain').focus()")
        page.press("Space")
        assert not page.value("document.getElementById('abstain').checked")
        page.value("document.getElementById('text').focus()")
    ask(page, "What is the mooring fee?")
    page.press("Tab")  # to the button, and on
    assert page.value("document.activeElement.id") == "send"
    assert page.value("document.querySelectorAll('.turn').length") == 2
    page.value("document.querySelector('.turn details').open = true")
    assert page.value("document.querySelectorAll('.turn li').length") > 0
    where = page.value("document.querySelector('.where').textContent")
    assert re.fullmatch(r"\d+ % agreement\.txt, line \d+ \(byte \d+\)", where)
    layers = served.service.model.config.num_hidden_layers
    assert page.value("document.querySelectorAll('#layers rect').length") == layers
    page.wait("document.getElementById('speed').textContent.includes('tokens/s')")
    held, whole = (
        page.value(f"document.getElementById('{i}').textContent") for i in ("held", "whole")
    )
    assert held != "-" != whole
    assert "share" in page.value("document.getElementById('legend').textContent").lower()
    if REAL:
        assert "4350" in page.value("document.querySelector('.turn.assistant span').textContent")
    keep(page, tmp_path, "page")


def test_what_is_not_in_the_document_is_shown_as_such(page: Page, tmp_path: Path) -> None:
    page.size(390, 780, phone=True)
    read_document(page, tmp_path)
    ask(page, "What is the name of the captain's dog?" if REAL else "Which dog?")
    last = "document.querySelector('.turn.assistant')"
    assert page.value(f"{last}.classList.contains('absent')")
    assert page.value(f"{last}.firstChild.textContent") == NOT_FOUND
    assert f"at least {LEAST.evidence:.2f}" in page.value(f"{last}.textContent")
    assert page.value(f"{last}.querySelectorAll('li').length") == 0
    assert page.value(f"{last}.querySelector('details div').textContent.length") > 0
    assert page.value("document.documentElement.scrollWidth") <= 390
    keep(page, tmp_path, "page-phone")


def test_it_fits_a_phone(page: Page) -> None:
    page.size(390, 780, phone=True)
    page.wait("window.innerWidth === 390")
    assert page.value("document.documentElement.scrollWidth") <= 390
    page.type("Hello there")
    page.press("Enter")
    page.wait("document.getElementById('send').textContent === 'Send' && "
              "document.querySelectorAll('.turn.assistant').length === 1")  # fmt: skip
    size = page.value("parseFloat(getComputedStyle(document.querySelector('.turn')).fontSize)")
    assert size >= 16
    box = "document.getElementById('ask').getBoundingClientRect()"
    assert page.value(f"{box}.bottom <= window.innerHeight && {box}.top >= 0")


def test_escape_stops_an_answer_and_frees_its_place(page: Page, served: Served) -> None:
    page.type("Tell me a very long story")
    page.press("Enter")
    page.wait("document.querySelector('.turn.assistant span').textContent.length > 0")
    page.press("Escape")
    page.wait("document.getElementById('send').textContent === 'Send'")
    assert served.idle()
    assert page.value("document.activeElement.id") == "text"


def test_errors_are_shown_in_words(page: Page, served: Served) -> None:
    before = served.service.name
    served.service.scheduler._stopping, stopping = True, False
    try:
        page.type("Hello")
        page.press("Enter")
        page.wait("!!document.querySelector('.turn.error')")
        said = page.value("document.querySelector('.turn.error').textContent")
        assert "shutting down" in said
    finally:
        served.service.scheduler._stopping = stopping
    page.errors = [e for e in page.errors if "503" not in e]
    assert served.service.name == before


def keep(page: Page, folder: Path, name: str) -> None:
    """Pictures with a real model are for the documentation; others only have to come about."""
    path = (DOCS if REAL else folder) / f"{name}.png"
    page.picture(path)
    assert path.read_bytes().startswith(b"\x89PNG")
