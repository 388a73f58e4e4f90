"""Reading a Hugging Face folder: ``config.json`` and one or more safetensors files, lazily.

One family is also read from ``.bin`` files, since its makers publish nothing else.
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from respike.checkpoint import spikingbrain
from respike.checkpoint.families import (
    IGNORED_SUFFIXES,
    PLAIN,
    Noted,
    account_tensors,
    config_from_json,
    expected_tensors,
    foreign_names,
)
from respike.checkpoint.torch_file import read_torch_tensor, torch_header
from respike.errors import CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights we read, as safetensors names them."""
INDEX = "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def read_json(path: Path, limit_bytes: int = 64 << 20) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: Missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > limit_bytes:
            raise CheckpointError(f"{path}: larger than {limit_bytes >> 20} MiB, refused")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "a model is a folder with config.json and safetensors, or a .gguf file"
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


class Folder:
    """A checkpoint folder; weights are read one by one when asked for.

    Every file's header is read and every name and shape checked here; no tensor data is.

    Raises:
        CheckpointError: Anything missing, extra, corrupt or contradictory, with file and tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw_config = read_json(path / "config.json")
        noted = Noted(self.raw_config)
        self.config = config_from_json(noted, str(path / "config.json"))
        # Of other families a copy is read, filled in with defaults; of ours, all is.
        plain = self.config.family in PLAIN and self.raw_config.get("model_type") != "respike"
        self.unknown_keys = noted.unread() if plain else ()
        self._spikingbrain = self.raw_config.get("model_type") == spikingbrain.FAMILY
        self._theirs = foreign_names(self.raw_config, self.config)
        self.files: list[Path] = []
        self._home: dict[str, Path] = {}
        """File of every tensor, by the folder's own names."""
        self.stored_as: dict[str, str] = {}
        """Type of every tensor that is stored, by our names, as safetensors names it."""
        shapes, kinds = {}, {}
        for file in self._weight_files():
            self.files.append(file)
            for name, (shape, kind) in self._header(file).items():
                if name in self._home:
                    raise CheckpointError(f"{file}: tensor {name!r} is also in {self._home[name]}")
                self._home[name], shapes[name], kinds[name] = file, shape, kind
        if self._spikingbrain and spikingbrain.is_quantised(shapes):
            self._as_quantised(shapes)
        ours = {theirs: name for name, theirs in self._theirs.items()}
        self.stored_as = {ours.get(n, n): k for n, k in kinds.items() if not _is_scale(n)}
        weights = {name: shape for name, shape in shapes.items() if not _is_scale(name)}
        account_tensors(self.config, weights, str(path), self._theirs)

    def _as_quantised(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Its tensors say that this is W8ASpike, whose config.json does not."""
        spikingbrain.check_scales(shapes, str(self.path))
        self.config = spikingbrain.as_quantised(self.config)
        self._theirs = {
            name: spikingbrain.their_quantised_name(name)
            for name, _ in expected_tensors(self.config)
        }

    def _weight_files(self) -> list[Path]:
        forms = [(INDEX, "model.safetensors")]
        if self._spikingbrain:
            forms.append((BIN_INDEX, BIN))
        for index, single in forms:
            if (self.path / index).exists():
                return _listed(self.path / index)
            if (self.path / single).exists():
                return [self.path / single]
        if self._spikingbrain:
            names = ", ".join(name for form in forms for name in form)
            raise CheckpointError(f"{self.path}: no weights: none of {names}")
        found = sorted(p.name for p in self.path.glob("*.bin")) + sorted(
            p.name for p in self.path.glob("*.pt*")
        )
        hint = None
        if found:
            hint = f"{found[0]} is a pickle, which can run code: ask its maker for safetensors"
        raise CheckpointError(f"{self.path}: no model.safetensors and no {INDEX}", hint=hint)

    def _is_torch_file(self, file: Path) -> bool:
        return self._spikingbrain and file.suffix == ".bin"

    def _header(self, file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every tensor in a file; the types are ones we read."""
        found = torch_header(file) if self._is_torch_file(file) else _safetensors_header(file)
        for name, (_, kind) in found.items():
            if kind not in DTYPES and not name.endswith(IGNORED_SUFFIXES):
                raise CheckpointError(
                    f"{file}: tensor {name!r} is {kind}, expected {', '.join(DTYPES)}"
                )
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype; of W8ASpike, rounded as its forward does."""
        name = self._theirs.get(name, name)
        tensor = self._read(name)
        scales = name.removesuffix(".weight") + spikingbrain.SCALES
        if scales not in self._home or spikingbrain.NOT_ROUNDED in name:
            return tensor
        where = f"{self._home[scales]}: tensor {scales!r}"
        return spikingbrain.rounded_weight(tensor, self._read(scales), where)

    def _read(self, name: str) -> Tensor:
        """One tensor by the folder's own name of it, as it is stored."""
        file = self._home[name]
        if self._is_torch_file(file):
            return read_torch_tensor(file, name)
        try:
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read: {error}") from error
        return tensor

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the embedding, in which the model computes unless told otherwise."""
        return DTYPES[self.stored_as["model.embed_tokens.weight"]]

    @property
    def license(self) -> str:
        """``license`` of the model card's front matter."""
        card = self.path / "README.md"
        if not card.is_file():
            return "not stated"
        with card.open(encoding="utf-8", errors="replace") as text:
            head = text.read(65536).split("---")
        try:
            front = yaml.safe_load(head[1]) if len(head) > 2 else None
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a 13th month
            return "not stated"
        said = front.get("license") if isinstance(front, dict) else None
        return " ".join(said.split())[:200] if isinstance(said, str) else "not stated"


def _is_scale(name: str) -> bool:
    return name.endswith(spikingbrain.SCALES)


def _listed(index: Path) -> list[Path]:
    """The files an index names, all beside it."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index}: has no weight_map")
    for name in listed.values():
        plain = isinstance(name, str) and Path(name).name == name and len(name) <= 255
        if not plain or name in ("", ".."):
            raise CheckpointError(f"{index}: {str(name)[:60]!r}: no file name")
    return [index.parent / name for name in sorted(set(listed.values()))]


def _safetensors_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                view = handle.get_slice(name)
                found[name] = tuple(view.get_shape()), view.get_dtype()
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: named by the index, but not there") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    return found
