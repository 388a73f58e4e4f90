"""From a decoder that can be trained to one that runs fast: packed weights and the engine."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from respike.config import SpikeConfig
from respike.errors import BackendError, UnsupportedError
from respike.layers.linear import PackedLinear
from respike.layers.moe import ExpertMLP
from respike.layers.spikes import SpikedLinear, SpikeLinear
from respike.models.decoder import Decoder, DecoderLayer
from respike.models.engine import Engine, engine_obstacle
from respike.models.spiking import Site, spike_sites
from respike.ops.packed import pack
from respike.ops.placing import Form, Room

WEIGHTS = ("stored", "int8", "int4")
"""What linear layers may be rounded to: nothing, or integers."""

INT8_GROUPS = {"o_proj": 64, "gate_proj": 64, "up_proj": 64}
"""Weights and inputs that share a scale, where not 32: longer groups are faster. These cost the
least (SmolLM2: KL 0.0064 with 32 everywhere, 0.0070 with these, 0.0098 with 64 everywhere)."""

_FLOAT_KIND = {torch.float32: "f32", torch.bfloat16: "bf16"}


def pack_decoder(decoder: Decoder, weights: str = "stored") -> Decoder:
    """Pack every linear layer, in place, and give the decoder its engine.

    Layers behind neurons are packed already, and are only laid out for events. Embeddings keep
    their dtype. Where weights are rounded, so are the inputs of their layers, to int8 with a scale
    for each row and group: products are of integers then. With int4 the head is
    int8: it decides between tokens directly, and int4 there costs half as much again.

    Args:
        decoder: On a processor, in float32 or bfloat16. It cannot be trained afterwards.
        weights: One of `WEIGHTS`.

    Raises:
        BackendError: The engine cannot run it here.
        UnsupportedError: Unknown ``weights``, weights that cannot be rounded so, or a decoder
            that is packed already or whose spikes are emulated with float weights.
    """
    like = decoder.embedding
    packer = Packer(decoder, weights, like.dtype, like.device)
    packer.pack(None)
    for index in range(len(decoder.layers)):
        packer.pack(index)
    return packer.finish()


class Packer:
    """Packs a decoder piece by piece, so that no more than a piece need be there unpacked.

    First comes what is outside of the layers, then each layer, bottom first. See `pack_decoder`.

    Args:
        decoder: Its weights may be on the meta device until it is their turn.
        weights: One of `WEIGHTS`.
        dtype: Of its weights, when they are there.
        device: Where they will be.
        spikes: Neurons that each layer will have got when it is its turn.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: str,
        dtype: torch.dtype,
        device: torch.device,
        spikes: SpikeConfig | None = None,
    ) -> None:
        if weights not in WEIGHTS:
            raise UnsupportedError(f"weights {weights!r}", hint=f"one of {', '.join(WEIGHTS)}")
        if decoder.engine is not None:
            raise UnsupportedError("packing a decoder that is packed already")
        obstacle = engine_obstacle(dtype, device)
        if obstacle is not None:
            raise BackendError(f"weights cannot be packed: {obstacle}")
        self._decoder = decoder
        self._kind = _FLOAT_KIND[dtype] if weights == "stored" else weights
        self._behind_neurons = spikes is not None or any(
            isinstance(m, SpikedLinear | SpikeLinear) for m in decoder.modules()
        )
        head = (*decoder.embedding.shape, *self._rounding("lm_head"))
        units = [[head]]
        if self._behind_neurons:
            units += [_forms_behind(site, spikes) for site in spike_sites(decoder)]
        else:
            for layer in decoder.layers:
                for _, name, linear in _linears(layer):
                    form = linear.out_features, linear.in_features, *self._rounding(name)
                    units.append([form])
        self._room = Room(units, device)

    def _rounding(self, name: str) -> tuple[str, int]:
        """Kind and group size of the linear layer of this name."""
        kind = "int8" if self._kind == "int4" and name == "lm_head" else self._kind
        return kind, INT8_GROUPS.get(name, 32) if self._kind == "int8" else 32

    def pack(self, index: int | None) -> None:
        """Pack a layer, or (None) what is outside of them, whose weights are there now."""
        if index is None:
            decoder = self._decoder
            head = decoder.embedding if decoder.lm_head is None else decoder.lm_head.weight
            assert isinstance(head, torch.Tensor)
            decoder.lm_head = self._packed(head, None, "lm_head")
        elif self._behind_neurons:
            for site in spike_sites(self._decoder, index):
                behind = [m for m in site.linears if isinstance(m, SpikeLinear)]
                placed = self._room.place_side_by_side([m.packed for m in behind])
                for spiking, packed in zip(behind, placed, strict=True):
                    spiking.set_packed(packed)
        else:
            for parent, name, linear in _linears(self._decoder.layers[index]):
                setattr(parent, name, self._packed(linear.weight, linear.bias, name))

    def _packed(self, weight: Tensor, bias: Tensor | None, name: str) -> PackedLinear:
        kind, group_size = self._rounding(name)
        packed = self._room.place(pack(weight.detach(), kind, group_size))
        return PackedLinear(packed, bias, "int8" if kind in ("int8", "int4") else "exact")

    def finish(self) -> Decoder:
        """The decoder with its engine, after the last piece."""
        self._decoder.engine = Engine(self._decoder.layers, self._decoder.frequencies)
        return self._decoder


def _forms_behind(site: Site, spikes: SpikeConfig | None) -> list[Form]:
    """Of the linear layers of a site, which have neurons or will get them.

    Raises:
        UnsupportedError: Some have none, or are floats.
    """
    found: list[Form] = []
    for linear in site.linears:
        if isinstance(linear, SpikeLinear):
            form = linear.packed.kind, linear.packed.group_size
        elif spikes is not None and spikes.weights != "float":
            form = spikes.weights, spikes.group_size
        else:
            raise UnsupportedError(
                f"packing layer {site.layer}, {site.name}: not integers behind neurons",
                hint="float weights are emulated",
            )
        found.append((linear.out_features, linear.in_features, *form))
    return found


def _linears(layer: DecoderLayer) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that are packed, in the order they are read: parent, name, layer.

    Routers and what is inside mixers are not.
    """
    parents: list[nn.Module] = [layer.self_attn]
    if layer.beside is not None:
        parents.append(layer.beside)
    if isinstance(layer.mlp, ExpertMLP):
        parents += [*layer.mlp.experts, *layer.mlp.shared_experts]
    else:
        parents.append(layer.mlp)
    for parent in parents:
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                yield parent, name, linear
