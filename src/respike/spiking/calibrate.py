"""Where each layer's neurons fall silent: bands for a silent fraction or a KL, by sensitivity.

A *site* is a place where neurons stand (`respike.models.spiking`). What is silenced there is
measured on text: for every band, the share of inputs below it and the share of the output's energy
that they carry (each input weighed by the norm of its weights). Two budgets:

    uniform      the same silent fraction at every site
    sensitivity  sites are silenced one at a time, and the KL that costs, divided by the energy
                 lost, is the site's price. Then the KL, taken as the sum over sites of price times
                 energy lost, is made least for the share of weights that is to be skipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from respike.config import SpikeBands, SpikeConfig
from respike.errors import UsageError
from respike.evaluation.distance import Reference
from respike.models.decoder import Decoder
from respike.models.spiking import (
    Site,
    channel_weights,
    install_spikes,
    remove_spikes,
    spike_sites,
    watch_sites,
)
from respike.spiking.probe import Probe

Progress = Callable[[int, int], None]

OCTAVES, BINS_AN_OCTAVE, FIRST_OCTAVE = 28, 32, -18
MOST_SILENT = 0.95
"""No site is asked to be more silent than this."""
PROBE_SILENT = 0.5
"""Silent fraction at which a site's sensitivity is measured."""
KL_ROUNDS = 6


@dataclass(frozen=True)
class Goal:
    """What is asked of `calibrate`.

    Attributes:
        neuron: As `respike.config.SpikeConfig` has it; so are step, k, by_channel, weights
            and group_size.
        silent_frac: Share of the weights of spiking layers to be skipped. None: see kl_nats.
        kl_nats: KL to the original on the calibration text, at most. Both None: the neuron's own.
        budget: How silence is shared out.
    """

    neuron: Literal["adaptive", "absmax", "dead-zone", "teal"] = "dead-zone"
    step: Literal["absmax", "mean"] = "absmax"
    k: float = 3.0
    by_channel: bool = False
    weights: Literal["float", "int8", "int4"] = "int8"
    silent_frac: float | None = None
    kl_nats: float | None = None
    budget: Literal["uniform", "sensitivity"] = "sensitivity"
    group_size: Literal[32, 64, 128] = 32

    def check(self) -> None:
        """Raises UsageError if the neuron cannot do what is asked."""
        aims = (self.silent_frac is not None) + (self.kl_nats is not None)
        if self.neuron == "absmax" and aims:
            raise UsageError(
                "the absmax neuron has no band to calibrate",
                hint="use --neuron dead-zone, which is absmax with a silent band",
            )
        if aims > 1 or (not aims and self.neuron in ("dead-zone", "teal")):
            raise UsageError(
                f"neuron {self.neuron} needs a silent fraction or a KL to aim at, one of the two",
                hint="add --silent 0.5 or --kl 0.1",
            )
        if self.silent_frac is not None and not 0 < self.silent_frac <= MOST_SILENT:
            raise UsageError(
                f"silent fraction {self.silent_frac:g} is not above 0 and at most {MOST_SILENT:g}"
            )
        if self.by_channel and self.neuron not in ("dead-zone", "teal"):
            raise UsageError(f"the {self.neuron} neuron has no band for each channel")
        if self.neuron == "teal" and self.weights != "float":
            raise UsageError("teal has no spike counts", hint="add --weights float")

    def config(self, bands: Sequence[float]) -> SpikeConfig:
        """With one band for each site, in the order of `spike_sites`."""
        rows = [bands[i : i + 4] for i in range(0, len(bands), 4)]
        return SpikeConfig(
            neuron=self.neuron,
            step=self.step,
            k=self.k,
            by_channel=self.by_channel,
            weights=self.weights,
            group_size=self.group_size,
            layers=tuple(SpikeBands(qkv=a, o=b, mlp=c, down=d) for a, b, c, d in rows),
        )


class Profile:
    """Magnitudes of a site's inputs on some text, as a histogram over their logarithm.

    Args:
        site: Of a decoder with float weights.
        relative: Magnitudes are divided by their token's mean.
        by_channel: And multiplied by the channel's relative weight norm.
    """

    def __init__(self, site: Site, *, relative: bool, by_channel: bool) -> None:
        self.relative, self.by_channel = relative, by_channel
        self.norms = channel_weights(site)
        bins = OCTAVES * BINS_AN_OCTAVE
        self.count = torch.zeros(bins, dtype=torch.float64)
        self.energy = torch.zeros(bins, dtype=torch.float64)
        self.price = 1.0
        """KL for all of the energy; relative between sites, until they are probed."""

    def add(self, x: Tensor) -> None:
        """Take more tokens (..., I) in."""
        size = x.float().abs().flatten(0, -2)
        energy = (size * self.norms).square()
        if self.relative:
            size = size / size.mean(-1, keepdim=True).clamp(min=1e-30)
        if self.by_channel:
            size = size * self.norms
        place = (size.clamp(min=1e-30).log2() - FIRST_OCTAVE) * BINS_AN_OCTAVE
        place = place.long().clamp(0, len(self.count) - 1).flatten().cpu()
        self.count += torch.bincount(place, minlength=len(self.count))
        self.energy += torch.bincount(place, energy.flatten().double().cpu(), len(self.count))

    def band(self, silent: float) -> float:
        """The band below which this share of inputs lies."""
        below = self._below(self.count)
        target = torch.tensor(silent * float(below[-1]), dtype=torch.float64)
        upper = int(torch.searchsorted(below, target).clamp(1, len(below) - 1))
        low, high = float(below[upper - 1]), float(below[upper])
        part = (float(target) - low) / (high - low) if high > low else 1.0
        return float(2.0 ** (FIRST_OCTAVE + (upper - 1 + part) / BINS_AN_OCTAVE))

    def energy_below(self, silent: Tensor) -> Tensor:
        """Share of the output's energy that the most silent share of inputs carries."""
        counts, energy = self._below(self.count), self._below(self.energy)
        upper = torch.searchsorted(counts, silent.double() * counts[-1]).clamp(1, len(counts) - 1)
        low, high = counts[upper - 1], counts[upper]
        part = ((silent * counts[-1] - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
        share = energy[upper - 1] + part * (energy[upper] - energy[upper - 1])
        return share / energy[-1].clamp(min=1e-300)

    def _below(self, histogram: Tensor) -> Tensor:
        return torch.cat([histogram.new_zeros(1), histogram.cumsum(0)])


def profiles(decoder: Decoder, contexts: Tensor, goal: Goal) -> list[Profile]:
    """A `Profile` of every site of a decoder that does not spike, on ``contexts`` (N, T)."""
    relative = goal.neuron != "teal"
    found = [
        Profile(site, relative=relative, by_channel=goal.by_channel)
        for site in spike_sites(decoder)
    ]
    with torch.inference_mode(), watch_sites(decoder, lambda index, x: found[index].add(x)):
        for tokens in contexts:
            decoder.hidden(tokens[None].to(decoder.embedding.device))
    return found


def share_out(found: Sequence[Profile], weights: Sequence[float], silent: float) -> list[float]:
    """Silent fraction of each site: least price for skipping ``silent`` of all weights.

    Args:
        found: Profiles with their prices.
        weights: Number of weights behind each site.
        silent: Share of their sum to be skipped, at most `MOST_SILENT`.
    """
    grid = torch.linspace(0, MOST_SILENT, 381, dtype=torch.float64)
    size = torch.tensor(weights, dtype=torch.float64)
    size = size / size.sum()
    cost = torch.stack([p.price * p.energy_below(grid) for p in found])

    def at(worth: float) -> Tensor:
        return grid[(cost - worth * size[:, None] * grid).argmin(1)]

    low, high = 0.0, 1.0
    while float((at(high) * size).sum()) < silent and high < 1e30:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((at(middle) * size).sum()) < silent else (low, middle)
    return at(high).tolist()


def set_prices(
    decoder: Decoder,
    found: Sequence[Profile],
    contexts: Tensor,
    goal: Goal,
    progress: Progress | None,
) -> None:
    """Silence one site at a time, and make the KL for the energy lost each profile's price."""
    probe = Probe(decoder, contexts)
    half = torch.tensor([PROBE_SILENT])
    install_spikes(decoder, goal_in_float(goal).config([p.band(PROBE_SILENT) for p in found]))
    try:
        for index, profile in enumerate(found):
            kl = probe.kl_of_site(index)
            lost = float(profile.energy_below(half))
            profile.price = max(kl, 1e-9) / max(lost, 1e-9)
            if progress:
                progress(index + 1, len(found))
    finally:
        remove_spikes(decoder)


def goal_in_float(goal: Goal) -> Goal:
    """The same neurons before float weights: what calibration runs."""
    return Goal(goal.neuron, goal.step, goal.k, goal.by_channel, weights="float")


def calibrate(
    decoder: Decoder, contexts: Tensor, goal: Goal, progress: Progress | None = None
) -> tuple[SpikeConfig, dict[str, object]]:
    """Find the bands that reach the goal on ``contexts``.

    Args:
        decoder: With float weights, not spiking; it is as it was afterwards.
        contexts: Token ids (N, T) of calibration text.
        goal: What to reach.
        progress: Called with (sites probed, sites).

    Returns:
        The config, and what was measured on the way.

    Raises:
        UsageError: The goal cannot be.
    """
    goal.check()
    sites = list(spike_sites(decoder))
    if goal.silent_frac is None and goal.kl_nats is None:
        band = 1 / (2 * goal.k) if goal.neuron == "adaptive" else 0.0
        return goal.config([band] * len(sites)), {}
    found = profiles(decoder, contexts, goal)
    if goal.budget == "sensitivity":
        set_prices(decoder, found, contexts[:1], goal, progress)
    weights = [float(site.in_features * site.out_features) for site in sites]

    def bands(silent: float) -> list[float]:
        if goal.budget == "uniform":
            return [p.band(silent) for p in found]
        shares = share_out(found, weights, silent)
        return [p.band(s) for p, s in zip(found, shares, strict=True)]

    facts: dict[str, object] = {"price_nats": [p.price for p in found]}
    if goal.budget == "uniform":
        facts = {}
    if goal.silent_frac is not None:
        return goal.config(bands(goal.silent_frac)), facts
    assert goal.kl_nats is not None
    reference = Reference(decoder, contexts)
    low, high, best = 0.0, MOST_SILENT, 0.0
    for _ in range(KL_ROUNDS):
        middle = (low + high) / 2
        install_spikes(decoder, goal_in_float(goal).config(bands(middle)))
        kl = float(reference.compare(decoder).kl.mean())
        remove_spikes(decoder)
        low, high = (middle, high) if kl <= goal.kl_nats else (low, middle)
        best = low
    if not best:
        raise UsageError(
            f"no silence found at a KL of {goal.kl_nats:g} nats",
            hint="allow more with --kl, or use a finer threshold (--step absmax)",
        )
    return goal.config(bands(best)), facts | {"aimed_silent_frac": best}
