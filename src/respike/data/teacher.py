"""Conversations that a model writes itself: it answers seed prompts, with a seed.

Data of a kind that no package holds, and in the model's own words. Line n depends on the model,
the topics, the settings and n alone, so an interrupted run is taken up where it stopped.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from respike.data.documents import Document
from respike.device import dtype_name
from respike.errors import DataError, UnsupportedError, UsageError
from respike.generation import Sampling, stream
from respike.loading import Model, Progress

TEMPLATES = (
    "Explain {topic} in a few sentences.",
    "What is {topic}?",
    "Give a short introduction to {topic}.",
    "I have never heard of {topic}. What should I know about it first?",
    "Name three facts about {topic}.",
    "Write a short paragraph about {topic} for a newspaper.",
    "When would somebody need {topic}?",
    "Ask me three questions about {topic}, and answer them.",
)
TOPICS = (
    "rivers", "bread", "the moon", "prime numbers", "steam engines", "honey bees", "glass",
    "the printing press", "volcanoes", "chess", "vaccines", "bridges", "the tides", "paper",
    "electric motors", "earthquakes", "the alphabet", "clouds", "libraries", "soap",
)  # fmt: skip
MAX_TOPICS = 20_000
HEADING = re.compile(r"[^\W\d_][\w ,'-]{2,59}")


@dataclass(frozen=True)
class ChatSettings:
    """What decides every line.

    Attributes:
        seed: Other seeds, other prompts and answers.
        max_tokens: Of an answer.
        temperature: Of sampling; see `Sampling`.
        top_p: Likewise.
    """

    seed: int = 0
    max_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95


def headings(documents: Iterable[Document]) -> list[str]:
    """Topics: the first line of each document, where it is short and of words only."""
    found: dict[str, None] = {}
    for document in documents:
        first = document.text.lstrip().split("\n", 1)[0].strip(" #.:")
        if HEADING.fullmatch(first):
            found[first] = None
        if len(found) >= MAX_TOPICS:
            break
    return list(found)


def prompt(number: int, seed: int, topics: Sequence[str] = TOPICS) -> str:
    """The question of this number."""
    rng = random.Random(f"chat {seed}/{number}")
    return rng.choice(TEMPLATES).format(topic=rng.choice(topics))


def write_chats(
    model: Model,
    path: str | Path,
    count: int,
    *,
    settings: ChatSettings = ChatSettings(),
    topics: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Let a model answer ``count`` prompts; one JSON line each, with ``messages``.

    Args:
        model: The teacher; needs a chat template.
        path: JSON Lines file. Lines that are there already are kept, if they are of the same
            model, topics and settings; a last line that was cut off is written again.
        count: Lines in the end.
        settings: Seed, length, sampling.
        topics: What to ask about, such as `headings`; none takes `TOPICS`.
        progress: Called with (lines done, lines).

    Returns:
        Lines, those of them that are new, and tokens of the new answers.

    Raises:
        UsageError: ``count`` is less than 1.
        UnsupportedError: The model has no chat template.
        DataError: The file holds something else, or cannot be written.
    """
    if count < 1:
        raise UsageError(f"{count} chats: expected at least 1")
    if model.tokenizer.chat_template is None:
        raise UnsupportedError(f"{model.path} has no chat template, so it cannot answer")
    path, topics = Path(path), topics or TOPICS
    made_by = {
        "teacher": Path(model.path).resolve().name,
        "fingerprint": model.fingerprint,
        "computed_in": dtype_name(model.decoder.embedding.dtype),
        "topics_sha256": hashlib.sha256("\n".join(topics).encode()).hexdigest(),
        **asdict(settings),
    }
    try:
        done = _lines_done(path, made_by)
        tokens = 0
        with path.open("ab") as file:
            for number in range(done, count):
                messages, size = _chat(model, number, settings, topics)
                line = json.dumps({"messages": messages, "made_by": made_by}, ensure_ascii=False)
                file.write((line + "\n").encode())
                file.flush()
                tokens += size
                if progress:
                    progress(number + 1, count)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    new = max(0, count - done)
    return {"chats": done + new, "new": new, "new_tokens": tokens, "made_by": made_by}


def _chat(
    model: Model, number: int, settings: ChatSettings, topics: Sequence[str]
) -> tuple[list[dict[str, str]], int]:
    """A question and its answer, and the answer's tokens."""
    sampling = Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=random.Random(f"answer {settings.seed}/{number}").getrandbits(62),
    )
    messages = [{"role": "user", "content": prompt(number, settings.seed, topics)}]
    tokens = model.tokenizer.chat(messages)
    text = stream(model, tokens, max_tokens=settings.max_tokens, sampling=sampling)
    messages.append({"role": "assistant", "content": "".join(text).strip()})
    return messages, len(text.result.tokens)


def _lines_done(path: Path, made_by: dict[str, Any]) -> int:
    """Whole lines of the same kind; cuts off a last one that is not whole."""
    if not path.exists():
        return 0
    done = whole = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            done += 1
            whole += len(line)
            try:
                same = json.loads(line)["made_by"] == made_by
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise DataError(
                    f"{path}: line {done} was not written by this model about these topics with "
                    "these settings",
                    hint="choose another file, or the same model, corpus and settings",
                )
        file.truncate(whole)
    return done
