"""What is read: files, stdin or bytes, as tokens that know where they come from.

Everything is streamed. The same source gives the same tokens, however often it is read: text is
cut at fixed places before it is tokenized.
"""

import hashlib
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from respike.data.documents import (
    PLAIN,
    Document,
    find_files,
    kind_of,
    open_file,
    pdf_pages,
    read_file,
)
from respike.data.markup import html_text
from respike.errors import DataError, UsageError
from respike.tokenizer import Tokenizer

PIECE_BYTES = 1 << 16
"""Text is tokenized in pieces of about this size, cut at line ends where there are any."""
STDIN = "-"
UNITS = {".pdf": "page", ".parquet": "row", ".jsonl": "record"}
"""What the places in a file are numbered by, if not by lines."""
POINT_TOKENS = 32
"""The index knows the place of every token whose number is a multiple of this."""


@dataclass(frozen=True)
class Piece:
    """Some of a source's text.

    Attributes:
        text: Not empty.
        begin: UTF-8 bytes of the source's text before it.
        number: Of its first line, or of its page, row or record.
    """

    text: str
    begin: int
    number: int


@dataclass
class Tokens:
    """Some tokens of a source, in order.

    Attributes:
        ids: Token ids.
        points: (index in ``ids``, byte of the source's text, line or page) of some of them, at
            least one in every `POINT_TOKENS`.
    """

    ids: Sequence[int]
    points: list[tuple[int, int, int]]


@dataclass
class Source:
    """Something to read. Its facts are known when it was read to the end.

    Attributes:
        name: What it is called: an absolute path, ``stdin``, or what whoever uploaded it said.
        unit: What its places are numbered by: line, page, row or record.
        path: The file, if it is one.
        stream: A binary file that holds its bytes otherwise; can be read once.
        num_bytes: Of the file as it is.
        sha256: Of these.
    """

    name: str
    unit: str = "line"
    path: Path | None = None
    stream: Any = None
    num_bytes: int = 0
    sha256: str = ""
    text_bytes: int = field(default=0, repr=False)

    def pieces(self) -> Iterator[Piece]:
        """Its text, in order.

        Raises:
            DataError: It cannot be read, or is not what its name says; says where.
            BackendError: A reader it needs is not installed.
        """
        for piece in self._found():
            yield piece
            self.text_bytes = piece.begin + len(piece.text.encode())

    def tokens(self, tokenizer: Tokenizer) -> Iterator["Tokens"]:
        """Its tokens, a piece at a time; raises as `pieces`."""
        for piece in self.pieces():
            ids, starts = tokenizer.encode_with_starts(piece.text)
            if not ids:
                continue
            points, done, at, line = [], 0, piece.begin, piece.number
            for index in range(0, len(ids), POINT_TOKENS):
                passed = piece.text[done : starts[index]]
                at, done = at + len(passed.encode()), starts[index]
                line += passed.count("\n") if self.unit == "line" else 0
                points.append((index, at, line))
            yield Tokens(ids, points)

    def _found(self) -> Iterator[Piece]:
        return self._plain() if self.stream is not None or self._is_plain() else self._marked_up()

    def _is_plain(self) -> bool:
        return self.path is not None and kind_of(self.path) in PLAIN

    @property
    def is_plain_file(self) -> bool:
        """Whether its text is the file as it is: neither packed nor in a format."""
        return self.path is not None and self.path.suffix.lower() in PLAIN

    def _plain(self) -> Iterator[Piece]:
        """Text as it is; offsets are those of the file."""
        if self.stream is not None:
            yield from self._lines(self.stream)
            return
        assert self.path is not None
        try:
            with open_file(self.path) as file:
                yield from self._lines(file)
        except (OSError, EOFError) as error:  # of gzip too
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.path}: cannot be read: {reason}") from None

    def _lines(self, file: Any) -> Iterator[Piece]:
        digest, begin, number, held = hashlib.sha256(), 0, 1, b""
        while block := file.read(PIECE_BYTES):
            digest.update(block)
            held += block
            cut = _last_break(held)
            if cut:
                piece = self._piece(held[:cut], begin, number)
                number += held[:cut].count(b"\n")
                begin, held = begin + cut, held[cut:]
                if piece.text:
                    yield piece
        if held:
            piece = self._piece(held, begin, number)
            begin += len(held)
            yield piece
        self.num_bytes, self.sha256 = begin, digest.hexdigest()

    def _piece(self, raw: bytes, begin: int, number: int) -> Piece:
        try:
            text = raw.decode("utf-8-sig" if begin == 0 else "utf-8")
        except UnicodeDecodeError as error:
            where = begin + error.start
            raise DataError(f"{self.name}: not UTF-8 text (byte {where})") from None
        return Piece(text, begin + len(raw) - len(text.encode()), number)

    def _marked_up(self) -> Iterator[Piece]:
        """Text that a reader gets out of the file; offsets are in that text."""
        assert self.path is not None
        with self.path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.num_bytes = self.path.stat().st_size
        yield from self._cut(read_file(self.path))

    def _cut(self, documents: Iterator[Document]) -> Iterator[Piece]:
        begin, lines = 0, 1
        for document in documents:
            if document.messages is not None:
                raise DataError(
                    f"{document.where}: a conversation, expected text",
                    hint="documents are text; conversations are for `respike corpus`",
                )
            place = re.search(r": (page|row|line) (\d+)$", document.where)
            text = document.text if document.text.endswith("\n") else document.text + "\n"
            while text:
                raw = text[:PIECE_BYTES].encode()
                whole = len(text) <= PIECE_BYTES
                part = raw if whole else raw[: _last_break(raw) or len(raw)]
                yield Piece(part.decode(), begin, int(place[2]) if place else lines)
                begin, lines = begin + len(part), lines + part.count(b"\n")
                text = text[len(part.decode()) :]


class UploadedSource(Source):
    """Bytes that somebody sent, with a kind in words."""

    def __init__(self, name: str, content: bytes, kind: str) -> None:
        super().__init__(name, unit="page" if kind == "pdf" else "line")
        self.kind, self.content = kind, content
        self.num_bytes, self.sha256 = len(content), hashlib.sha256(content).hexdigest()

    def _found(self) -> Iterator[Piece]:
        if self.kind == "pdf":
            yield from self._cut(pdf_pages(BytesIO(self.content), self.name))
        elif self.kind == "html":
            text = html_text(self._piece(self.content, 0, 1).text)
            yield from self._cut(iter([Document(self.name, text)] if text.strip() else []))
        else:
            yield from self._lines(BytesIO(self.content))


class TokenizedSource(Source):
    """A source that was read and tokenized already, so that nothing is left to wait for."""

    def __init__(self, source: Source, tokenizer: Tokenizer) -> None:
        super().__init__(source.name, source.unit)
        self._tokens = [
            Tokens(array("i", tokens.ids), tokens.points) for tokens in source.tokens(tokenizer)
        ]
        self.num_bytes, self.sha256 = source.num_bytes, source.sha256
        self.text_bytes = source.text_bytes

    @property
    def num_tokens(self) -> int:
        """Of all of it."""
        return sum(len(tokens.ids) for tokens in self._tokens)

    def tokens(self, tokenizer: Tokenizer) -> Iterator[Tokens]:
        """See `Source.tokens`."""
        del tokenizer
        yield from self._tokens


def open_sources(paths: list[str], stdin: Any) -> list[Source]:
    """What ``paths`` name: files, folders, patterns, ``-``; in their order, each once.

    Raises:
        DataError: A path names nothing that can be read.
        UsageError: stdin twice.
    """
    if paths.count(STDIN) > 1:
        raise UsageError("stdin can be read only once")
    found: list[Source] = []
    for path in paths:
        if path == STDIN:
            found.append(Source("stdin", stream=stdin))
            continue
        for file in find_files([path]):
            unit = UNITS.get(kind_of(file), "line")
            found.append(Source(str(file.resolve()), unit, path=file))
    unique: dict[str, Source] = {}
    for source in found:
        unique.setdefault(source.name, source)
    return list(unique.values())


def _last_break(raw: bytes) -> int:
    """Where to cut UTF-8 text: after its last line, else before its last space, else character.

    Never within a run of line ends, nor at the very end, where a run may go on: tokenizers may take
    one as a single token.
    """
    for pattern in (rb"(?s).*\n(?=[^\n])", rb"(?s).*[^ ](?= )"):
        if found := re.match(pattern, raw):
            return found.end()
    cut = len(raw) - 1
    while cut > 0 and raw[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
