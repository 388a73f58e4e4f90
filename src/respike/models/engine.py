"""The native engine: a span through all layers in one call, for decoders with packed weights.

It computes what `respike.models.decoder` defines, on the same states, so a sequence may go on with
either. Layers with a mixer it does not know keep their mixers in Python, between two native calls;
layers with an attention beside their own, or with experts, run in Python whole.

Letters: B batch, T tokens, D model width, H query heads, G KV groups, K head dim.
"""

import math
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor

from respike.config import Mixer as MixerConfig
from respike.config import ModelConfig
from respike.errors import BackendError
from respike.layers.attention import Attention
from respike.layers.blocks import BlockSoftmax, BlockState
from respike.layers.far import FarSoftmax
from respike.layers.linear import PackedLinear
from respike.layers.mixer import Mixer
from respike.layers.mlp import GatedMLP
from respike.layers.norm import RMSNorm
from respike.layers.softmax import FullSoftmax, WindowSoftmax
from respike.layers.span import Span
from respike.layers.spikes import SpikeLinear
from respike.layers.state import KeptState, KVState, MixerState, PairState, WindowState
from respike.ops import backends
from respike.ops.block_rule import block_turns
from respike.ops.spike_linear import spike_weights

_ENGINE = {torch.float32: "Engine_f32", torch.bfloat16: "Engine_bf16"}

_SITES = (0, 3, 4, 6)
"""Among q, k, v, o, gate, up, down: the first of those that share an input."""

LayerStates = tuple[tuple[MixerState, ...], ...]


def engine_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no engine can run a model of this kind here, or None if one can."""
    if backends.kernels() is None:
        status = backends.native_status()
        return "RESPIKE_BACKEND=torch" if status.available else status.reason
    if device.type != "cpu":
        return f"it runs on processors, the model is on {device}"
    if dtype not in _ENGINE:
        return f"it knows {', '.join(map(str, _ENGINE))}, the model is {dtype}"
    return None


def engine_layers(config: ModelConfig) -> dict[str, int]:
    """How many layers of a model the engine runs whole, without their mixers, or not at all.

    Spikes before float weights are emulated in Python.
    """
    emulated = config.spikes is not None and config.spikes.weights == "float"
    counts = {"native": 0, "mixers in Python": 0, "in Python": 0}
    for layer in config.layers:
        if emulated or layer.beside is not None or layer.moe is not None:
            counts["in Python"] += 1
        elif all(map(_is_known, layer.mixers)):
            counts["native"] += 1
        else:
            counts["mixers in Python"] += 1
    return counts


def _is_known(part: MixerConfig) -> bool:
    if part.mixer == "blocks":
        return part.cache == "model" and not (part.by_head or part.dense_decode)
    return part.mixer != "linear" and (part.memory is None or part.memory.kind == "far")


class Engine:
    """The layers of a decoder, ready to run natively.

    Args:
        layers: The decoder's layers; every linear layer is a `PackedLinear`, or all of them are
            `SpikeLinear`, of which those with the same input have the same neuron.
        frequencies: Rotary frequencies, float64 (K / 2,).

    Raises:
        BackendError: This model cannot run natively here, see `engine_obstacle`.
    """

    def __init__(self, layers: list[Any], frequencies: Tensor) -> None:
        first = layers[0]
        attention: Attention = first.self_attn
        weight = first.input_layernorm.weight
        obstacle = engine_obstacle(weight.dtype, weight.device)
        if obstacle is not None:
            raise BackendError(f"the native engine cannot run this model: {obstacle}")
        self._layers, self._frequencies = layers, frequencies
        self._attentions = [layer.self_attn for layer in layers]
        self.dtype, self._hidden = weight.dtype, len(weight)
        self._heads, self._groups = attention.num_heads, attention.num_groups
        self._head_dim = attention.head_dim
        self._work: dict[str, Tensor] = {}
        self._busy = Lock()  # the workspace serves one call at a time
        self._build()

    def _build(self) -> None:
        """Make the native engine from the layers as they are now."""
        ready = backends.kernels()
        assert ready is not None
        self._known = [i for i, layer in enumerate(self._layers) if _is_plain(layer)]
        """The engine's layers; the others run in Python."""
        self._kept: list[Tensor] = []  # what the engine points to, as below
        self._turns: list[object] = []
        self._arranged = [attention.groups for attention in self._attentions]
        self._mixers = [list(attention.mixers) for attention in self._attentions]
        self._native = [all(map(_is_native, mixers)) for mixers in self._mixers]
        self._level = ready.level
        self._engine: Any = None
        if not self._known:
            return
        first = self._layers[self._known[0]]
        self._engine = getattr(ready.module, _ENGINE[self.dtype])(
            self._hidden,
            self._heads,
            self._groups,
            self._head_dim,
            first.mlp.down_proj.in_features,
            first.input_layernorm.eps,
            self._frequencies.tolist(),
            first.mlp.down_proj.activations == "int8",
            tuple(self._layer(self._layers[i], self._native[i]) for i in self._known),
        )

    def run(
        self, x: Tensor, span: Span, states: LayerStates, begin: int = 0, end: int | None = None
    ) -> LayerStates:
        """Take the residual stream ``x`` (B, T, D) through layers, in place.

        Args:
            x: What the layer ``begin`` takes in, contiguous; embeddings for the first.
            span: Where the tokens stand.
            states: Of all layers, before the span; those of these layers are consumed.
            begin: The first of these layers.
            end: One after the last; None: all that follow.

        Returns:
            The states of these layers after the span.
        """
        with self._busy:
            return self._run(x, span, states, begin, len(self._layers) if end is None else end)

    def _run(self, x: Tensor, span: Span, states: LayerStates, first: int, end: int) -> LayerStates:
        if self._changed():
            self._build()
        work = self._workspace(x)
        pointers = tuple(tensor.data_ptr() for tensor in work)
        call = (
            self._level,
            torch.get_num_threads(),
            span.starts,
            span.valids,
            span.num_tokens,
            pointers,
        )
        after: list[tuple[MixerState, ...]] = []
        while first < end:
            if first not in self._known:
                out, state = self._layers[first](x, span, states[first])
                x.copy_(out)
                after.append(state)
                first += 1
                continue
            if not self._native[first]:
                after.append(self._mixers_in_python(first, call, work, span, states[first]))
                first += 1
                continue
            last = first + 1
            observed = self._observed(first)
            while last < end and self._native[last] and not observed:
                if last not in self._known or self._observed(last):
                    break
                last += 1
            buffers: list[int] = []
            for state in states[first:last]:
                for part in state:
                    buffers += _buffers(part, span)
            begin = self._known.index(first)
            self._engine.run(*call, begin, begin + last - first, buffers)
            if observed:
                self._show(first, work, span, states[first])
            after += states[first:last]
            first = last
        return tuple(after)

    def _observed(self, index: int) -> bool:
        return any(mixer.observer is not None for mixer in self._mixers[index])

    def _show(
        self, index: int, work: tuple[Tensor, ...], span: Span, state: tuple[MixerState, ...]
    ) -> None:
        """Let the observers of a layer that has just run natively look at it."""
        _, _, q, *_ = work
        per_group = q.view(*q.shape[:2], self._groups, -1, self._head_dim)
        pairs = self._attentions[index].arrangement()
        for (groups, mixer), part in zip(pairs, state, strict=True):
            mixer.observe(per_group[:, :, groups].flatten(2, 3), span, part)

    def _mixers_in_python(
        self,
        index: int,
        call: tuple[Any, ...],
        work: tuple[Tensor, ...],
        span: Span,
        state: tuple[MixerState, ...],
    ) -> tuple[MixerState, ...]:
        known = self._known.index(index)
        self._engine.project(*call, known)
        _, normed, q, k, v, mixed = work
        out, state = self._layers[index].self_attn.mix(normed, (q, k, v), span, state)
        mixed.copy_(out)
        self._engine.finish(*call, known)
        return state

    def _changed(self) -> bool:
        """Whether mixers were exchanged, or parts of them switched, since `_build`."""
        for attention, groups in zip(self._attentions, self._arranged, strict=True):
            if attention.groups is not groups:
                return True
        now = [all(map(_is_native, mixers)) for mixers in self._mixers]
        return now != self._native

    def _workspace(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x`` and the tensors between a layer's steps, see native/engine.hpp."""
        batch, tokens, _ = x.shape
        shapes = {
            "normed": (self._hidden,),
            "q": (self._heads, self._head_dim),
            "k": (self._groups, self._head_dim),
            "v": (self._groups, self._head_dim),
            "mixed": (self._heads, self._head_dim),
        }
        rows = batch * tokens
        views = [x]
        for name, shape in shapes.items():
            kept = self._work.get(name)
            if kept is None or len(kept) < rows:
                # Zeros: outputs of padding are never written, and must be numbers.
                kept = self._work[name] = x.new_zeros(rows, *shape)
            views.append(kept[:rows].view(batch, tokens, *shape))
        return tuple(views)

    def _layer(self, layer: Any, native: bool) -> tuple[Any, ...]:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [attention.q_norm, attention.k_norm] if attention.has_qk_norm else [None, None]
        linears = [getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        pairs = attention.arrangement() if native else []
        return (
            *(self._norm(norm) for norm in norms),
            *(self._linear(linear) for linear in linears),
            tuple(self._neuron(linears[i]) for i in _SITES if isinstance(linears[i], SpikeLinear)),
            tuple(self._mixer(groups, mixer) for groups, mixer in pairs),
        )

    def _norm(self, norm: RMSNorm | None) -> int:
        return 0 if norm is None else self._keep(norm.weight)

    def _linear(self, linear: PackedLinear) -> tuple[int, ...]:
        packed = linear.packed
        bias = 0 if linear.bias is None else self._keep(linear.bias)
        self._kept += [t for t in (packed.data, packed.scales) if t is not None]
        if isinstance(linear, SpikeLinear):
            return spike_weights(packed, linear.bias)
        shape = (packed.in_features, packed.out_features, packed.group_size)
        return (*packed.for_kernels, bias, *shape)

    def _neuron(self, linear: SpikeLinear) -> tuple[bool, float, int, int]:
        absmax, k, band = linear.neuron.for_engine
        return absmax, k, *((0, 0) if band is None else (self._keep(band), len(band)))

    def _mixer(self, groups: list[int], mixer: Mixer) -> tuple[Any, ...]:
        none = (0,) * 9
        whole = (None, (0,) * 8)
        if isinstance(mixer, FullSoftmax):
            return groups, 0, 0, 0, none, *whole
        if isinstance(mixer, BlockSoftmax):
            numbers = mixer.rule.numbers
            turns = block_turns(numbers, tuple(self._frequencies.tolist()))
            self._turns.append(turns)
            return groups, 0, 0, 0, none, turns, numbers
        window = cast(WindowSoftmax, mixer.window if isinstance(mixer, FarSoftmax) else mixer)
        limits = (window.window_tokens, window.sink_tokens, window.sink_reach_tokens)
        if not isinstance(mixer, FarSoftmax) or (mixer.is_shut and not mixer.kept_tokens):
            return groups, *limits, none, *whole
        decay = -math.log(2) * torch.exp2(-mixer.log2_half_life.float())
        parameters = (mixer.key_weight, mixer.key_bias, mixer.query_weight, mixer.beta, decay)
        far = tuple(self._keep(parameter.float().contiguous()) for parameter in parameters)
        kept: tuple[int, ...] = (0, 0, 0)
        if mixer.kept_tokens:
            worths = mixer.keep_weight.float().contiguous(), mixer.keep_rate()
            kept = *map(self._keep, worths), mixer.kept_tokens
        return groups, *limits, (*far, mixer.key_weight.shape[1], *kept), *whole

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach()
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _is_plain(layer: Any) -> bool:
    """The layer is one attention and one MLP."""
    return layer.beside is None and isinstance(layer.mlp, GatedMLP)


def _is_native(mixer: Mixer) -> bool:
    if mixer.off:
        return False
    if isinstance(mixer, BlockSoftmax):
        return not (mixer.int8 or mixer.by_head or mixer.dense_decode)
    if not isinstance(mixer, FullSoftmax | WindowSoftmax | FarSoftmax):
        return False
    return not (isinstance(mixer, FarSoftmax) and mixer.watch)


def _buffers(state: MixerState, span: Span) -> tuple[int, ...]:
    """As MixerBuffers of native/engine.hpp: addresses, 0 where there is nothing, and two counts."""
    memory, kept = 0, [0] * len(KeptState.parts)
    if isinstance(state, BlockState):
        state.reserve(span.end)
        k, v, summaries = state.parts["k"].data, state.parts["v"].data, state.summaries.data
        cache = _address(k), _address(v), k.shape[2]
        return *cache, memory, *kept, _address(summaries), summaries.shape[2]
    if isinstance(state, PairState):
        memory = _address(state.memory.memory)
        if isinstance(state.memory, KeptState):
            kept = [_address(x) for x in state.memory.kept()]
        state = state.window
    if isinstance(state, KVState):
        state.reserve(span.end)
    assert isinstance(state, KVState | WindowState)
    return _address(state.k), _address(state.v), state.k.shape[2], memory, *kept, 0, 0


def _address(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError(f"a state's buffer of shape {tuple(tensor.shape)} is not in one piece")
    return tensor.data_ptr()
