"""Text to measure and calibrate on: files in, equal contexts of tokens out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from respike.errors import DataError, UsageError
from respike.files import named
from respike.tokenizer import Tokenizer


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        DataError: Missing, a folder, or not UTF-8; says where.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


CALIBRATION_CONTEXT_TOKENS = 4096

Use = Literal["measure", "calibrate"]


def builtin_text(use: Use = "measure") -> str:
    """The language reference that comes with Python: real prose on every machine.

    Half of its topics are for measuring. Of the others, what they do not share with that half is
    for calibrating: what a model was fitted to is never what it is measured on.
    """
    from pydoc_data.topics import topics

    names = sorted(topics, key=lambda n: (-len(topics[n]), n))
    halves = [
        "\n\n".join(topics[name] for name in names[start::2]).split("\n\n") for start in (0, 1)
    ]
    if use == "measure":
        return "\n\n".join(halves[0])
    known = set(halves[0])
    return "\n\n".join(paragraph for paragraph in halves[1] if paragraph not in known)


def contexts(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    context_tokens: int,
    max_tokens: int,
    use: Use = "measure",
) -> Tensor:
    """Cut files into contexts of equal length, taken in turn from each file.

    A context never crosses files; a file's last, shorter piece is left out. Taking them in turn
    weighs files alike when ``max_tokens`` stops early.

    Args:
        paths: Text files; none takes `builtin_text`.
        tokenizer: Of the model that will read them.
        context_tokens: Tokens in one context.
        max_tokens: Stop after this many tokens.
        use: Which half of the built-in text to take.

    Returns:
        Token ids (N, context_tokens), int64.

    Raises:
        UsageError: ``max_tokens`` is less than one context.
        DataError: A file cannot be read, or all of them are too short for one context.
    """
    if max_tokens < context_tokens:
        raise UsageError(
            f"max_tokens {max_tokens} is less than one context of {context_tokens} tokens",
            hint="raise --max-tokens or lower --context-tokens",
        )
    piles = []
    for text in [read_text(path) for path in paths] or [builtin_text(use)]:
        # Four characters a token, with room to spare: no need to tokenize a whole library.
        ids = tokenizer.encode(text[: 8 * (max_tokens + context_tokens)])
        whole = len(ids) // context_tokens
        piles.append([ids[i * context_tokens : (i + 1) * context_tokens] for i in range(whole)])
    rows = []
    for depth in range(max(map(len, piles), default=0)):
        rows += [pile[depth] for pile in piles if depth < len(pile)]
    rows = rows[: max_tokens // context_tokens]
    if not rows:
        raise DataError(
            f"{named(paths) or 'the built-in text'}: too short for one context of "
            f"{context_tokens} tokens",
            hint="give more text or a smaller --context-tokens",
        )
    return torch.tensor(rows, dtype=torch.int64)


def calibration_contexts(
    paths: Sequence[str | Path], tokenizer: Tokenizer, *, max_tokens: int, trained_tokens: int
) -> Tensor:
    """Contexts long enough for much to be far, and no longer than the source was trained for.

    Args:
        paths: Text files; none takes the half of `builtin_text` that is for calibrating.
        tokenizer: Of the source.
        max_tokens: Stop after this many tokens, but not before the two contexts it takes to fit.
        trained_tokens: Length the source was trained for.

    Returns:
        Token ids (N, T), int64.

    Raises:
        DataError: As `contexts`.
    """
    length = min(CALIBRATION_CONTEXT_TOKENS, trained_tokens)
    most = max(max_tokens, 2 * length)
    return contexts(paths, tokenizer, context_tokens=length, max_tokens=most, use="calibrate")
