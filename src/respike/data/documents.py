"""Files in, documents out: text, Markdown, HTML, PDF, JSON Lines, Parquet, and folders of them.

Everything is streamed: memory holds one document, or one piece of a text that is very long.
"""

import glob
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from respike.data.markup import html_text
from respike.errors import BackendError, DataError

MAX_TEXT_BYTES = 16 << 20
"""A longer text file is read as several documents, cut at line ends."""
MAX_LINE_BYTES = 64 << 20
"""The longest line of JSON: one document."""
PARQUET_ROWS = 256
"""Rows of Parquet held at a time."""
PLAIN = (".txt", ".text", ".md", ".markdown", ".rst")
"""Text as it is."""
BINARY = (".pdf", ".parquet")
SUFFIXES = (*PLAIN, ".html", ".htm", ".jsonl", *BINARY)
"""What a folder is searched for; all but `BINARY` may end in .gz besides."""
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Document:
    """Text, or a conversation.

    Attributes:
        where: File, and line or row, for messages.
        text: Empty for a conversation.
        messages: Mappings with ``role`` and ``content``, or None.
    """

    where: str
    text: str = ""
    messages: tuple[Mapping[str, Any], ...] | None = None

    @property
    def identity(self) -> str:
        """What makes two documents the same: the text, or the messages as JSON."""
        if self.messages is None:
            return self.text
        return _json(self.messages)


def _json(value: Any) -> str:
    """As JSON, with what JSON has no word for (Parquet's dates) as text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """Files that ``paths`` name: files, folders, or patterns.

    Of a folder, all that can be read in it and in those below it, linked ones too; what begins with
    a dot is left out, such as what an interrupted `respike corpus` left.

    Raises:
        DataError: A path names nothing, a file of an unknown kind, or what may not be looked at.
    """
    found: list[Path] = []
    for path in paths:
        try:
            found += _found(path)
        except OSError as error:
            raise DataError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    for path in found:
        if kind_of(path) not in SUFFIXES:
            raise DataError(f"{path}: unknown kind of file, expected {', '.join(SUFFIXES)}")
    return list(dict.fromkeys(found))


def _found(name: str | Path) -> list[Path]:
    """The files that one path names."""
    path = Path(name)
    if not str(name):
        raise DataError("an empty path: expected a file, a folder or a pattern")
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError(
                f"{path}: no such file or folder, and no pattern that matches any"
            ) from None
        return [file for match in matches for file in _found(match)]
    if not is_folder:
        return [path]
    inside = sorted(p for p in _below(path) if kind_of(p) in SUFFIXES)
    if not inside:
        raise DataError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
    return inside


def _below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and those below it, each folder once however often it is linked."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        about = os.stat(here)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(here, name) for name in names if not name.startswith("."))
        yield from (path for path in files if path.is_file())


def read_documents(paths: Sequence[str | Path]) -> Iterator[Document]:
    """Every document of files, folders and patterns, in the order of their names.

    Raises:
        DataError: A file is missing, of an unknown kind or malformed; says where.
        BackendError: Parquet or PDF, and what reads it is not installed.
    """
    for path in find_files(paths):
        yield from read_file(path)


def read_file(path: Path) -> Iterator[Document]:
    """Every document of one file.

    Raises:
        DataError: The file cannot be read or is malformed; says where.
        BackendError: Parquet or PDF, and what reads it is not installed.
    """
    suffix = kind_of(path)
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with open_file(path) as file:
            if suffix == ".pdf":
                yield from pdf_pages(file, str(path))
            elif suffix == ".jsonl":
                yield from _json_lines(path, file)
            else:
                yield from _texts(path, file, html=suffix in (".html", ".htm"))
    except (OSError, EOFError, zlib.error) as error:  # of gzip too
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None


def kind_of(path: Path) -> str:
    """Its suffix in small letters, without ``.gz``."""
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    return "" if packed and suffix in BINARY else suffix


def open_file(path: Path) -> BufferedIOBase:
    """Its bytes, unpacked."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    return path.open("rb")


def _utf8(raw: bytes, where: str, begin: int = 0) -> str:
    try:
        return raw.decode("utf-8-sig" if begin == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {begin + error.start})") from None


def _texts(path: Path, file: BufferedIOBase, *, html: bool) -> Iterator[Document]:
    begin = 0
    while block := file.read(MAX_TEXT_BYTES):
        if len(block) == MAX_TEXT_BYTES:
            # The rest of the line; one without line ends is cut all the same, between characters.
            block += file.readline(MAX_TEXT_BYTES)
            while len(block) == 2 * MAX_TEXT_BYTES and (more := file.read(1)):
                if more[0] & 0xC0 != 0x80:
                    file.seek(-1, 1)
                    break
                block += more
        text = _utf8(block, str(path), begin)
        text = html_text(text) if html else text
        if text.strip():
            yield Document(f"{path}: byte {begin}" if begin else str(path), text)
        begin += len(block)


def pdf_pages(file: Any, where: str) -> Iterator[Document]:
    """The text of each page of a PDF that has any; what is only a picture has none.

    Args:
        file: The PDF, open in binary; must be seekable.
        where: Its name, for messages.

    Raises:
        DataError: Not a PDF, damaged, or encrypted.
        BackendError: pypdf is not installed.
    """
    try:
        from pypdf import PdfReader
    except ImportError:
        raise BackendError(
            f"{where}: reading PDF needs pypdf, which is not installed",
            hint="run `pip install 'respike[docs-in]'`",
        ) from None
    number = 0
    try:
        for page in PdfReader(file).pages:
            number += 1
            text = page.extract_text()
            if text.strip():
                yield Document(f"{where}: page {number}", _unicode(text) + "\n")
    except Exception as error:  # pypdf meets what it did not expect with any exception there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        at = f"{where}: page {number}" if number else where
        raise DataError(f"{at}: cannot be read as PDF: {reason}") from None


def _unicode(text: str) -> str:
    """Text with what is no Unicode replaced: fonts of a PDF may map to anything."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _json_lines(path: Path, file: BufferedIOBase) -> Iterator[Document]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{path}: line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes; is this JSON Lines?")
        if not line.strip():
            continue
        try:
            value = json.loads(_utf8(line, where))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(
                f"{where}: expected an object with `text` or `messages`, got a "
                f"{type(value).__name__}"
            )
        yield _record(value, where)


def _record(value: Mapping[str, Any], where: str) -> Document:
    """The document of one object or row."""
    text, messages = value.get("text"), value.get("messages")
    if isinstance(text, str) and messages is None:
        _check_unicode(text, where)
        return Document(where, text)
    if isinstance(messages, list | tuple) and text is None:
        for turn, message in enumerate(messages):
            _check_message(message, f"{where}: messages[{turn}]")
        if not messages:
            raise DataError(f"{where}: `messages` is empty")
        return Document(where, messages=tuple(messages))
    keys = ", ".join(f"`{key}`" for key in list(value)[:8]) or "nothing"
    raise DataError(
        f"{where}: expected a string `text` or a list `messages`, and one of them only; got {keys}"
    )


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: expected an object, got a {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: role {str(role)[:40]!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: expected a string `content`, got a {type(content).__name__}")
    _check_unicode(_json(message), where)


def _check_unicode(text: str, where: str) -> None:
    """JSON can spell half a surrogate pair, which is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is half a surrogate pair; it is not Unicode"
        ) from None


def _parquet(path: Path) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise BackendError(
            f"{path}: reading Parquet needs pyarrow, which is not installed",
            hint="run `pip install 'respike[docs-in]'`",
        ) from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = [n for n in ("text", "messages") if n in file.schema_arrow.names]
            if len(names) != 1:
                raise DataError(
                    f"{path}: expected one column `text` or `messages`, got "
                    f"{', '.join(file.schema_arrow.names[:8]) or 'none'}"
                )
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=names):
                for value in batch.to_pylist():
                    row += 1
                    yield _record(value, f"{path}: row {row}")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: row {row + 1} or one soon after: not UTF-8 text ({error.reason})"
        ) from None
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())[:200]}") from None
