"""What silencing one site alone does to a decoder's predictions, without running all of it."""

import torch
from torch import Tensor

from respike.layers.spikes import SpikedLinear
from respike.models.decoder import Decoder
from respike.models.spiking import SITES, spike_sites

EVERY_TOKENS = 4
"""Predictions are compared at one token of so many: the head is dear."""


class Probe:
    """Hidden states of the original before each layer, so that a probe starts where it differs.

    Args:
        decoder: Not spiking.
        contexts: Token ids (N, T), each worked on as one span.
    """

    def __init__(self, decoder: Decoder, contexts: Tensor) -> None:
        self.decoder = decoder
        self.before: list[list[Tensor]] = []
        self.expected: list[Tensor] = []
        with torch.inference_mode():
            for tokens in contexts.to(decoder.embedding.device):
                x = decoder.model.embed_tokens(tokens[None])
                states = [x]
                for index in range(len(decoder.layers)):
                    states.append(self._run(states[-1], index, index + 1))
                self.before.append(states)
                self.expected.append(self._log_p(states[-1]))

    def kl_of_site(self, index: int) -> float:
        """Mean KL, nats a token, if of all neurons those of one site alone are heeded.

        Args:
            index: Among `spike_sites` of the decoder, on which float spikes are installed.
        """
        sites = list(spike_sites(self.decoder))
        layer, name = sites[index].layer, sites[index].name
        block = self.decoder.layers[layer]
        others = [path for site, paths in SITES.items() if site != name for path in paths]
        spiking = [block.get_submodule(path) for path in others]
        off = [m for m in spiking if isinstance(m, SpikedLinear)]
        total = 0.0
        with torch.inference_mode():
            for module in off:
                module.heeds_neuron = False
            try:
                changed = [self._run(states[layer], layer, layer + 1) for states in self.before]
            finally:
                for module in off:
                    module.heeds_neuron = True
            for x, log_p in zip(changed, self.expected, strict=True):
                log_q = self._log_p(self._plain(x, layer + 1))
                total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        return total / len(self.before)

    def _plain(self, x: Tensor, first: int) -> Tensor:
        """The layers from ``first`` on, as if nothing spiked there."""
        later = [
            module
            for layer in self.decoder.layers[first:]
            for module in layer.modules()
            if isinstance(module, SpikedLinear)
        ]
        for module in later:
            module.heeds_neuron = False
        try:
            return self._run(x, first, len(self.decoder.layers))
        finally:
            for module in later:
                module.heeds_neuron = True

    def _run(self, x: Tensor, first: int, end: int) -> Tensor:
        decoder = self.decoder
        span = decoder.span(decoder.init_state(), x.shape[1])
        for layer in decoder.layers[first:end]:
            x, _ = layer(x, span, layer.init_state(1, decoder.embedding))
        return x

    def _log_p(self, x: Tensor) -> Tensor:
        return self.decoder.head(x[:, EVERY_TOKENS - 1 :: EVERY_TOKENS])[0].float().log_softmax(-1)
