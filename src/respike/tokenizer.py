"""Text to token ids and back, from a Hugging Face folder or from GGUF keys.

Text is untrusted: ``<|im_start|>`` typed by a user stays text. Only `Tokenizer.encode` with
``special=True``, and a chat template's own words, become control tokens.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from respike.chat_template import render
from respike.errors import DataError, UnsupportedError
from respike.gguf_vocab import end_token_ids, read_vocab
from respike.tokenizer_folder import end_ids, load_core, read_json, read_template

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Tokens that have a name, which chat templates may use."""

GGUF_NAMED = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

HOLE = "\ue000document\ue001"
"""Stands for a text that is read elsewhere, see `Tokenizer.chat_around`; private characters."""

MAX_PENDING = 8
"""Tokens a `TokenStream` holds back at most. A UTF-8 character is four at most, with a bare space
before it five; more is not text."""


class Tokenizer:
    """A vocabulary, its special tokens and its chat template.

    Args:
        core: Does the cutting. Truncation and padding, if it came with any, are switched off.
        named: Tokens by the names in `NAMED`.
        eos_token_ids: Tokens that end a generation.
        add_bos: Whether `encode` starts with BOS unless told otherwise.
        chat_template: jinja2 source, or None.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        named: Mapping[str, str],
        eos_token_ids: Sequence[int],
        add_bos: bool,
        chat_template: str | None,
    ) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self.named = dict(named)
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template
        bos = self.named.get("bos_token")
        self.bos_token_id: int | None = None if bos is None else core.token_to_id(bos)
        self.add_bos = add_bos and self.bos_token_id is not None
        added = core.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self.special_ids = frozenset(self._special.values())
        # Digits survive the filters of a template, and no text holds these 24 by chance.
        self._nonce = str(secrets.randbelow(10**24)).zfill(24)
        self._plain, self._plain_ids = _guarded(core, self._nonce)
        unknown = core.token_to_id(self.named.get("unk_token", ""))
        self._forgeable = frozenset(
            i for i in self.special_ids if i < core.get_vocab_size(False) and i != unknown
        )

    @property
    def definition(self) -> str:
        """What ``tokenizer.json`` holds."""
        return str(self._core.to_str())

    @property
    def vocab_size(self) -> int:
        """Tokens, special ones included; a model's embedding may have more rows."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    @property
    def sha256(self) -> str:
        """Of all that decides how text and conversations become tokens."""
        facts = [self._core.to_str(), self.named, self.add_bos, self.chat_template]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def token(self, index: int) -> str | None:
        """The token of an id as the vocabulary spells it, or None for an id it has not."""
        token: str | None = self._core.id_to_token(index) if 0 <= index < 1 << 32 else None
        return token

    def encode(self, text: str, *, special: bool = False, bos: bool | None = None) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: Any text.
            special: Whether control tokens spelled out in ``text`` become control tokens. Never
                for text of a user. Tokens that the model's authors merely added always match.
            bos: Whether to begin with BOS. None does as the model's own tokenizer does.

        Raises:
            DataError: The text is not valid Unicode, or cannot be kept free of control tokens.
        """
        ids = self._ids(text, self._core) if special else self._plain_text(text)
        start = self.add_bos if bos is None else bos
        return [self.bos_token_id, *ids] if start and self.bos_token_id is not None else ids

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of plain text, and the character of ``text`` at which each begins.

        Raises:
            DataError: As `encode`.
        """
        ids = self._plain_text(text)
        offsets = self._plain.encode(text, add_special_tokens=False).offsets
        return ids, [begin for begin, _ in offsets]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; ids that are no token are left out."""
        known = [i for i in ids if 0 <= i < 1 << 32]
        return str(self._core.decode(known, skip_special_tokens=skip_special))

    def stream(self, skip_special: bool = True) -> "TokenStream":
        """A decoder that takes one token at a time."""
        return TokenStream(self, skip_special)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, put in the model's words by its chat template.

        Control tokens come from the template alone: one spelled out inside a message (or in
        ``variables``) is encoded as text, with the same ids as `encode` gives it.

        Args:
            messages: One mapping with ``role`` and ``content`` a turn.
            add_generation_prompt: Whether to open the assistant's turn.
            variables: Further names for the template, such as ``tools`` or ``enable_thinking``.

        Raises:
            UnsupportedError: The model has no chat template.
            DataError: The template refuses the messages, or fails.
        """
        text = self._rendered(messages, add_generation_prompt, variables)
        return self._rendered_ids(text)

    def chat_around(
        self, messages: Sequence[Mapping[str, Any]], *, variables: Mapping[str, Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """As `chat`, of a conversation with one `HOLE` in it: what is before it and what after.

        Raises:
            DataError: The hole is not there, or more than once: the template dropped or copied it.
        """
        text = self._rendered(messages, True, variables)
        parts = text.split(HOLE)
        if len(parts) != 2:
            raise DataError(f"chat template: shows a message {len(parts) - 1} times, expected once")
        return self._rendered_ids(parts[0]), self._rendered_ids(parts[1])

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
    ) -> str:
        """What the template writes, with marks in it, see `_mark`."""
        if self.chat_template is None:
            raise UnsupportedError(
                "this model has no chat template", hint="use `respike generate` with a plain prompt"
            )
        if not all(isinstance(message, Mapping) and "role" in message for message in messages):
            raise DataError("a chat message is not a mapping with `role` and `content`")
        given = self._mark({**(variables or {}), "messages": list(messages)})
        own = {"add_generation_prompt": add_generation_prompt}
        return render(self.chat_template, self.named | own | given)

    def _rendered_ids(self, text: str) -> list[int]:
        if self._nonce not in text:
            return self._ids(text, self._core)
        return self._plain_text(self._swap_marks(text))

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``; `from_folder` reads them back."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.named,
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            "eos_token_ids": list(self.eos_token_ids),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._core.to_str(), encoding="utf-8")
        text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder, or of one that `save` wrote.

        Raises:
            CheckpointError: ``tokenizer.json`` is missing or malformed.
        """
        folder = Path(path)
        core = load_core(folder / "tokenizer.json")
        config = read_json(folder / "tokenizer_config.json")
        named = {}
        for name in NAMED:
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                named[name] = value
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool):
            bos = core.token_to_id(named.get("bos_token", ""))
            add_bos = bos is not None and bos in core.encode("", add_special_tokens=True).ids
        return cls(
            core,
            named=named,
            eos_token_ids=end_ids(folder, config, core),
            add_bos=add_bos,
            chat_template=read_template(folder, config),
        )

    @classmethod
    def from_gguf_metadata(
        cls, metadata: Mapping[str, Any], source: str = "GGUF keys"
    ) -> "Tokenizer":
        """The tokenizer that a GGUF file's keys describe; ``source`` names the file in messages.

        Raises:
            CheckpointError: Keys are missing or contradict each other.
            UnsupportedError: A kind of tokenizer that is not known here.
        """
        vocab = read_vocab(metadata, source)
        named = {}
        for name, key in GGUF_NAMED.items():
            index = metadata.get(key)
            if type(index) is int and 0 <= index < len(vocab.tokens):
                named[name] = vocab.tokens[index]
        template = metadata.get("tokenizer.chat_template")
        return cls(
            vocab.core,
            named=named,
            eos_token_ids=end_token_ids(metadata),
            add_bos=vocab.add_bos,
            chat_template=template if isinstance(template, str) else None,
        )

    def _ids(self, text: str, core: tokenizers.Tokenizer) -> list[int]:
        try:
            ids: list[int] = core.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise DataError("the text holds half a surrogate pair; it is not Unicode") from None
        return ids

    def _plain_text(self, text: str) -> list[int]:
        ids = self._ids(text, self._plain)
        forged = self._forgeable.intersection(ids)
        if forged:
            raise DataError(
                f"plain text makes the control token {self.token(min(forged))!r} in this vocabulary"
            )
        return [self._plain_ids.get(i, i) for i in ids] if self._plain_ids else ids

    def _words(self) -> str:
        longest_first = sorted(self._special, key=len, reverse=True)
        return "|".join(map(re.escape, longest_first)) or "(?!)"

    def _mark(self, given: Any) -> Any:
        """Put a number in place of each control token that a user spelled out."""
        if isinstance(given, str):
            return re.sub(self._words(), lambda m: f"{self._nonce}{self._special[m[0]]:08}", given)
        if isinstance(given, Mapping):
            return {self._mark(key): self._mark(value) for key, value in given.items()}
        if isinstance(given, list | tuple):
            return [self._mark(item) for item in given]
        return given

    def _swap_marks(self, text: str) -> str:
        """Spell the user's control tokens out again; prefix the template's for `_plain` to see."""
        names = {f"{i:08}": word for word, i in self._special.items()}
        return re.sub(
            f"{self._nonce}([0-9]{{8}})|({self._words()})",
            lambda m: names[m[1]] if m[1] else self._nonce + m[2],
            text,
        )


class TokenStream:
    """Text of a generation, token by token: only whole characters come out."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._ids: list[int] = []
        self._shown = 0

    def push(self, index: int) -> str:
        """Take one token; return the text it completes, which may be none."""
        if index in self._skipped or self._tokenizer.token(index) is None:
            return ""
        self._ids.append(index)
        return self._emit(last=False)

    def flush(self) -> str:
        """What is left at the end, incomplete characters shown as U+FFFD."""
        return self._emit(last=True)

    def _emit(self, *, last: bool) -> str:
        # Tokens already shown stay until others follow: a space may depend on what is before it.
        before = self._text(self._ids[: self._shown])
        text = self._text(self._ids)
        waiting = len(self._ids) - self._shown
        if not last and text.endswith("\ufffd") and waiting < MAX_PENDING:
            return ""
        new = text[len(before) :]
        if new:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
        return new

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)


def _guarded(core: tokenizers.Tokenizer, nonce: str) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """A twin whose control tokens are spelled with ``nonce`` before them, and its ids in ``core``.

    It shares the vocabulary. Text that does not hold the nonce cannot name a control token.
    """
    twin = tokenizers.Tokenizer(core.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(core, part) is not None:
            setattr(twin, part, getattr(core, part))
    added = sorted(core.get_added_tokens_decoder().items())
    names = {i: nonce + token.content if token.special else token.content for i, token in added}
    twin.add_tokens(
        [
            AddedToken(
                names[i],
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
            )
            for i, token in added
        ]
    )
    pairs = [(twin.token_to_id(name), i) for i, name in names.items()]
    return twin, {theirs: i for theirs, i in pairs if theirs is not None and theirs != i}
