"""From a path to a model that runs: weights, tokenizer and config in one object."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from respike.checkpoint import Checkpoint, GgufCheckpoint, fingerprint, open_checkpoint
from respike.checkpoint.families import expected_tensors
from respike.config import ModelConfig
from respike.device import get_device, get_dtype
from respike.errors import UnsupportedError
from respike.models.decoder import Decoder
from respike.models.engine import engine_obstacle
from respike.models.packing import Packer, pack_decoder
from respike.models.spiking import install_spikes
from respike.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

LAYERS = "model.layers."
"""What the names of a layer's tensors begin with."""


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
    like = _dtype_of(source, dtype), get_device(device)
    with torch.device("meta"):
        decoder = Decoder(source.config)
    for _ in _filled(decoder, source, *like, progress):
        pass
    return decoder.requires_grad_(False).eval()


def _dtype_of(source: Weights, dtype: str | None) -> torch.dtype:
    return get_dtype(dtype) if dtype else source.stored_dtype


def _filled(
    decoder: Decoder,
    source: Weights,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> Iterator[int | None]:
    """Give a decoder its weights, piece by piece, in place of those on the meta device.

    Yields:
        What has its weights, and its neurons, now: None, all outside of the layers; then layers.
    """
    tensors = [name for name, _ in expected_tensors(source.config)]
    done = 0

    def read(names: list[str], prefix: str) -> dict[str, Tensor]:
        nonlocal done
        weights = {}
        for name in names:
            weights[name.removeprefix(prefix)] = source.read(name).to(device=device, dtype=dtype)
            done += 1
            if progress:
                progress(done, len(tensors))
        return weights

    _give(decoder, read([name for name in tensors if not name.startswith(LAYERS)], ""))
    yield None
    for index, layer in enumerate(decoder.layers):
        prefix = f"{LAYERS}{index}."
        _give(layer, read([name for name in tensors if name.startswith(prefix)], prefix))
        if source.config.spikes:
            install_spikes(decoder, source.config.spikes, index)
        yield index


def _give(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Exchange a module's parameters, all but those of a decoder's layers."""
    missing, unexpected = module.load_state_dict(weights, strict=False, assign=True)
    wrong = [name for name in missing if not name.startswith(LAYERS)] + unexpected
    if wrong:
        raise ValueError(f"{type(module).__name__}: no weights, or none known, of {wrong}")


def fast_decoder(
    source: Weights,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    weights: str = "stored",
    progress: Progress | None = None,
) -> Decoder:
    """`load_decoder`, packed for the native engine where that can run it; see `load`.

    Each layer is packed before the next is read: at no time is more than one there as it is stored.
    """
    like = _dtype_of(source, dtype), get_device(device)
    if emulated(source.config) and weights != "stored":
        raise UnsupportedError(
            f"weights {weights!r} with a model whose spikes are emulated with float weights",
            hint="make it spike with `respike spikes --weights int8`",
        )
    if emulated(source.config) or (weights == "stored" and engine_obstacle(*like) is not None):
        return load_decoder(source, device=device, dtype=dtype, progress=progress)
    with torch.device("meta"):
        decoder = Decoder(source.config)
    packer = Packer(decoder, weights, *like, spikes=source.config.spikes)
    for piece in _filled(decoder, source, *like, progress):
        packer.pack(piece)
    return packer.finish().requires_grad_(False).eval()


def emulated(config: ModelConfig) -> bool:
    """Its neurons stand before float weights, which no engine runs."""
    return config.spikes is not None and config.spikes.weights == "float"


def pack_or_plain(decoder: Decoder) -> Decoder:
    """Pack a decoder for the native engine, in place, where that can run it."""
    like = decoder.embedding
    return decoder if engine_obstacle(like.dtype, like.device) else pack_decoder(decoder)


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
