"""A reading: what a model remembers of documents, where it read what, and the file that holds both.

The file is a state file (`respike.models.state`) with two more tensors and one more note:

    document.points  int64 (N, 4): token, source, byte of the source's text, line or page; in order
    document.tokens  int32: every token read; only when some mixer keeps all it has read
    document         JSON: the model, how it ran, the sources with their checksums, see `Reading`
"""

import json
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from respike import __version__
from respike.config import ModelConfig
from respike.device import dtype_name
from respike.errors import DataError
from respike.loading import Model, load
from respike.models.state import MORE, DecoderState, check_notes
from respike.models.state_file import read_notes

NOTE = "document"


class Made(TypedDict):
    """By what a reading was made."""

    path: str
    recipe: str
    weights: str
    dtype: str


@dataclass(frozen=True)
class Read:
    """A source that was read to its end; see `respike.documents.sources.Source`.

    Attributes:
        first_token: Of its text, counted from the beginning of the reading.
        end_token: One after the last.
    """

    name: str
    unit: str
    num_bytes: int
    sha256: str
    text_bytes: int
    first_token: int
    end_token: int


@dataclass
class Reading:
    """What was read so far.

    Attributes:
        state: After the last token.
        model: By what.
        begin_token: The first token of the first document.
        stream: SHA-256 over all tokens, with that of the reading this one continues before them.
        sources: What was read to its end.
        points: (token, source, byte, place) of tokens, flattened.
        tokens: Every token, or None where nothing could point to one.
    """

    state: DecoderState
    model: Made
    begin_token: int
    stream: str = ""
    sources: list[Read] = field(default_factory=list)
    points: "array[int]" = field(default_factory=lambda: array("q"))
    tokens: "array[int] | None" = None

    @property
    def num_tokens(self) -> int:
        """Tokens read, with what stands before the documents."""
        return self.state.num_tokens

    def facts(self) -> dict[str, Any]:
        """For people and programs: all but the tensors."""
        return {
            "respike": __version__,
            "model": self.model,
            "tokens": self.num_tokens,
            "begin_token": self.begin_token,
            "state_bytes": self.state.nbytes(),
            "stream": self.stream,
            "sources": [asdict(source) for source in self.sources],
        }

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the file, readable by its owner only; equal readings give equal bytes."""
        points = torch.tensor(self.points, dtype=torch.int64).view(-1, 4)
        more = {f"{MORE}points": points}
        if self.tokens is not None:
            more[f"{MORE}tokens"] = torch.tensor(self.tokens, dtype=torch.int32)
        notes = {NOTE: json.dumps(self.facts(), sort_keys=True, ensure_ascii=True)}
        try:
            self.state.save(path, fingerprint, more=more, notes=notes)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error

    def place(self, token: int) -> tuple[Read | None, int, int]:
        """Source, byte and line or page at or just before ``token``; no source, before the first.

        The source is None too while it is still being read.
        """
        low, high = 0, len(self.points) // 4
        while low < high:
            middle = (low + high) // 2
            if self.points[4 * middle] <= token:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return None, 0, 0
        _, source, byte, number = self.points[4 * low - 4 : 4 * low]
        known = self.sources[source] if source < len(self.sources) else None
        return known, byte, number


def keeps_all(config: ModelConfig) -> bool:
    """Whether some mixer keeps every token it has read: a retrieval group, or a whole layer."""
    return any(part.mixer in ("full", "blocks") for _, part in config.mixers())


def made_by(model: Model) -> Made:
    """What a reading notes of its model."""
    recipe = model.path / "recipe.yaml"
    name = "none"
    if recipe.is_file():
        lines = recipe.read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("name:")]
        name = names[0] if names else name
    return Made(
        path=str(model.path.resolve()),
        recipe=name,
        weights=model.weights,
        dtype=dtype_name(model.decoder.embedding.dtype),
    )


def read_facts(path: Path) -> dict[str, Any]:
    """What a state file says of itself: the model it needs, its sources; reads no tensor.

    Raises:
        DataError: Not a state file of documents.
    """
    meta = read_notes(path)
    check_notes(path, meta)
    return _facts(path, meta)


def _facts(path: Path, meta: Mapping[str, str]) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(meta[NOTE])
        sources = [Read(**source) for source in facts["sources"]]
        made = facts["model"]
        good = (
            set(made) == set(Made.__annotations__)
            and all(isinstance(value, str) for value in made.values())
            and isinstance(facts["begin_token"], int)
            and isinstance(facts["stream"], str)
        )
        if not good:
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):
        raise DataError(
            f"{path}: a state without documents", hint="make one with `respike read`"
        ) from None
    return facts | {"sources": sources}


def load_reading(path: Path, model: Model) -> Reading:
    """Take up a reading where it was left.

    Raises:
        DataError: Not a state file of documents, of another model, truncated or altered.
    """
    facts = read_facts(path)
    state = model.decoder.init_state()
    more, _ = state.load_with_more(path, model.fingerprint)
    made = made_by(model)
    for name in ("weights", "dtype"):
        if facts["model"][name] != made[name]:
            raise DataError(
                f"{path}: was read with {name} {facts['model'][name]}, the model runs with "
                f"{made[name]}",
                hint=f"add --{name} {facts['model'][name]}",
            )
    points = more.get(f"{MORE}points")
    if points is None or points.dtype != torch.int64 or points.ndim != 2 or points.shape[1] != 4:
        raise DataError(f"{path}: its index is missing or malformed")
    tokens = more.get(f"{MORE}tokens")
    return Reading(
        state,
        facts["model"],
        facts["begin_token"],
        facts["stream"],
        facts["sources"],
        _array("q", points),
        None if tokens is None else _array("i", tokens),
    )


def _array(kind: str, tensor: Tensor) -> "array[int]":
    found: array[int] = array(kind)
    found.frombytes(tensor.contiguous().numpy().tobytes())
    return found


def load_model_of(path: Path, model: str | None, **options: Any) -> Model:
    """The model that made the state file ``path``, run as it was then.

    Args:
        path: The state file.
        model: Where the model is now; None: where it was.
        options: For `respike.load`; weights and dtype come from the file.

    Raises:
        DataError: The file is none, or the model is not where it was.
    """
    made = read_facts(path)["model"]
    place = Path(model or made["path"])
    if not place.exists():
        raise DataError(
            f"{path}: its model {place} is not there", hint="say where it is with --model"
        )
    return load(place, weights=made["weights"], dtype=made["dtype"], **options)
