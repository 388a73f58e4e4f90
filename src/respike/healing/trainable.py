"""Which tensors are trained, and their exact values beside the rounded ones the model runs on.

The model computes in bfloat16, as a rule. Each trained tensor has a master in float32, which the
optimiser steps; the model's own tensor is the master rounded: what is trained is what is stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from respike.checkpoint.families import is_new, mixer_of
from respike.errors import UnsupportedError, UsageError
from respike.healing.config import Healing, Stage
from respike.layers.far import FarSoftmax
from respike.layers.low_rank import LowRank
from respike.layers.mixer import Mixer
from respike.models.decoder import Decoder

Kind = Literal["new", "source", "band"]

OPENED_BETA = -10.0
"""What a shut head's beta begins at: it adds next to nothing, and can learn."""

CHOSEN = "log2_half_life"
"""Stays as the recipe has it: rows of some thousand tokens show next to nothing of a half-life of
many more. Trained, it did not move in 1.2 million tokens (docs/log.md, 2026-11-29)."""

FITTED = ("keep_weight", "keep_log2_half_life")
"""Stay as calibration fitted them, as a choice of what is kept has no gradient; a difference holds
them all the same, since what was trained goes with what was kept."""


@dataclass
class Trained:
    """One trained tensor.

    Attributes:
        name: In the decoder.
        tensor: What the model runs on.
        master: Its exact value, float32.
        kind: Conversion added it; it is the source's; it is a neuron's silent band.
    """

    name: str
    tensor: nn.Parameter
    master: nn.Parameter
    kind: Kind

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master into the model."""
        self.tensor.copy_(self.master)

    @torch.no_grad()
    def collect(self, factor: int = 1) -> None:
        """Move the model's gradient, times ``factor``, to the master, which sums in float32."""
        if self.tensor.grad is None:
            return
        grad = self.tensor.grad.float() * factor
        self.master.grad = grad if self.master.grad is None else self.master.grad + grad
        self.tensor.grad = None


def prepare(decoder: Decoder, healing: Healing, original_tokens: int) -> None:
    """Give a decoder the low-rank parts its course trains, and open or shut its memories.

    Args:
        decoder: The student.
        healing: The course.
        original_tokens: Length that the original was trained for.

    Raises:
        UsageError: Stages disagree on how a matrix is trained.
        UnsupportedError: A stage cannot be done with this model.
    """
    _refuse(decoder, healing, original_tokens)
    for place, (projection, how) in enumerate(sorted(_choices(healing).items())):
        if how == "full":
            continue
        assert not projection.endswith("norm")
        for index, layer in enumerate(decoder.layers):
            for number, parent in enumerate(_homes(layer, projection)):
                # Unlike seeds, also so that experts, which begin alike, can part.
                seed = healing.seed * 100_003 + index * 64 + place + number * 1_000_003
                setattr(parent, projection, LowRank(getattr(parent, projection), how, seed))
    for module in decoder.modules():
        if isinstance(module, FarSoftmax):
            shut = module.beta == -torch.inf
            if healing.memory == "off":
                module.beta.data.fill_(-torch.inf)
            else:
                module.beta.data.masked_fill_(shut, OPENED_BETA)
    decoder.requires_grad_(False)


def _refuse(decoder: Decoder, healing: Healing, original_tokens: int) -> None:
    """Say what a course cannot do with a model, before it does it wrong."""
    sunk, kinds = decoder.config.learned_sinks, {stage.kind for stage in healing.stages}
    merged = any(layer.beside for layer in decoder.config.layers)
    has_far = any(isinstance(module, FarSoftmax) for module in decoder.modules())
    hint = "leave that stage out"
    if healing.memory == "off" and not has_far:
        raise UnsupportedError(
            "a control without memories, of a model that has no far memory to shut",
            hint="leave out memory=off",
        )
    if healing.memory == "off" and any(getattr(m, "kept_tokens", 0) for m in decoder.modules()):
        raise UnsupportedError(
            "a control without memories, of a model that keeps tokens: they are its memories' too",
            hint="convert it with --set far.kept_tokens=0 --set 'far.kept_by_group={}' for that",
        )
    for number, stage in enumerate(healing.stages):
        if stage.kind in ("transfer", "distil") and stage.context_tokens > original_tokens:
            too_long = ["context_tokens"]
            if stage.recall.last_tokens > original_tokens:
                too_long.append("recall.last_tokens")
            sets = [f"--set stages.{number}.{name}={original_tokens}" for name in too_long]
            raise UnsupportedError(
                f"rows of {stage.context_tokens:,} tokens, of an original trained for "
                f"{original_tokens:,}: beyond them it has nothing to teach",
                hint=" ".join(sets),
            )
        if stage.memory_dropout.happens and _only_remembers(decoder):
            raise UnsupportedError(
                "memory_dropout, of attention that is only a memory, or merged with one",
                hint=f"--set 'stages.{number}.memory_dropout={{}}'",
            )
    if sunk and "transfer" in kinds:
        raise UnsupportedError(
            "kind transfer with learned sinks: the original has nothing in their place", hint=hint
        )
    if (sunk or merged) and "length" in kinds:
        raise UnsupportedError(
            "kind length (states that go on) with learned sinks or attention beside attention",
            hint=hint,
        )


def _only_remembers(decoder: Decoder) -> bool:
    """Whether some mixer without its memory is not the attention of the source any more."""
    return any(
        module.parts == {"memory"} for module in decoder.modules() if isinstance(module, Mixer)
    )


def _homes(layer: nn.Module, projection: str) -> list[nn.Module]:
    """Modules of a layer that have such a projection: the layer's own first, then all others."""
    return [
        part for part in layer.modules() if isinstance(getattr(part, projection, None), nn.Linear)
    ]


def _choices(healing: Healing) -> dict[str, Literal["full"] | int]:
    """How each projection that some stage trains is trained."""
    found: dict[str, Literal["full"] | int] = {}
    for stage in healing.stages:
        for name, how in stage.train.items():
            if found.setdefault(name, how) != how:
                raise UsageError(
                    f"{healing.name}: stages train {name} as {found[name]} and as {how}",
                    hint="train it the same way in every stage",
                )
    return found


def all_trained(decoder: Decoder, healing: Healing) -> list[Trained]:
    """Every tensor that some stage trains, in a fixed order."""
    names: dict[str, Kind] = {}
    for stage in healing.stages:
        names |= dict(trained_names(decoder, healing, stage))
    parameters = dict(decoder.named_parameters())
    return [
        Trained(name, parameters[name], nn.Parameter(_master_of(parameters[name])), kind)
        for name, kind in names.items()
    ]


def _master_of(parameter: Tensor) -> Tensor:
    """A copy of its own, also of what is float32 already."""
    return parameter.detach().to(torch.float32, copy=True)


def trained_names(decoder: Decoder, healing: Healing, stage: Stage) -> Iterator[tuple[str, Kind]]:
    """Names of what a stage trains, and what kind each is of."""
    for name, _ in decoder.named_parameters():
        *_, projection, leaf = name.split(".")
        if is_new(decoder.config, name):
            if healing.memory == "on" and leaf not in (CHOSEN, *FITTED):
                yield name, "new"
            continue
        if leaf == "band":
            if stage.silence and stage.silence.band_rate is not None:
                yield name, "band"
        elif leaf in ("down", "up"):
            if projection in stage.train:
                yield name, "source"
        elif stage.train.get(projection) == "full":  # type: ignore[call-overload]
            yield name, "source"


def held_beside(decoder: Decoder, healing: Healing) -> dict[str, Tensor]:
    """What a course's weights have beside what it trains: worths, and a control's shut gates."""
    leaves = FITTED if healing.memory == "on" else (*FITTED, "beta")
    return {
        name: parameter.detach()
        for name, parameter in decoder.named_parameters()
        if name.rpartition(".")[2] in leaves and mixer_of(decoder.config, name) is not None
    }
