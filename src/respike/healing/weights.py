"""Trained tensors as weights of a plain model, and as a small difference to the converted one.

A difference is a safetensors file of what was trained and nothing else: low-rank products as their
two factors, everything else whole, in bfloat16. It says which converted model it belongs to.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from respike.checkpoint import Folder
from respike.checkpoint.families import is_new
from respike.config import ModelConfig, SpikeConfig
from respike.errors import DataError
from respike.healing.parallel import World
from respike.layers.low_rank import merged
from respike.loading import emulated, pack_or_plain
from respike.models.decoder import Decoder
from respike.models.silence import BAND, with_bands
from respike.models.spiking import install_spikes

FORMAT = "respike-difference"
VERSION = "1"
FACTORS = (".down", ".up")


def merge(base: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a plain model: ``base`` with what was trained put in or added.

    Args:
        base: By the names of a plain model, in the dtype they are to have.
        trained: By the names of `respike.healing.trainable`; any float dtype. Rounded to bfloat16
            first, as a difference stores them, so that both ways give the same bits.
    """
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in trained.items()}
    found = {}
    for name, weight in base.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.up" in rounded:
            found[name] = merged(weight, rounded[f"{stem}.down"], rounded[f"{stem}.up"])
        elif name in rounded:
            found[name] = rounded[name].to(weight.dtype)
        else:
            found[name] = weight
    return found


def plain_weights(student: Decoder, world: World) -> dict[str, Tensor]:
    """The student's tensors by the names of a plain model, without low-rank parts."""
    return {
        name.replace("_proj.base.", "_proj."): world.full(tensor.detach())
        for name, tensor in student.named_parameters()
        if not name.endswith(FACTORS) and not BAND.fullmatch(name)
    }


def trained_spikes(spikes: SpikeConfig | None, trained: Mapping[str, Tensor]) -> SpikeConfig | None:
    """A model's neurons with the bands that were trained, rounded as a difference stores them."""
    if spikes is None:
        return None
    return with_bands(spikes, {name: tensor.to(torch.bfloat16) for name, tensor in trained.items()})


def fast_copy(config: ModelConfig, weights: Mapping[str, Tensor]) -> Decoder:
    """A decoder of some weights that runs as fast as this machine can, as a loaded folder would.

    In bf16, as a healed folder is stored, whatever its course computes in.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    rounded = {n: t.to(torch.bfloat16, copy=True) for n, t in weights.items()}
    decoder.load_state_dict(rounded, strict=True, assign=True)
    if config.spikes:
        install_spikes(decoder, config.spikes)
    decoder.requires_grad_(False).eval()
    return decoder if emulated(config) else pack_or_plain(decoder)


def source_fingerprint(folder: Folder) -> str:
    """SHA-256 of a converted folder's config and of every tensor its source had.

    What conversion added is left out: a difference holds all of it, and its fit to text may differ
    in the last bit from machine to machine.
    """
    digest = hashlib.sha256(folder.config.model_dump_json().encode())
    for name in sorted(folder.stored_as):
        if not is_new(folder.config, name):
            digest.update(name.encode())
            digest.update(folder.read(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_difference(path: Path, trained: Mapping[str, Tensor], belongs_to: str) -> None:
    """Write a difference.

    Args:
        path: File to write.
        trained: What was trained, by name.
        belongs_to: From `source_fingerprint` of the converted folder.
    """
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in trained.items()}
    facts = {"format": FORMAT, "version": VERSION, "belongs_to": belongs_to}
    try:
        save_file(tensors, path, metadata=facts)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be written: {error}") from error


def load_difference(path: Path, belongs_to: str) -> dict[str, Tensor]:
    """Read a difference.

    Raises:
        DataError: Not a difference, or one of another converted model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as a difference: {error}") from None
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise DataError(f"{path}: not a difference, or not of version {VERSION}")
    if facts.get("belongs_to") != belongs_to:
        raise DataError(
            f"{path}: belongs to another converted model ({facts.get('belongs_to')}, this one is "
            f"{belongs_to})",
            hint="convert the same source by the same recipe",
        )
    return tensors
