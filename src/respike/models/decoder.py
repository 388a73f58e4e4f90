"""The one decoder: embedding, layers of (mixer, MLP) with pre-norms, norm, head.

Every source family and every converted model is this module with another `ModelConfig`. Tensor
names are the source's (Hugging Face's), so a diff of two checkpoints lists what conversion added.

Letters: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from respike import config as configs
from respike.config import LayerConfig, ModelConfig
from respike.layers.attention import Attention
from respike.layers.beside import Beside
from respike.layers.blocks import BlockSoftmax
from respike.layers.far import FarSoftmax
from respike.layers.linear import PackedLinear
from respike.layers.memory import Linear, WindowBesideMemory
from respike.layers.mixer import Mixer
from respike.layers.norm import RMSNorm
from respike.layers.softmax import FullSoftmax, WindowSoftmax
from respike.layers.span import Span
from respike.layers.state import MixerState
from respike.models.build import block_rule, build_memory, build_mlp, frequencies
from respike.models.engine import Engine
from respike.models.state import DecoderState

PREFILL_CHUNK_TOKENS = 512
"""Tokens a prefill works on at a time: bounds memory, and keeps a chunk's activations in cache."""

Logits = Literal["all", "last", "none"]
Mix = Callable[[Attention, Tensor, tuple[Tensor, Tensor, Tensor]], Tensor]
"""From an attention layer, its normed input (B, T, D) and its projections to (B, T, H, K)."""


def build_mixer(config: ModelConfig, part: configs.Mixer) -> Mixer:
    """The mixer that ``part`` of a layer of ``config`` describes."""
    head_dim, eps = config.head_dim, config.rms_norm_eps
    if part.mixer == "full":
        if part.memory is None:
            return FullSoftmax()
        memory = build_memory(config, part.memory, len(part.groups))
        return WindowBesideMemory(FullSoftmax(), memory, head_dim, eps)
    if part.mixer == "linear":
        return Linear(build_memory(config, part.memory, len(part.groups)), head_dim, eps)
    if part.mixer == "blocks":
        return BlockSoftmax(
            block_rule(part),
            int8=part.cache == "int8",
            by_head=part.by_head,
            dense_decode=part.dense_decode,
        )
    window = WindowSoftmax(part.window_tokens, part.sink_tokens, part.sink_reach_tokens)
    if part.memory is None:
        return window
    if part.memory.kind == "far":
        return FarSoftmax(
            window,
            num_heads=len(part.groups) * config.heads_per_group,
            num_groups=len(part.groups),
            head_dim=head_dim,
            features=part.memory.features,
            kept_tokens=part.memory.kept_tokens,
        )
    memory = build_memory(config, part.memory, len(part.groups))
    return WindowBesideMemory(window, memory, head_dim, eps)


def build_mixers(config: ModelConfig, layer: LayerConfig) -> list[tuple[tuple[int, ...], Mixer]]:
    """(KV groups, mixer) pairs of a layer of ``config``, for `Attention`."""
    return [(part.groups, build_mixer(config, part)) for part in layer.mixers]


def _build_beside(config: ModelConfig, layer: LayerConfig) -> Beside | None:
    if layer.beside is None:
        return None
    inner = config.beside(layer)
    mixers = [(part.groups, build_mixer(inner, part)) for part in layer.beside.mixers]
    return Beside(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        mixers=mixers,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        mean=layer.beside.merge == "mean",
        softmax_dropout=layer.beside.softmax_dropout,
        eps=config.rms_norm_eps,
    )


class DecoderLayer(nn.Module):
    """``x += mixer(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps)
        self.self_attn = Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            mixers=build_mixers(config, layer),
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            qk_norm_eps=eps if config.qk_norm else None,
        )
        self.beside = _build_beside(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps)
        self.mlp = build_mlp(config, layer)

    def init_state(self, batch: int, like: Tensor) -> tuple[MixerState, ...]:
        """The state before the first token; dtype and device of ``like``."""
        states = self.self_attn.init_state(batch, like)
        return states if self.beside is None else states + self.beside.init_state(batch, like)

    def forward(
        self, x: Tensor, span: Span, state: tuple[MixerState, ...]
    ) -> tuple[Tensor, tuple[MixerState, ...]]:
        """(B, T, D) and the layer's state before the span -> the same after it."""
        normed = self.input_layernorm(x)
        if self.beside is None:
            mixed, state = self.self_attn(normed, span, state)
        else:
            mixed, state = self.beside.merged(self.self_attn, normed, span, state)
        return self.add_mixed(x, mixed), state

    def forward_with(self, x: Tensor, mix: Mix) -> Tensor:
        """As `forward`, with what happens between projections and output left to ``mix``.

        For callers that mix stretches of ``x`` on their own, such as documents of a packed row.
        """
        return self.add_mixed(x, self.attended_with(self.input_layernorm(x), mix))

    def attended_with(self, normed: Tensor, mix: Mix) -> Tensor:
        """Only what the attention adds to the residual, from a given norm's output."""
        if self.beside is None:
            return _attend_with(self.self_attn, normed, mix)
        far, left_out = _attend_with(self.beside, normed, mix), self.beside.leaves_out()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not left_out):
            near = _attend_with(self.self_attn, normed, mix)
        return self.beside.combined(self.self_attn, near, far, left_out)

    def mix_with(self, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], mix: Mix) -> Tensor:
        """Only that part, on a given norm's output and projections."""
        return mix(self.self_attn, x, qkv)

    def add_mixed(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows the attention: its output joins the residual, then the MLP's does."""
        x = x + mixed
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


def _attend_with(attention: Attention, normed: Tensor, mix: Mix) -> Tensor:
    mixed = mix(attention, normed, attention.project(normed))
    return cast(Tensor, attention.o_proj(mixed.flatten(2)))


class Trunk(nn.Module):
    """Everything but the head; carries the prefix ``model.`` of the tensor names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Not nn.Embedding(V, D): on the meta device its random start imports torch's compiler,
        # which takes longer than loading a small model.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        if config.learned_sinks:
            self.learned_sinks = nn.Parameter(torch.empty(config.learned_sinks, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model with a mixer for each set of KV groups.

    Args:
        config: Shapes and mixers. Weights are uninitialised parameters: see `respike.load`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head: nn.Linear | PackedLinear | None = None
        """None: the embedding serves as head too."""
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.engine: Engine | None = None
        """Runs the layers where no gradients are needed; see `respike.models.packing`."""
        with torch.device("cpu"):
            self.frequencies = frequencies(config.rope, config.head_dim)
            """Rotary frequencies, radians per token, float64 (K / 2,)."""

    @property
    def layers(self) -> list[DecoderLayer]:
        """The layers, bottom first."""
        return cast(list[DecoderLayer], list(self.model.layers))

    @property
    def embedding(self) -> Tensor:
        """The (V, D) embedding matrix; its dtype and device are the model's."""
        return self.model.embed_tokens.weight

    def init_state(self, batch: int = 1) -> DecoderState:
        """The state before the first token of ``batch`` sequences.

        Learned sinks, if there are any, have been read and are counted among the tokens seen.
        """
        if not self.config.learned_sinks:
            return self._empty_state(batch)
        state = self._empty_state(1)
        with torch.no_grad():
            span = self.span(state, self.config.learned_sinks)
            x = self.model.learned_sinks[None].clone()
            _, layers = self._through_layers(x, span, state.layers)
        return DecoderState.join([DecoderState(layers, state.tokens_seen + span.valid)] * batch)

    def _first_state(self, batch: int) -> DecoderState:
        """As `init_state`, but where gradients are needed sinks are read together with the text."""
        return self._empty_state(batch) if torch.is_grad_enabled() else self.init_state(batch)

    def _empty_state(self, batch: int) -> DecoderState:
        layers = tuple(layer.init_state(batch, self.embedding) for layer in self.layers)
        return DecoderState(layers, torch.zeros(batch, dtype=torch.int64))

    def span(self, state: DecoderState, num_tokens: int, valid: Tensor | None = None) -> Span:
        """The next ``num_tokens`` tokens of each sequence of ``state``."""
        if valid is None:
            valid = torch.full_like(state.tokens_seen, num_tokens)
        like = self.embedding
        rest = self.frequencies, like.dtype, like.device, self.config.learned_sinks
        return Span(state.tokens_seen, valid, num_tokens, *rest)

    def head(self, x: Tensor) -> Tensor:
        """Final norm and output matrix: (B, T, D) -> (B, T, V)."""
        x = self.model.norm(x)
        return linear(x, self.embedding) if self.lm_head is None else self.lm_head(x)

    def forward(
        self,
        tokens: Tensor,
        state: DecoderState | None = None,
        *,
        lengths: Tensor | None = None,
        logits: Logits = "all",
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> tuple[Tensor, DecoderState]:
        """Continue each sequence by ``tokens``.

        Without gradients the tokens are worked on in chunks that end at multiples of
        ``chunk_tokens``, so memory is bounded and calls split at such multiples give the same
        bits. With gradients the whole call is one span; caches carry no gradient between calls.

        Args:
            tokens: Token ids (B, T), int64. Shorter rows are padded at the end with any id.
            state: What came before; consumed. None starts new sequences.
            lengths: Real tokens in each row (B,). None means all T.
            logits: Which logits to compute: of all tokens, of each row's last real token, or none.
            chunk_tokens: Largest number of tokens worked on at once.

        Returns:
            Logits (B, T, V), (B, 1, V) or (B, 0, V) in the model's dtype, and the next state.
        """
        state = self._first_state(len(tokens)) if state is None else state
        if lengths is not None:
            lengths = lengths.cpu()
        last: Tensor | None = None
        parts = []
        for begin, x, valid, after in self._chunks(tokens, state, lengths, chunk_tokens):
            state = after
            if logits == "all":
                parts.append(self.head(x))
            elif logits == "last":
                last = _last_tokens(last, x, begin, valid, lengths)
        if last is not None:
            parts = [self.head(last)]
        if len(parts) == 1:
            return parts[0], state
        nothing = self.embedding.new_zeros(len(tokens), 0, self.config.vocab_size)
        return torch.cat((nothing, *parts), 1), state

    def hidden(
        self,
        tokens: Tensor,
        state: DecoderState | None = None,
        *,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> tuple[Tensor, DecoderState]:
        """What `head` turns into logits, (B, T, D), and the next state; see `forward`.

        For callers that want logits of long sequences piece by piece.
        """
        state = self._first_state(len(tokens)) if state is None else state
        outputs = [self.embedding.new_zeros(len(tokens), 0, self.config.hidden_size)]
        for _, x, _, after in self._chunks(tokens, state, None, chunk_tokens):
            state = after
            outputs.append(x)
        return torch.cat(outputs, 1), state

    def _chunks(
        self, tokens: Tensor, state: DecoderState, lengths: Tensor | None, chunk_tokens: int
    ) -> Iterator[tuple[int, Tensor, Tensor, DecoderState]]:
        """Work through ``tokens``; yields (begin, hidden, valid tokens of each row, state)."""
        begin, total = 0, tokens.shape[1]
        while begin < total:
            step = chunk_tokens - int(state.tokens_seen[0]) % chunk_tokens
            end = total if torch.is_grad_enabled() else min(total, begin + step)
            valid = torch.full_like(state.tokens_seen, end - begin)
            if lengths is not None:
                valid = (lengths - begin).clamp(0, end - begin)
            for x, after in self.turns(tokens[:, begin:end], state, len(self.layers), valid):
                if after is not None:
                    yield begin, x, valid, (state := after)
            begin = end

    def turns(
        self, tokens: Tensor, state: DecoderState, layers: int, valid: Tensor | None = None
    ) -> Iterator[tuple[Tensor, DecoderState | None]]:
        """Continue by ``tokens`` as one chunk, ``layers`` at a time: the same bits, with pauses.

        For callers that have other things to do meanwhile. They enter `torch.inference_mode` for
        each turn, as a pause must not leave it switched on.

        Args:
            tokens: Token ids (B, T), no more than a chunk of `forward`.
            state: What came before; consumed.
            layers: How many a turn, at least one.
            valid: Real tokens in each row (B,). None means all T.

        Yields:
            What comes out of the layers (B, T, D), for `head` after the last; and the next state,
            None before the last turn.
        """
        valid = torch.full_like(state.tokens_seen, tokens.shape[1]) if valid is None else valid
        x = self.model.embed_tokens(tokens)
        sinks = self.config.learned_sinks if not state.tokens_seen.any() else 0
        if sinks:
            x = torch.cat((self.model.learned_sinks.expand(len(x), -1, -1), x), 1)
        span = self.span(state, sinks + tokens.shape[1], sinks + valid)
        native = self.engine is not None and not torch.is_grad_enabled()
        done: tuple[tuple[MixerState, ...], ...] = ()
        while len(done) < len(self.layers):
            part = len(done), min(len(self.layers), len(done) + layers)
            if native:
                assert self.engine is not None
                done += self.engine.run(x, span, state.layers, *part)
            else:
                x, after = self._through_layers(x, span, state.layers, *part)
                done += after
            last = len(done) == len(self.layers)
            seen = state.tokens_seen + sinks + valid
            yield x[:, sinks:], DecoderState(done, seen) if last else None

    def _through_layers(
        self,
        x: Tensor,
        span: Span,
        states: tuple[tuple[MixerState, ...], ...],
        begin: int = 0,
        end: int | None = None,
    ) -> tuple[Tensor, tuple[tuple[MixerState, ...], ...]]:
        layers, some = [], slice(begin, end)
        for layer, before in zip(self.layers[some], states[some], strict=True):
            x, after = layer(x, span, before)
            layers.append(after)
        return x, tuple(layers)


def _last_tokens(
    last: Tensor | None, x: Tensor, begin: int, valid: Tensor, lengths: Tensor | None
) -> Tensor:
    """Each row's last real token (B, 1, D), as far as the chunk ``x`` from ``begin`` on has it."""
    if lengths is None:
        return x[:, -1:]
    last = x.new_zeros(len(x), 1, x.shape[2]) if last is None else last
    rows = torch.nonzero((lengths > begin) & (lengths <= begin + x.shape[1]))[:, 0]
    last[rows, 0] = x[rows, valid[rows] - 1]
    return last
