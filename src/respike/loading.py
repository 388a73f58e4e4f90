"""From a path to a model that runs: weights, tokenizer and config in one object."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from respike.checkpoint import Checkpoint, GgufCheckpoint, fingerprint, open_checkpoint
from respike.checkpoint.families import expected_tensors
from respike.config import ModelConfig
from respike.device import get_device, get_dtype
from respike.models.decoder import Decoder
from respike.models.spiking import install_spikes
from respike.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass
class Model:
    """A decoder with its tokenizer, and where both came from."""

    decoder: Decoder
    tokenizer: Tokenizer
    config: ModelConfig
    path: Path
    files: list[Path]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of config and weight files; reads the files once."""
        return fingerprint(self.config, self.files)


def load_tokenizer(source: Checkpoint) -> Tokenizer:
    """The tokenizer that belongs to an opened checkpoint."""
    if isinstance(source, GgufCheckpoint):
        return Tokenizer.from_gguf_metadata(source.metadata)
    return Tokenizer.from_folder(source.path)


def load_decoder(
    source: Checkpoint,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """A decoder with the checkpoint's weights, ready to run, without gradients.

    If its config has ``spikes``, it spikes.

    Args:
        source: From `respike.checkpoint.open_checkpoint`.
        device: Name for `respike.device.get_device`.
        dtype: f32, bf16 or f16; None takes the checkpoint's own.
        progress: Called after each tensor.
    """
    target, wanted = get_device(device), get_dtype(dtype) if dtype else source.stored_dtype
    with torch.device("meta"):
        decoder = Decoder(source.config)
    tensors = list(expected_tensors(source.config))
    weights = {}
    for done, (name, _) in enumerate(tensors, start=1):
        weights[name] = source.read(name).to(device=target, dtype=wanted)
        if progress:
            progress(done, len(tensors))
    decoder.load_state_dict(weights, strict=True, assign=True)
    if source.config.spikes:
        install_spikes(decoder, source.config.spikes)
    return decoder.requires_grad_(False).eval()


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model folder or GGUF file.

    Args:
        path: A Hugging Face folder, a folder written by `respike.convert`, or a ``.gguf`` file.
        device: ``cpu``, ``auto`` or a name from ``respike doctor``.
        dtype: f32, bf16 or f16; None takes the checkpoint's own (GGUF: bf16).
        progress: Called after each tensor with (done, total).

    Raises:
        CheckpointError: The checkpoint is missing, corrupt or contradicts its config.
        UnsupportedError: It is of a family or kind respike does not know.
        BackendError: Device or dtype is not to be had.
    """
    source = open_checkpoint(path)
    decoder = load_decoder(source, device=device, dtype=dtype, progress=progress)
    return Model(decoder, load_tokenizer(source), source.config, source.path, source.files)
