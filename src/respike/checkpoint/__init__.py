"""Checkpoints: Hugging Face safetensors folders and GGUF files, read lazily, never run."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from respike.checkpoint.families import account_tensors
from respike.checkpoint.folder import Folder, read_json
from respike.checkpoint.gguf import GgufFile, read_as
from respike.checkpoint.gguf_config import gguf_config, gguf_tensor_map
from respike.config import ModelConfig
from respike.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "Folder",
    "GgufCheckpoint",
    "file_sha256",
    "fingerprint",
    "open_checkpoint",
    "read_json",
]


class GgufCheckpoint:
    """One GGUF file, with the names and methods of a `Folder`; computes in bf16 if not told.

    Raises:
        CheckpointError: Truncated, corrupt, or not what its own keys say, with file and tensor.
        UnsupportedError: An architecture or quantisation respike does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        self._file = GgufFile(path)
        self.config = gguf_config(self._file)
        ours = {theirs: name for name, theirs in gguf_tensor_map(self.config).items()}
        named = {ours.get(name, name): tensor for name, tensor in self._file.tensors.items()}
        self.stored_as = {name: tensor.type.name for name, tensor in named.items()}
        # rope_freqs.weight, of long-context models, went into the config.
        shapes = {n: tensor.shape for n, tensor in named.items() if n != "rope_freqs.weight"}
        account_tensors(self.config, shapes, str(path))
        self.stored_dtype = torch.bfloat16

    @property
    def license(self) -> str:
        """``general.license`` of the file."""
        return str(self._file.metadata.get("general.license", "not stated"))

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's key-value pairs, tokenizer included."""
        return self._file.metadata

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised, float32."""
        return read_as(self._file, self.config, name)


Checkpoint = Folder | GgufCheckpoint
"""A source of weights, checked by name and shape before any is read."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model folder or a ``.gguf`` file; reads headers only.

    Raises:
        CheckpointError: Not there, or not a checkpoint.
    """
    path = Path(path)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if is_folder:
        return Folder(path)
    if is_file:
        return GgufCheckpoint(path)
    raise CheckpointError(
        f"{path}: no such folder or file",
        hint="give a folder with config.json and safetensors, or a .gguf file",
    )


def fingerprint(config: ModelConfig, files: list[Path]) -> str:
    """SHA-256 over a model's config and weight files: two models are equal if theirs are."""
    digest = hashlib.sha256(config.model_dump_json().encode())
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
