"""The models of a course: the one that is healed, and the original that it learns from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from respike.checkpoint import Folder, open_checkpoint, read_json
from respike.checkpoint.families import PLAIN
from respike.config import ModelConfig, full_layers
from respike.errors import UnsupportedError, UsageError
from respike.healing.config import Healing
from respike.healing.objectives import Pair
from respike.healing.trainable import prepare as prepare_student
from respike.loading import Weights, fast_decoder, load_decoder


class Reading(Weights):
    """A folder's tensors under another config, which names no others."""

    def __init__(self, folder: Folder, **changes: Any) -> None:
        self._folder = folder
        self._config = folder.config.model_copy(update=changes)

    @property
    def config(self) -> ModelConfig:
        """As changed."""
        return self._config

    @property
    def stored_dtype(self) -> torch.dtype:
        """As stored."""
        return self._folder.stored_dtype

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._folder.read(name)


def original_of(folder: Folder, original: str | Path | None) -> Weights:
    """The model to learn from: the one named, or the one inside a folder.

    Inside a spiking folder it is the same weights and mixers without neurons: what training is to
    give back is what silence took, and nothing else. Inside a converted one it is the source, if
    that had full softmax everywhere: every tensor of it was copied.

    Raises:
        UnsupportedError: None is named, and what the folder was made of cannot be told from it.
    """
    if original is not None:
        return open_checkpoint(original)
    missing = _why_not_inside(folder, read_json(folder.path / "report.json"))
    if missing:
        raise UnsupportedError(
            f"{folder.path}: {missing}", hint="name the model it was made from with --original"
        )
    if folder.config.spikes is not None:
        return Reading(folder, spikes=None)
    layers = full_layers(folder.config.num_hidden_layers, folder.config.num_key_value_heads)
    return Reading(folder, layers=layers, learned_sinks=0)


def _why_not_inside(folder: Folder, report: dict[str, Any]) -> str | None:
    """Why the original is not the folder itself with its source's mixers; None: it is."""
    source, spikes = report["source"], folder.config.spikes is not None
    if "healing" in report:
        return "its weights are not its source's any more"
    if not spikes:
        if "spikes" in report or source["family"] not in PLAIN:
            return "its weights are not its source's any more"
        if source.get("healed"):
            return "its source was healed before, so the original is not in it"
        if source.get("retied"):
            return "its source was given another output matrix, so the original is not in it"
        if not source.get("only_full_softmax", True):
            return "its source had other mixers than full softmax"
    if any(layer.moe for layer in folder.config.layers):
        return "its MLPs have become experts, scaled"
    return None


def trainable(folder: Folder) -> Weights:
    """A folder to be trained: where neurons stand before integers, before floats instead."""
    spikes = folder.config.spikes
    if spikes is None:
        return folder
    return Reading(folder, spikes=spikes.model_copy(update={"weights": "float"}))


def models(folder: Folder, original: str | Path | None, healing: Healing) -> Pair:
    """The converted model ready to be trained, and the original in its two forms."""
    source = original_of(folder, original)
    if source.config.vocab_size != folder.config.vocab_size:
        raise UsageError(
            f"the original has {source.config.vocab_size} tokens in its vocabulary, "
            f"{folder.path} has {folder.config.vocab_size}"
        )
    if any(stage.kind == "transfer" for stage in healing.stages):
        _check_shapes(folder, source)
    _check_silence(folder, healing)
    student = load_decoder(trainable(folder), dtype=healing.compute)
    prepare_student(student, healing, source.config.max_position_embeddings)
    layerwise = load_decoder(source, dtype=healing.compute)
    head = layerwise.lm_head
    weight = layerwise.embedding if head is None else head.weight
    assert isinstance(weight, Tensor)
    teacher = fast_decoder(source, dtype=healing.compute)
    return Pair(student, layerwise, teacher, weight)


def _check_shapes(folder: Folder, source: Weights) -> None:
    """Refuse to transfer from layers that are not the same ones."""
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
             "head_dim")  # fmt: skip
    for name in shape:
        theirs, mine = getattr(source.config, name), getattr(folder.config, name)
        if theirs != mine:
            raise UsageError(
                f"the original has {name} {theirs}, {folder.path} has {mine}: a transfer stage "
                "compares layer with layer",
                hint="leave that stage out",
            )


def _check_silence(folder: Folder, healing: Healing) -> None:
    """Refuse a course that asks neurons for what they cannot do."""
    spikes, asks = folder.config.spikes, [s.silence for s in healing.stages if s.silence]
    if spikes is None:
        if asks or healing.judge.silent_frac:
            raise UsageError(
                f"{folder.path}: nothing spikes there, and {healing.name} asks for silence",
                hint="put neurons in first: respike spikes MODEL OUT --silent 0.5",
            )
        return
    if spikes.neuron == "teal":
        raise UnsupportedError(f"{folder.path}: teal has no neurons to train through")
    trains = any(ask.band_rate is not None for ask in asks)
    if trains and (spikes.neuron != "dead-zone" or spikes.by_channel):
        what = "bands by channel" if spikes.by_channel else f"no bands ({spikes.neuron})"
        raise UnsupportedError(
            f"{folder.path}: its neurons have {what}, which a course cannot train",
            hint="leave them with --set stages.0.silence.band_rate=null",
        )


def converted_folder(model: Path) -> Folder:
    """The folder, if `respike.convert` wrote it.

    Raises:
        UsageError: It did not.
    """
    folder = open_checkpoint(model)
    if (
        isinstance(folder, Folder)
        and folder.raw_config.get("model_type") == "respike"
        and all((folder.path / name).is_file() for name in ("report.json", "recipe.yaml"))
        and {"source", "fingerprint"} <= read_json(folder.path / "report.json").keys()
    ):
        return folder
    raise UsageError(
        f"{model}: not a converted model",
        hint="convert it first: respike convert MODEL OUT --recipe retrieval",
    )
