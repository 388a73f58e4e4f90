"""Documents as tokens on disk: tokenised once, read by memory map, in any order.

tokens.bin    token ids, uint16 or uint32, one document after the other
counted.bin   one byte a token: whether it counts for the loss (only where there are conversations)
ends.bin      int64: where each document ends
hashes.bin    uint64: hash of each document's text, which decides its split
store.json    what it was made of
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from respike.checkpoint import file_sha256
from respike.data.documents import Document, find_files, read_file
from respike.errors import DataError
from respike.files import named
from respike.loading import Progress
from respike.tokenizer import Tokenizer

Split = Literal["train", "heldout"]
Array = np.ndarray[Any, np.dtype[Any]]
VERSION = 1


@dataclass(frozen=True)
class TokenStore:
    """Tokens of documents; see `prepare`.

    Attributes:
        folder: Where it is.
        key: Hash of the files and the tokenizer it was made of.
        tokens: All token ids (N,), uint16 or uint32.
        ends: Where each document ends (D,).
        hashes: Of each document's text (D,).
        counted: Which tokens count for the loss (N,), or None for all.
    """

    folder: Path
    key: str
    tokens: Array
    ends: Array
    hashes: Array
    counted: Array | None

    def spans(
        self, split: Split, heldout_frac: float, max_tokens: int, min_tokens: int = 1
    ) -> Array:
        """Begin and end (S, 2) of the documents of a split, in pieces of at most ``max_tokens``.

        Documents and pieces shorter than ``min_tokens`` are left out.

        A document's split depends on the hash of its text alone: it is the same wherever the text
        stands, and a document held out at some fraction stays so at every greater one.
        """
        begins = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])
        heldout = self.hashes.astype(np.float64) < heldout_frac * 2.0**64
        wanted = heldout if split == "heldout" else ~heldout
        begins, ends = begins[wanted], self.ends[wanted]
        pieces = -(-(ends - begins) // max_tokens)
        first = np.cumsum(pieces) - pieces
        number = np.arange(pieces.sum()) - np.repeat(first, pieces)
        cut = np.repeat(begins, pieces) + number * max_tokens
        found = np.stack([cut, np.minimum(cut + max_tokens, np.repeat(ends, pieces))], axis=1)
        kept: Array = found[found[:, 1] - found[:, 0] >= min_tokens]
        return kept


def document_hash(document: Document) -> int:
    """64 bits of what makes the document itself."""
    digest = hashlib.blake2b(document.identity.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def prepare(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    folder: str | Path,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenise documents into ``folder``, or open it if it was made of the same.

    Memory holds one document at a time. What a killed run left behind, the next one removes.

    Args:
        paths: Files, folders, patterns; see `respike.data.documents`.
        tokenizer: Of the model; conversations go through its chat template.
        folder: To create.
        progress: Called with (files done, files).

    Raises:
        DataError: A file is malformed, all are empty, or ``folder`` holds something else.
        UnsupportedError: Conversations, and a tokenizer without a chat template.
    """
    files, folder = find_files(paths), Path(folder)
    made_of = {
        "version": VERSION,
        "tokenizer": tokenizer.sha256,
        "files": [[file.name, _sha256(file)] for file in files],
    }
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    if os.path.lexists(folder):
        store = open_store(folder)
        if store.key != key:
            raise DataError(
                f"{folder}: holds the tokens of other files or of another tokenizer",
                hint="choose another folder, or remove this one",
            )
        return store
    staging = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        staging.mkdir()
        facts = _write(files, tokenizer, staging, progress)
        if not facts["documents"]:
            raise DataError(f"{named(paths)}: no text in any of {len(files)} files")
        text = json.dumps({"key": key, **made_of, **facts}, indent=1)
        (staging / "store.json").write_text(text + "\n", encoding="utf-8")
        staging.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return open_store(folder)


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def open_store(folder: str | Path) -> TokenStore:
    """The tokens that `prepare` wrote.

    Raises:
        DataError: It is no such folder, or it is damaged.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        dtype, count, documents = facts["dtype"], facts["tokens"], facts["documents"]
        tokens = np.memmap(folder / "tokens.bin", dtype, "r", shape=(count,))
        ends = np.fromfile(folder / "ends.bin", np.int64)
        hashes = np.fromfile(folder / "hashes.bin", np.uint64)
        counted = None
        if facts["conversations"]:
            counted = np.memmap(folder / "counted.bin", np.bool_, "r", shape=(count,))
        if len(ends) != documents or len(hashes) != documents or ends[-1] != count:
            raise ValueError("its files contradict each other")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{folder}: not a folder of tokens: {reason}") from None
    return TokenStore(folder, facts["key"], tokens, ends, hashes, counted)


def _write(
    files: Sequence[Path], tokenizer: Tokenizer, folder: Path, progress: Progress | None
) -> dict[str, Any]:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    total = documents = conversations = empty = 0
    names = ("tokens", "counted", "ends", "hashes")
    out: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in names}
    try:
        for number, file in enumerate(files, start=1):
            for document in read_file(file):
                ids, counted = _tokens(document, tokenizer)
                if not ids:
                    empty += 1
                    continue
                total += len(ids)
                documents += 1
                conversations += document.messages is not None
                out["tokens"].write(np.array(ids, dtype).tobytes())
                out["counted"].write(counted.tobytes())
                out["ends"].write(np.int64(total).tobytes())
                out["hashes"].write(np.uint64(document_hash(document)).tobytes())
            if progress:
                progress(number, len(files))
    finally:
        for stream in out.values():
            stream.close()
    if not conversations:
        (folder / "counted.bin").unlink()
    facts = {"documents": documents, "empty": empty, "conversations": conversations}
    return {"dtype": dtype, "tokens": total, **facts}


def _tokens(document: Document, tokenizer: Tokenizer) -> tuple[list[int], Array]:
    try:
        if document.messages is not None:
            return chat_tokens(document.messages, tokenizer)
        ids = tokenizer.encode(document.text)
    except DataError as error:
        raise DataError(f"{document.where}: {error}", hint=error.hint) from None
    return ids, np.ones(len(ids), np.bool_)


def chat_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> tuple[list[int], Array]:
    """A conversation's tokens, and which of them the assistant says (its end of turn included).

    Raises:
        DataError: The template refuses the messages, or rewrites earlier turns, so that nobody can
            say which tokens are whose.
        UnsupportedError: No chat template.
    """
    ids = tokenizer.chat(messages, add_generation_prompt=False)
    counted = np.zeros(len(ids), np.bool_)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.chat(messages[:turn])
        after = tokenizer.chat(messages[: turn + 1], add_generation_prompt=False)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"messages[{turn}]: the chat template writes this turn otherwise when others follow"
            )
        counted[len(before) : len(after)] = True
    return ids, counted
