"""Training towards silence: how much of its weights a spiking decoder touches, differentiably.

In a training loop, on a decoder with float weights that spikes (`install_spikes`)::

    bands = trainable_bands(decoder)                   # parameters, beside the weights
    with watch_firing(decoder) as seen:
        logits, _ = decoder(tokens)
    loss = distance(logits) + price * silence_loss(seen.touched_frac(), silent_frac=0.5)
    loss.backward()
    ...
    config = config_of(decoder, config)                # what the bands have become

`respike.healing` is such a loop. Gradients reach inputs and weights straight through the neurons,
the bands by a surrogate, see `respike.ops.spikes`. Of layers whose activations are computed twice
(checkpointing), watch the first pass only: what is seen is added up.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from respike.config import SpikeBands, SpikeConfig
from respike.errors import UnsupportedError
from respike.layers.low_rank import LowRank
from respike.models.decoder import Decoder
from respike.models.spiking import SITES, Site, SiteName, spike_sites, watch_sites

BAND = re.compile(r"model\.layers\.(\d+)\.(\w+\.\w+?)(?:\.base)?\.neuron\.band")
"""A band's name among a decoder's parameters: layer, first linear layer of its site."""


class SeenFiring:
    """What the neurons of a decoder did while they were watched."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self._fired: dict[int, Tensor] = {}
        self._inputs: dict[int, int] = {}

    def add(self, index: int, x: Tensor) -> None:
        """Take the input (..., I) of a site in."""
        neuron = self.sites[index].neuron
        if neuron is None:
            return
        known = neuron.remembers
        fired = neuron.seen(x)[1] if known else neuron.fire(x)[0].count_nonzero().float()
        self._fired[index] = self._fired[index] + fired if index in self._fired else fired
        self._inputs[index] = self._inputs.get(index, 0) + x.numel()

    def touched_frac(self) -> Tensor:
        """Share of the weights behind neurons whose input fired, differentiable; ().

        One minus what `respike spikes` calls skipped.

        Raises:
            ValueError: Nothing was seen.
        """
        if not self._fired:
            raise ValueError("no neuron was watched: the decoder did not run, or does not spike")
        sizes = {i: self.sites[i].in_features * self.sites[i].out_features for i in self._fired}
        shares = [
            self._fired[i] * (size / (self._inputs[i] * sum(sizes.values())))
            for i, size in sizes.items()
        ]
        return torch.stack(shares).sum()


@contextmanager
def watch_firing(decoder: Decoder) -> Iterator[SeenFiring]:
    """See what neurons do in the block, gradients included; none where weights are integers.

    Layers behind the same neurons share what these make of an input: a training step is faster here
    than outside.
    """
    seen = SeenFiring(list(spike_sites(decoder)))
    neurons = [
        site.neuron
        for site in seen.sites
        if site.neuron is not None and isinstance(site.linears[0], nn.Linear | LowRank)
    ]
    try:
        for neuron in neurons:
            neuron.remember(True)
        with watch_sites(decoder, seen.add):
            yield seen
    finally:
        for neuron in neurons:
            neuron.remember(False)


def silence_loss(touched_frac: Tensor, silent_frac: float, width: float = 0.0) -> Tensor:
    """How much more is touched than a goal allows; 0 once the goal is reached.

    Args:
        touched_frac: From `SeenFiring.touched_frac`.
        silent_frac: Share of weights to be skipped, 0 to 1.
        width: Excess over which the slope rises from 0 to 1, so that what is asked finds its own
            price between them. 0: a corner.
    """
    excess = (touched_frac - (1 - silent_frac)).clamp(min=0)
    if not width:
        return excess
    inside = excess.clamp(max=width)
    return inside.square() / (2 * width) + (excess - inside)


def trainable_bands(decoder: Decoder) -> list[nn.Parameter]:
    """The silent bands of a decoder's neurons, one for each site, from now on with gradients.

    Raises:
        UnsupportedError: There are none, they are by channel, which no config can hold once they
            have moved, or weights are integers, which nothing can train.
    """
    bands = []
    for site in spike_sites(decoder):
        if site.neuron is None or site.neuron.band is None:
            continue
        if not isinstance(site.linears[0], nn.Linear | LowRank):
            raise UnsupportedError(
                "training behind integer weights", hint="install spikes with weights float"
            )
        if site.neuron.band.numel() > 1:
            raise UnsupportedError("training bands by channel", hint="calibrate without them")
        site.neuron.band.requires_grad_(True)
        bands.append(site.neuron.band)
    if not bands:
        raise UnsupportedError("training bands of neurons that have none", hint="use dead-zone")
    return bands


def config_of(decoder: Decoder, config: SpikeConfig) -> SpikeConfig:
    """``config`` with the bands that the decoder's neurons have now.

    Args:
        decoder: With neurons that `trainable_bands` takes.
        config: What they were installed from.
    """
    return with_bands(config, {n: p for n, p in decoder.named_parameters() if BAND.fullmatch(n)})


def with_bands(config: SpikeConfig, trained: Mapping[str, Tensor]) -> SpikeConfig:
    """``config`` with the bands among some tensors.

    Args:
        config: Of neurons with one band a site.
        trained: Tensors by a decoder's names; those that are no bands are left alone.
    """
    names: dict[str, SiteName] = {paths[0]: name for name, paths in SITES.items()}
    rows: list[dict[str, float | None]] = [layer.model_dump() for layer in config.layers]
    for name, tensor in trained.items():
        if (found := BAND.fullmatch(name)) is not None:
            (band,) = tensor.float().tolist()
            rows[int(found[1])][names[found[2]]] = max(0.0, band)
    assert all(set(row) == set(SITES) for row in rows)
    return config.model_copy(update={"layers": tuple(map(SpikeBands.model_validate, rows))})
