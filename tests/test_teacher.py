"""Chats that a model writes: the same whenever they are written, and resumable."""

import json
from pathlib import Path

import pytest

from refusal import one_line
from respike.data import Document, read_documents
from respike.data.teacher import TOPICS, ChatSettings, headings, prompt, write_chats
from respike.errors import DataError, UnsupportedError, UsageError
from respike.loading import Model, load
from tiny import save_tiny

SHORT = ChatSettings(seed=5, max_tokens=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(folder)
    return load(folder, dtype="f32")


def test_an_interrupted_run_is_taken_up_at_its_last_whole_line(
    model: Model, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    facts = write_chats(
        model, tmp_path / "a.jsonl", 4, settings=SHORT, progress=lambda *n: steps.append(n)
    )
    assert steps == [(i, 4) for i in range(1, 5)]
    assert (facts["chats"], facts["new"]) == (4, 4)
    assert 0 < facts["new_tokens"] <= 4 * 6
    whole = (tmp_path / "a.jsonl").read_bytes()
    for cut in (0, whole.index(b"\n") + 1, len(whole) - 5):
        (tmp_path / "b.jsonl").write_bytes(whole[:cut])
        write_chats(model, tmp_path / "b.jsonl", 4, settings=SHORT)
        assert (tmp_path / "b.jsonl").read_bytes() == whole
    assert write_chats(model, tmp_path / "a.jsonl", 2, settings=SHORT)["new"] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole


def test_what_is_written_can_be_read_as_training_data(model: Model, tmp_path: Path) -> None:
    write_chats(model, tmp_path / "a.jsonl", 3, settings=SHORT, topics=["salt"])
    found = list(read_documents([tmp_path]))
    assert len(found) == 3
    for number, document in enumerate(found):
        assert document.messages is not None
        assert [m["role"] for m in document.messages] == ["user", "assistant"]
        assert document.messages[0]["content"] == prompt(number, 5, ["salt"])
        assert "salt" in document.messages[0]["content"]


def test_another_seed_or_file_is_refused(model: Model, tmp_path: Path) -> None:
    write_chats(model, tmp_path / "a.jsonl", 1, settings=SHORT)
    with pytest.raises(DataError, match="line 1 was not written by this model") as caught:
        write_chats(model, tmp_path / "a.jsonl", 2, settings=ChatSettings(seed=6, max_tokens=6))
    one_line(caught.value, tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="not written by this model about these topics"):
        write_chats(model, tmp_path / "a.jsonl", 2, settings=SHORT, topics=["salt"])
    save_tiny(tmp_path / "other" / "tiny", seed=1)
    with pytest.raises(DataError, match="not written by this model"):
        write_chats(
            load(tmp_path / "other" / "tiny", dtype="f32"), tmp_path / "a.jsonl", 2, settings=SHORT
        )
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "mine"}) + "\n")
    with pytest.raises(DataError, match="line 1"):
        write_chats(model, tmp_path / "b.jsonl", 2, settings=SHORT)
    assert (tmp_path / "b.jsonl").read_text() == '{"text": "mine"}\n'
    with pytest.raises(UsageError):
        write_chats(model, tmp_path / "c.jsonl", 0, settings=SHORT)


def test_a_model_without_a_chat_template_is_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(UnsupportedError, match="no chat template"):
        write_chats(model, tmp_path / "a.jsonl", 1, settings=SHORT)
    assert not (tmp_path / "a.jsonl").exists()


def test_topics_are_first_lines_that_are_headings_each_once() -> None:
    texts = ["# Rain.\n\nIt falls.", "Rain\nagain", "x" * 90, "12", "  \nSnow and ice:\nYes."]
    assert headings(Document("", text) for text in texts) == ["Rain", "Snow and ice"]
    assert len({prompt(n, 0) for n in range(60)}) > 30
    assert any(topic in prompt(3, 0) for topic in TOPICS)
