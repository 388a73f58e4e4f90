"""Training towards silence: how much of its weights a spiking decoder touches, differentiably.

In a training loop, on a decoder with float weights that spikes (`install_spikes`)::

    bands = trainable_bands(decoder)                   # parameters, beside the weights
    with watch_firing(decoder) as seen:
        logits, _ = decoder(tokens)
    loss = distance(logits) + price * silence_loss(seen.touched_frac(), silent_frac=0.5)
    loss.backward()
    ...
    config = config_of(decoder, config)                # what the bands have become

Gradients reach inputs and weights straight through the neurons, the bands by a surrogate, see
`respike.ops.spikes`. Of layers whose activations are computed twice (checkpointing), watch the
first pass only: what is seen is added up.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from respike.config import SpikeBands, SpikeConfig
from respike.errors import UnsupportedError
from respike.models.decoder import Decoder
from respike.models.spiking import SITES, Site, spike_sites, watch_sites


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
        fired = neuron.firing(x).sum()
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
    """See what neurons do in the block, gradients included."""
    seen = SeenFiring(list(spike_sites(decoder)))
    with watch_sites(decoder, seen.add):
        yield seen


def silence_loss(touched_frac: Tensor, silent_frac: float) -> Tensor:
    """How much more is touched than a goal allows; 0 once the goal is reached.

    Args:
        touched_frac: From `SeenFiring.touched_frac`.
        silent_frac: Share of weights to be skipped, 0 to 1.
    """
    return (touched_frac - (1 - silent_frac)).clamp(min=0)


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
        if not isinstance(site.linears[0], nn.Linear):
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
    rows: list[dict[str, float | None]] = [layer.model_dump() for layer in config.layers]
    for site in spike_sites(decoder):
        if site.neuron is not None and site.neuron.band is not None:
            (band,) = site.neuron.band.tolist()
            rows[site.layer][site.name] = max(0.0, band)
    assert all(set(row) == set(SITES) for row in rows)
    return config.model_copy(update={"layers": tuple(map(SpikeBands.model_validate, rows))})
