"""From a path to a model that runs: weights, tokenizer and config in one object."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from respike.checkpoint import Checkpoint, GgufCheckpoint, fingerprint, open_checkpoint
from respike.checkpoint.families import expected_tensors
from respike.config import ModelConfig
from respike.device import get_device, get_dtype
from respike.errors import UnsupportedError
from respike.models.decoder import Decoder
from respike.models.engine import engine_obstacle
from respike.models.packing import pack_decoder
from respike.models.spiking import install_spikes
from respike.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@runtime_checkable
class Weights(Protocol):
    """What a decoder is made of: a checkpoint, or something that makes weights up."""

    @property
    def config(self) -> ModelConfig:
        """Shapes and mixers."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype to compute in when none is asked for."""

    def read(self, name: str) -> Tensor:
        """One tensor, by our name of it."""


@dataclass
class Model:
    """A decoder with its tokenizer, and where both came from."""

    decoder: Decoder
    tokenizer: Tokenizer
    config: ModelConfig
    path: Path
    files: list[Path]
    weights: str = "stored"
    """What linear layers are rounded to, see `respike.models.packing.WEIGHTS`."""

    @property
    def engine(self) -> str:
        """What runs the layers: native or torch."""
        return "torch" if self.decoder.engine is None else "native"

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
    source: Weights,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """A decoder with the checkpoint's weights, ready to run, without gradients.

    If its config has ``spikes``, it spikes.

    Args:
        source: Such as `respike.checkpoint.open_checkpoint` opens.
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


def fast_decoder(
    source: Weights,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    weights: str = "stored",
    progress: Progress | None = None,
) -> Decoder:
    """`load_decoder`, packed for the native engine where that can run it; see `load`."""
    decoder = load_decoder(source, device=device, dtype=dtype, progress=progress)
    if emulated(source.config):
        if weights != "stored":
            raise UnsupportedError(
                f"weights {weights!r} with a model whose spikes are emulated with float weights",
                hint="make it spike with `respike spikes --weights int8`",
            )
        return decoder
    return pack_or_plain(decoder, weights)


def emulated(config: ModelConfig) -> bool:
    """Its neurons stand before float weights, which no engine runs."""
    return config.spikes is not None and config.spikes.weights == "float"


def pack_or_plain(decoder: Decoder, weights: str = "stored") -> Decoder:
    """Pack a decoder for the native engine, in place, where that can run it or is asked for."""
    like = decoder.embedding
    if weights != "stored" or engine_obstacle(like.dtype, like.device) is None:
        pack_decoder(decoder, weights)
    return decoder


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    weights: str = "stored",
    progress: Progress | None = None,
) -> Model:
    """Load a model folder or GGUF file, to run it as fast as this machine can.

    Where the native engine can run it (see `respike doctor`) its weights are packed for that, and
    it cannot be trained; `load_decoder` gives one that can.

    Args:
        path: A Hugging Face folder, a folder written by `respike.convert`, or a ``.gguf`` file.
        device: ``cpu``, ``auto`` or a name from ``respike doctor``.
        dtype: f32, bf16 or f16; None takes the checkpoint's own (GGUF: bf16).
        weights: ``stored``, or rounded to ``int8`` or ``int4``, see `pack_decoder`; of a spiking
            model the output head, since its config says how the layers behind neurons run.
        progress: Called after each tensor with (done, total).

    Raises:
        CheckpointError: The checkpoint is missing, corrupt or contradicts its config.
        UnsupportedError: It is of a family or kind respike does not know.
        BackendError: Device or dtype is not to be had, or ``weights`` cannot be rounded there.
    """
    source = open_checkpoint(path)
    decoder = fast_decoder(source, device=device, dtype=dtype, weights=weights, progress=progress)
    tokenizer = load_tokenizer(source)
    return Model(decoder, tokenizer, source.config, source.path, source.files, weights)
