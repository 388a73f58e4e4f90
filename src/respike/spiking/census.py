"""Counting every spike: what fired where, what that is in each coding, and what it makes us read.

Words: *silent* is an input whose count is exactly 0. *Events* are (input that fired, output) pairs:
the products that remain of a layer's multiply-accumulates. *Bit sparsity* is the share of time
steps without a spike when every count is coded in the same stated number of steps; it says more
about the coding than about the model. *Skipped* is the share of weights whose input was silent.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from respike.config import ModelConfig
from respike.layers.linear import PackedLinear
from respike.models.decoder import Decoder
from respike.models.spiking import Site, spike_sites, watch_sites
from respike.ops.codings import (
    CODINGS,
    UNSIGNED,
    Coding,
    code_steps,
    num_events,
    window_spikes,
)
from respike.ops.packed import TILE

ROW_BYTES = {"int8": TILE, "int4": TILE // 2}
"""Bytes of the weights of one input in one tile of 64 outputs."""
SCALE_BYTES = 2 * TILE
"""Bytes of the scales of one group in one tile."""

PAPER = "SpikingBrain-1.0's figure: share of empty 3-step windows, 3 windows a count"


class SiteCensus:
    """What the neurons of one site fired.

    Args:
        site: Of a decoder that spikes.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tokens = self.silent = self.bytes_touched = 0
        self.counts: Counter[int] = Counter()
        """How often each count was seen; empty of the rival, which has none."""

    @property
    def has_counts(self) -> bool:
        """The rival has magnitudes."""
        neuron = self.site.neuron
        return neuron is not None and neuron.step != "none"

    def add(self, x: Tensor) -> None:
        """Take the tokens (..., I) in."""
        neuron = self.site.neuron
        assert neuron is not None
        x = x.flatten(0, -2)
        self.tokens += len(x)
        if not self.has_counts:
            self.silent += int((neuron(x) == 0).sum())
            return
        counts, _ = neuron.fire(x)
        self.silent += int((counts == 0).sum())
        values, numbers = torch.unique(counts, return_counts=True)
        self.counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
        for linear in self.site.linears:
            if isinstance(linear, PackedLinear):
                self.bytes_touched += _bytes_touched(counts, linear)

    @property
    def inputs_seen(self) -> int:
        """Neurons times tokens."""
        return self.tokens * self.site.in_features

    @property
    def weight_bytes(self) -> int | None:
        """Of all weights and scales behind the site; None where they are not packed."""
        packed = [m.packed.nbytes for m in self.site.linears if isinstance(m, PackedLinear)]
        return sum(packed) if packed else None

    def table(self) -> tuple[Tensor, Tensor]:
        """Counts seen and how often, int64."""
        values = sorted(self.counts)
        return torch.tensor(values), torch.tensor([self.counts[v] for v in values])


def _bytes_touched(counts: Tensor, linear: PackedLinear) -> int:
    fired = counts != 0
    groups = torch.nn.functional.pad(fired, (0, -fired.shape[1] % linear.group_size))
    groups = groups.view(len(fired), -1, linear.group_size).any(-1)
    tiles = -(-linear.out_features // TILE)
    rows = int(fired.sum()) * ROW_BYTES[linear.kind]
    return tiles * (rows + int(groups.sum()) * SCALE_BYTES)


class Census:
    """What all neurons of a decoder fired while `watching`.

    Args:
        decoder: One that spikes.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        found = {i: SiteCensus(site) for i, site in enumerate(spike_sites(decoder)) if site.neuron}
        self._by_index, self.sites = found, list(found.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count all that the decoder does in the block."""

        def see(index: int, x: Tensor) -> None:
            if index in self._by_index:
                self._by_index[index].add(x)

        with watch_sites(self.decoder, see):
            yield

    def without_spikes(self) -> list[str]:
        """Sites where nothing at all fired: a layer that is listed as spiking must spike."""
        return [
            f"layer {found.site.layer}, {found.site.name}"
            for found in self.sites
            if found.silent == found.inputs_seen
        ]

    def figures(self) -> dict[str, Any]:
        """Totals, the same by layer, and by site, ready for JSON."""
        depth = len(self.decoder.layers)
        codes = coding_steps(self.sites)
        by_layer = [[s for s in self.sites if s.site.layer == i] for i in range(depth)]
        return {
            "tokens": self.sites[0].tokens,
            "codings": codes,
            "total": totals(self.sites, codes),
            "layers": [{"layer": i} | totals(part, codes) for i, part in enumerate(by_layer)],
            "sites": [
                {"layer": s.site.layer, "site": s.site.name} | totals([s], codes)
                for s in self.sites
            ],
            "without_spikes": self.without_spikes(),
            "not_spiked": not_spiked(self.decoder.config, spike_sites(self.decoder)),
        }


def coding_steps(sites: Iterable[SiteCensus]) -> dict[str, dict[str, int]]:
    """Steps and zero point of each coding that carry every count any of the sites has seen.

    Codings without a sign take the smallest count seen as their zero point, so an input that is
    silent fires in them.
    """
    seen = [value for site in sites for value in site.counts]
    if not seen:
        return {}
    low, high = min(*seen, 0), max(*seen, 0)
    codes: dict[str, dict[str, int]] = {}
    for coding in CODINGS:
        zero = low if coding in UNSIGNED else 0
        codes[coding] = {
            "steps": code_steps(low - zero, high - zero, coding),
            "zero_point": zero,
        }
    return codes


def totals(sites: list[SiteCensus], codes: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Figures of some sites together; sums are per token.

    Args:
        sites: All of them, or of one layer, or one.
        codes: From `coding_steps` of all sites.
    """
    inputs = sum(s.inputs_seen for s in sites)
    macs = sum(s.site.in_features * s.site.out_features for s in sites)
    events = sum((s.inputs_seen - s.silent) * s.site.out_features / s.tokens for s in sites)
    found: dict[str, Any] = {
        "silent_frac": sum(s.silent for s in sites) / inputs,
        "multiply_accumulates": macs,
        "events": events,
        "skipped_frac": 1 - events / macs,
    }
    if all(s.weight_bytes is not None for s in sites):
        found["weight_bytes"] = sum(s.weight_bytes or 0 for s in sites)
        found["weight_bytes_touched"] = sum(s.bytes_touched / s.tokens for s in sites)
    if all(s.has_counts for s in sites):
        found |= _count_figures(sites, inputs, codes)
    return found


def _count_figures(
    sites: list[SiteCensus], inputs: int, codes: dict[str, dict[str, int]]
) -> dict[str, Any]:
    large, sizes = {7: 0, 127: 0}, 0
    spikes, additions = dict.fromkeys(codes, 0), dict.fromkeys(codes, 0.0)
    windows, full = 0, [0] * 4
    for site in sites:
        values, numbers = site.table()
        sizes += int((values.abs() * numbers).sum())
        for limit in large:
            large[limit] += int(numbers[values.abs() > limit].sum())
        for coding, code in codes.items():
            each = num_events(values, cast(Coding, coding), code["steps"], code["zero_point"])
            fired = int((each * numbers).sum())
            spikes[coding] += fired
            additions[coding] += fired * site.site.out_features / site.tokens
        held = window_spikes(values)
        windows += held.shape[0] * int(numbers.sum())
        for n in range(4):
            full[n] += int(((held == n) * numbers).sum())
    shares = [n / windows for n in full]
    return {
        "mean_abs_count": sizes / inputs,
        "above_7_frac": large[7] / inputs,
        "above_127_frac": large[127] / inputs,
        "bit_sparsity": {
            coding: code | {"zero_frac": 1 - spikes[coding] / (inputs * code["steps"])}
            for coding, code in codes.items()
        },
        "additions": additions,
        "three_step_windows": {"what": PAPER, "with_0_1_2_3_spikes_frac": shares},
    }


def not_spiked(config: ModelConfig, sites: Iterable[Site]) -> list[dict[str, Any]]:
    """What multiplies without spikes, with multiply-accumulates a token where they are fixed."""
    head = config.vocab_size * config.hidden_size
    rows: list[dict[str, Any]] = [{"what": "output head", "multiply_accumulates": head}]
    plain: Counter[str] = Counter()
    for site in sites:
        if site.neuron is None:
            plain[site.name] += site.in_features * site.out_features
    rows += [{"what": f"layers behind {n}", "multiply_accumulates": m} for n, m in plain.items()]
    rows.append({"what": "scores and values of attention", "multiply_accumulates": None})
    kinds = {
        part.memory.kind
        for _, part in config.mixers()
        if part.mixer in ("window", "linear") and part.memory
    }
    rows += [
        {"what": f"memories ({kind}), with their own projections", "multiply_accumulates": None}
        for kind in sorted(kinds)
    ]
    return rows
