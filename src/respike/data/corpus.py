"""Build a corpus from a manifest: fetch, read, clean, write shards and a receipt.

The folder holds ``NAME-00000.jsonl.gz`` for each source, the licence texts, ``corpus.json`` (the
receipt) and nothing else. The same manifest gives the same bytes. It is built in a hidden sibling
that becomes OUT in the end; what was fetched and read there is used again after an interruption.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import translate
from itertools import count
from pathlib import Path
from typing import Any

from respike import __version__
from respike.checkpoint import file_sha256
from respike.data.archives import members
from respike.data.clean import Cleaner, frequent_edges, plain, without_edges
from respike.data.documents import find_files, read_documents
from respike.data.fetch import fetch
from respike.data.manifest import Manifest, SourceEntry
from respike.data.markup import man_text, page_text, pod_text
from respike.errors import DataError, UsageError
from respike.files import put_in_place
from respike.loading import Progress
from respike.tokenizer import Tokenizer

RECEIPT = "corpus.json"
CHATS = "chat.jsonl"
"""A teacher's answers, which `respike.data.teacher` adds."""
SHARD_CHARS = 32_000_000
"""Of one shard, before compression."""
CHARS_PER_TOKEN = 3.8
"""For the estimate, where no tokenizer is given: SmolLM2 on docs-en."""


def build_corpus(
    manifest: Manifest,
    out: str | Path,
    *,
    packages: str | Path | None = None,
    exclude_near: Sequence[str | Path] = (),
    tokenizer: Tokenizer | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a corpus.

    Args:
        manifest: From `load_manifest`.
        out: Folder to create.
        packages: Folder that downloads are kept in. None keeps them until the corpus is done.
        exclude_near: Texts that will be measured on; what is nearly in them is left out.
        tokenizer: Counts tokens; without one they are estimated.
        force: Replace ``out`` if it is a corpus.
        progress: Called with (steps done, steps): two for each source.

    Returns:
        The receipt, as written to ``corpus.json``.

    Raises:
        UsageError: ``out`` exists and ``force`` was not given, or it is no corpus.
        DataError: A package cannot be downloaded or is not the pinned one, or a file is malformed.
        BackendError: A client or library that is needed is not installed.
    """
    out = Path(os.path.abspath(out))
    _check_out(out, force)
    cleaner = Cleaner(_heldout(exclude_near))
    staging = out.parent / f".{out.name}.partial"
    new = staging / "new"
    try:
        shutil.rmtree(new, ignore_errors=True)
        (new / "licences").mkdir(parents=True)
        kept = Path(packages or staging / "packages")
        rows = _write_sources(manifest, kept, staging, cleaner, tokenizer, progress)
        receipt = _receipt(manifest, rows, exclude_near, tokenizer)
        text = json.dumps(receipt, indent=1, ensure_ascii=False)
        (new / RECEIPT).write_text(text + "\n", encoding="utf-8")
        put_in_place(new, out, staging / "old")
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    shutil.rmtree(staging, ignore_errors=True)
    return receipt


def _write_sources(
    manifest: Manifest,
    packages: Path,
    staging: Path,
    cleaner: Cleaner,
    tokenizer: Tokenizer | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Read every source, then clean and write them in the manifest's order; the receipt's rows."""
    done, steps = count(1), 2 * len(manifest.sources)
    read, rows = [], []
    for entry in manifest.sources:
        read.append(_read(entry, fetch(entry.archive, packages), staging))
        if progress:
            progress(next(done), steps)
    for entry, raw in zip(manifest.sources, read, strict=True):
        rows.append(_write_source(entry, raw, staging / "new", cleaner, tokenizer))
        if progress:
            progress(next(done), steps)
    return rows


def _check_out(out: Path, force: bool) -> None:
    if out.is_symlink():
        raise UsageError(f"{out}: is a link", hint="name the folder itself")
    if not out.exists():
        return
    if not force:
        raise UsageError(
            f"{out}: already exists",
            hint="choose another folder, or add --force to replace it; chats are added without "
            "--manifest",
        )
    if not (out / RECEIPT).is_file():
        raise UsageError(f"{out}: was not written by respike corpus, so --force will not touch it")
    if (out / CHATS).exists():
        raise UsageError(
            f"{out}: holds {CHATS}, a teacher's answers, which --force would remove",
            hint="move that file away first, or leave out --manifest to add to it",
        )


def _heldout(paths: Sequence[str | Path]) -> Iterator[str]:
    """Texts that will be measured on, each turn of a conversation by itself."""
    for document in read_documents(paths) if paths else ():
        yield document.text
        yield from (message["content"] for message in document.messages or ())


def _read(entry: SourceEntry, archive: Path, staging: Path) -> Path:
    """The source's documents as they are in the package, as JSON Lines; read once."""
    how = hashlib.sha256((__version__ + entry.model_dump_json()).encode()).hexdigest()[:16]
    raw = staging / f"{entry.name}-{how}.jsonl.gz"
    if raw.exists():
        return raw
    wanted, licence = _Chosen(entry), b""
    partial = raw.with_suffix(".partial")
    documents = 0
    with gzip.open(partial, "wt", encoding="utf-8", compresslevel=1) as file:
        for name, data in members(archive, lambda n: wanted(n) or n == entry.licence_file):
            if name == entry.licence_file:
                licence = data
                if not wanted(name):
                    continue
            for text in _texts(entry, name, data):
                documents += 1
                file.write(json.dumps({"file": name, "text": text}, ensure_ascii=False) + "\n")
    if wanted.unmatched:
        raise DataError(f"{entry.name}: no file of {entry.package} matches {wanted.unmatched}")
    if not documents:
        raise DataError(f"{entry.name}: no text in the files of {entry.package} that it takes")
    if not licence:
        raise DataError(f"{entry.name}: {entry.package} holds no {entry.licence_file}")
    (staging / f"{entry.name}.licence").write_bytes(licence)
    partial.replace(raw)
    return raw


class _Chosen:
    """Whether a file of some name is read. ``*`` in a pattern stands for slashes too.

    Attributes:
        unmatched: Patterns that none of the names so far was like.
    """

    def __init__(self, entry: SourceEntry) -> None:
        self._take = {pattern: re.compile(translate(pattern)) for pattern in entry.files}
        self._leave = [re.compile(translate(pattern)) for pattern in entry.exclude]
        self._below = entry.take_frac * 2**32
        self.unmatched = list(entry.files)

    def __call__(self, name: str) -> bool:
        matched = [pattern for pattern, compiled in self._take.items() if compiled.match(name)]
        self.unmatched = [pattern for pattern in self.unmatched if pattern not in matched]
        if not matched or any(p.match(name) for p in self._leave):
            return False
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:4], "big") < self._below


def _texts(entry: SourceEntry, name: str, data: bytes) -> Iterator[str]:
    """Texts of one file of a package; bytes that are not UTF-8 are read as Latin-1."""
    try:
        data = gzip.decompress(data) if name.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{entry.package}: {name}: {error}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if entry.reader == "json":
        yield from _json_texts(entry, name, text)
    else:
        yield plain(READERS[entry.reader](text))


def _as_it_is(text: str) -> str:
    return text


READERS = {"text": _as_it_is, "html": page_text, "man": man_text, "pod": pod_text}
"""What turns a file into text; json has a way of its own."""


def _json_texts(entry: SourceEntry, name: str, text: str) -> Iterator[str]:
    try:
        found = list(_strings(json.loads(text), entry.json_key))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{entry.package}: {name}: not valid JSON: {error}") from None
    texts = [page_text(s) if "<" in s else s for s in found]
    yield from ["\n\n".join(dict.fromkeys(texts))] if entry.join else texts


def _strings(value: Any, key: str) -> Iterator[str]:
    """Every string under ``key``, wherever it stands; half a surrogate pair becomes ``?``."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name == key and isinstance(item, str):
                yield item.encode("utf-8", "replace").decode("utf-8")
            else:
                yield from _strings(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)


def _records(raw: Path) -> Iterator[dict[str, str]]:
    with gzip.open(raw, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _write_source(
    entry: SourceEntry, raw: Path, folder: Path, cleaner: Cleaner, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Clean one source into its shards; its row of the receipt."""
    before = cleaner.dropped.copy()
    shutil.copyfile(raw.parent / f"{entry.name}.licence", folder / "licences" / entry.name)
    shards = _Shards(folder, entry.name)
    documents = characters = size = tokens = read = 0
    try:
        edges = frequent_edges(r["text"] for r in _records(raw)) if entry.reader == "html" else ()
        for record in _records(raw):
            read += 1
            text = cleaner.clean(without_edges(record["text"], edges))
            if text is None:
                continue
            digest = hashlib.sha256(text.encode()).hexdigest()
            about = {"source": entry.name, "licence": entry.licence, "file": record["file"]}
            shards.write({"text": text, **about, "sha256": digest}, len(text))
            documents += 1
            characters += len(text)
            size += len(text.encode())
            tokens += len(tokenizer.encode(text)) if tokenizer else 0
    finally:
        shards.close()
    return {
        "name": entry.name,
        "package": f"{entry.registry} {entry.package} {entry.version}",
        "archive_sha256": entry.sha256,
        "licence": entry.licence,
        "documents_read": read,
        "documents": documents,
        "characters": characters,
        "bytes": size,
        "tokens": tokens if tokenizer else round(characters / CHARS_PER_TOKEN),
        "dropped": dict(cleaner.dropped - before),
        "shards": {path.name: file_sha256(path) for path in shards.paths},
    }


class _Shards:
    """Compressed JSON Lines in files of bounded size, without a date in them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.paths: list[Path] = []
        self._file: gzip.GzipFile | None = None
        self._characters = 0

    def write(self, record: dict[str, Any], characters: int) -> None:
        """Add one line."""
        if self._file is None or self._characters >= SHARD_CHARS:
            self.close()
            path = self.folder / f"{self.name}-{len(self.paths):05d}.jsonl.gz"
            self.paths.append(path)
            self._file, self._characters = gzip.GzipFile(path, "wb", mtime=0), 0
        self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self._characters += characters

    def close(self) -> None:
        """End the shard that is being written, and make sure that it is on the disk."""
        if self._file is not None:
            self._file.close()
            with self.paths[-1].open("rb") as written:
                os.fsync(written.fileno())
            self._file = None


def _receipt(
    manifest: Manifest,
    rows: list[dict[str, Any]],
    exclude_near: Sequence[str | Path],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    totals = {
        name: sum(row[name] for row in rows)
        for name in ("documents_read", "documents", "characters", "bytes", "tokens")
    }
    heldout = find_files(exclude_near) if exclude_near else []
    return {
        "respike": __version__,
        "manifest": manifest.model_dump(mode="json"),
        "excluded_near": {path.name: file_sha256(path) for path in heldout},
        **totals,
        "tokens_are": "counted" if tokenizer else "estimated",
        "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
        "licences": sorted({row["licence"] for row in rows}),
        "sources": rows,
    }
