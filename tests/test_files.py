"""Files and folders that are written whole or not at all."""

import os
from pathlib import Path

import pytest

from refusal import one_line
from respike.errors import DataError
from respike.files import put_in_place, replace_text


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    for text in ("one", "zwei \u2603"):
        replace_text(path, text)
        assert path.read_text(encoding="utf-8") == text

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError) as caught:
        replace_text(path, "three")
    one_line(caught.value, path, "No space left")
    assert path.read_text(encoding="utf-8") == "zwei \u2603"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_place_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "a", tmp_path / "file" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="cannot be written"):
            replace_text(path, "")


def test_a_folder_that_cannot_be_replaced_stays_even_if_it_cannot_be_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, out, old = (tmp_path / name for name in ("new", "out", "old"))
    for folder in (new, out, old):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path != out:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="Input/output error"):
            put_in_place(new, out, old)
    assert (old / "name").read_text() == "out", "a disk that fails twice loses nothing"
    put_in_place(new, out, old)
    assert (out / "name").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]
