"""A tokenizer's files in a Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from respike.errors import CheckpointError
from respike.gguf_vocab import END_OF_TURN

OLD_FORMS = ("tokenizer.model", "vocab.json", "merges.txt")
"""Files that hold a vocabulary, but not how text is cut."""


def load_core(path: Path) -> tokenizers.Tokenizer:
    """``tokenizer.json``.

    Raises:
        CheckpointError: Missing or malformed.
    """
    if not path.is_file():
        found = [n for n in OLD_FORMS if path.with_name(n).is_file()]
        raise CheckpointError(
            f"{path}: no such file" + (f"; {', '.join(found)} alone will not do" if found else ""),
            hint="save the tokenizer again with transformers' AutoTokenizer, which writes it",
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path}: {' '.join(str(error).split())[:200]}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or in the config, there perhaps one of several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: {error}") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def end_ids(folder: Path, config: Mapping[str, Any], core: tokenizers.Tokenizer) -> list[int]:
    """What `Tokenizer.save` wrote; else what generation and tokenizer configs say together."""
    if isinstance(saved := config.get("eos_token_ids"), list):
        found = saved
    else:
        listed = read_json(folder / "generation_config.json").get("eos_token_id")
        eos = config.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        ends = [eos, *(END_OF_TURN if read_template(folder, config) else ())]
        ids = [core.token_to_id(token) for token in ends if isinstance(token, str)]
        found = [*(listed if isinstance(listed, list) else [listed]), *ids]
    return [i for i in dict.fromkeys(found) if type(i) is int and i >= 0]
