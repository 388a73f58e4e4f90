"""A decoder that spikes: neurons in front of its linear layers, as its config says.

What stands in front of what (a site): q, k and v share an input, so do gate and up. The output head
does not spike, nor do the small projections of memories.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from respike.config import SpikeConfig
from respike.errors import UnsupportedError
from respike.layers.linear import PackedLinear
from respike.layers.low_rank import LowRank
from respike.layers.mlp import GatedMLP
from respike.layers.spikes import Neuron, SpikedLinear, SpikeLinear, Step
from respike.models.decoder import Decoder
from respike.ops import backends
from respike.ops.packed import pack

SiteName = Literal["qkv", "o", "mlp", "down"]

SITES: dict[SiteName, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Where neurons stand in a layer, and the linear layers behind them."""

assert tuple(SITES) == get_args(SiteName)


@dataclass(frozen=True)
class Site:
    """One place in a decoder where neurons stand, or could."""

    layer: int
    name: SiteName
    linears: tuple[nn.Linear | PackedLinear | LowRank, ...]

    @property
    def in_features(self) -> int:
        """Neurons."""
        return self.linears[0].in_features

    @property
    def out_features(self) -> int:
        """Outputs of all linear layers together."""
        return sum(linear.out_features for linear in self.linears)

    @property
    def neuron(self) -> Neuron | None:
        """None while nothing spikes here."""
        found = getattr(self.linears[0], "neuron", None)
        assert found is None or isinstance(found, Neuron)
        return found


def spike_sites(decoder: Decoder, only: int | None = None) -> Iterator[Site]:
    """Every site, layer by layer in the order it is passed; or those of the layer ``only``.

    Raises:
        UnsupportedError: A layer has linear layers that no site names.
    """
    for index in range(len(decoder.layers)) if only is None else (only,):
        layer = decoder.layers[index]
        if layer.beside is not None or not isinstance(layer.mlp, GatedMLP):
            what = "experts" if layer.beside is None else "an attention beside its own"
            raise UnsupportedError(f"spikes in layer {index}, which has {what}")
        for name, paths in SITES.items():
            linears = tuple(layer.get_submodule(path) for path in paths)
            yield Site(index, name, linears)  # type: ignore[arg-type]


@contextmanager
def watch_sites(decoder: Decoder, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While the block runs, call ``see`` with a site's index and the input of its neurons.

    Layers run in Python then: the native engine shows nobody what passes through it.
    """

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: see(index, inputs[0])

    handles = [
        site.linears[0].register_forward_pre_hook(hook(index))
        for index, site in enumerate(spike_sites(decoder))
    ]
    engine, decoder.engine = decoder.engine, None
    try:
        yield
    finally:
        decoder.engine = engine
        for handle in handles:
            handle.remove()


def channel_weights(site: Site) -> Tensor:
    """Norm of each input's weights relative to the mean over inputs, float32 (I,)."""
    squares = torch.zeros(site.in_features, device=next(_weights(site)).device)
    for weight in _weights(site):
        squares += weight.detach().float().square().sum(0)
    norms = squares.sqrt()
    return norms / norms.mean().clamp(min=torch.finfo(torch.float32).tiny)


def _weights(site: Site) -> Iterator[Tensor]:
    for linear in site.linears:
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"layer {site.layer}, {site.name}: its weights are packed already")
        yield linear.weight


def make_neuron(config: SpikeConfig, site: Site) -> Neuron | None:
    """The neuron that ``config`` describes for a site, if any."""
    band: float | None = getattr(config.layers[site.layer], site.name)
    if band is None:
        return None
    if config.neuron == "adaptive":
        return Neuron("mean", 1 / (2 * band))
    if config.neuron == "absmax":
        return Neuron("absmax")
    bands = torch.tensor([band], device=next(_weights(site)).device)
    if config.by_channel:
        bands = bands / channel_weights(site)
    step: Step = "none" if config.neuron == "teal" else config.step
    return Neuron(step, config.k, bands)


def install_spikes(decoder: Decoder, config: SpikeConfig, only: int | None = None) -> None:
    """Put neurons in front of the decoder's linear layers, in place; again to exchange them.

    Args:
        decoder: With float weights.
        config: Which neurons. Weights of integers are packed here, once: they cannot be undone.
        only: In this layer; None: in all.
    """
    for site in spike_sites(decoder, only):
        neuron = make_neuron(config, site)
        if neuron is None:
            continue
        neuron.requires_grad_(False)
        for linear, path in zip(site.linears, SITES[site.name], strict=True):
            assert isinstance(linear, nn.Linear)
            behind: SpikedLinear | SpikeLinear
            if config.weights == "float":
                behind = SpikedLinear(linear, neuron)
            else:
                packed = pack(linear.weight.detach(), config.weights, config.group_size)
                behind = SpikeLinear(packed, neuron, linear.bias)
            _replace(decoder, site.layer, path, behind)


def remove_spikes(decoder: Decoder) -> None:
    """Undo `install_spikes` of float weights: the original layers, the same parameters."""
    for site in spike_sites(decoder):
        for linear, path in zip(site.linears, SITES[site.name], strict=True):
            if isinstance(linear, SpikedLinear):
                plain = nn.Linear(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    device="meta",
                )
                plain.weight, plain.bias = linear.weight, linear.bias
                _replace(decoder, site.layer, path, plain)


def _replace(decoder: Decoder, layer: int, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(decoder.layers[layer].get_submodule(parent), name, module)


def how_it_runs(config: SpikeConfig) -> str:
    """Whether spikes skip work here or are emulated, in words."""
    if config.neuron == "teal":
        return "magnitudes, no spikes; dense float products: nothing is skipped"
    if config.weights == "float":
        return "emulated: dense float products, nothing is skipped"
    ready = backends.kernels()
    if ready is None:
        return f"emulated: dense {config.weights} integer products, no native kernel here"
    level = backends.LEVELS[ready.level]
    return f"event-driven for few tokens ({config.weights}, {level}), dense integers for prefill"
