"""Fit far memories to a model without training: prototypes by clustering, gates by line search.

Layer by layer the original runs on some text. For each KV group with a far memory the keys are
clustered in the metric of the group's queries, ``|k - c| = sqrt(E[(q . (k - c))^2])``: two keys
that every query scores alike are one. Far tokens stand at many distances; a query meets the
prototypes as the mean of itself rotated by `FAR_DISTANCES`, which is folded into its weights.

Where tokens are kept as they are, `respike.conversion.worth` finds which; they are not the memory's
to explain.

Then each head's beta is searched for the least squared error of its output against the original's.
On text that was not searched on, a head that is not better than shut is shut.

Text alone would teach the gates to spoil copying, so `with_recall` adds sequences to copy.

Letters: N contexts, T tokens, D model width, H query heads, G KV groups, F prototypes, K head dim.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from respike.config import ModelConfig, WindowMixer
from respike.conversion.worth import LEAST_TOKENS, FarAttention, fit_worth
from respike.errors import UnsupportedError, UsageError
from respike.layers.attention import Attention
from respike.layers.far import FarSoftmax
from respike.layers.softmax import FullSoftmax
from respike.layers.span import Span
from respike.models.decoder import PREFILL_CHUNK_TOKENS, Decoder, build_mixer
from respike.ops import backends
from respike.ops.rotary import rotary_tables
from respike.ops.softmax import Keys, window_softmax

FAR_DISTANCES = 16
"""Number of distances, evenly from one to four windows, at which far tokens are taken to stand."""
BETAS = torch.arange(-12, 12.01, 0.5)
"""Log factors on a head's memory that are tried."""
CLUSTER_STEPS = 15
TEXTS_PER_COPY = 3


@dataclass(frozen=True)
class HeadFit:
    """What calibration found for one head.

    Attributes:
        layer: Its layer.
        head: Its number in the layer.
        beta: Log factor on the memory; -inf is shut.
        error_shut: Squared error of its output with its gate shut, as a share of the output's
            square, on the text that was not searched on.
        error: The same with the memory.
        share: Memory's mean share of its attention there.
    """

    layer: int
    head: int
    beta: float
    error_shut: float
    error: float
    share: float


def fit_summary(fits: list[HeadFit]) -> dict[str, Any]:
    """Means over heads, and each head's figures, for a report."""
    count = max(len(fits), 1)
    return {
        "heads": len(fits),
        "shut": sum(fit.beta == -math.inf for fit in fits),
        "error_shut_frac": sum(fit.error_shut for fit in fits) / count,
        "error_frac": sum(fit.error for fit in fits) / count,
        "share_frac": sum(fit.share for fit in fits) / count,
        "each": [[fit.layer, fit.head, fit.error_shut, fit.error, fit.share] for fit in fits],
    }


def with_recall(text: Tensor, tokens: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two halves of contexts (N, T), each with a copied random sequence per `TEXTS_PER_COPY`.

    Args:
        text: Token ids (N, T), N at least 2.
        tokens: Those that random sequences are made of.
        seed: Of the sequences.
    """
    draw = random.Random(seed)
    half = (len(text) + 1) // 2
    halves = []
    for part in (text[:half], text[half:]):
        rows = []
        for _ in range(max(1, round(len(part) / TEXTS_PER_COPY))):
            once = draw.choices(tokens, k=(text.shape[1] + 1) // 2)
            rows.append((once + once)[: text.shape[1]])
        halves.append(torch.cat((part, torch.tensor(rows, dtype=part.dtype))))
    return halves[0], halves[1]


def calibrate(
    original: Decoder,
    config: ModelConfig,
    searched: Tensor,
    checked: Tensor,
    half_life_tokens: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], list[HeadFit]]:
    """Tensors for every far memory of ``config``, by name, and how well each head is served.

    Args:
        original: The source, with its own mixers.
        config: Of the converted model; same layers as ``original``.
        searched: Token ids (N, T) that prototypes and gates are fitted to.
        checked: Token ids (N, T) on which every gate must be worth opening.
        half_life_tokens: Of the memories.
        progress: Called with (layers done, layers).

    Raises:
        UsageError: The contexts are too short for anything to be far.
        UnsupportedError: The original is no stack of attentions and MLPs.
    """
    far = far_windows(config)
    check_contexts(original, [part for layer in far for _, part in layer], searched.shape[1])
    tensors: dict[str, Tensor] = {}
    fits: list[HeadFit] = []
    with torch.inference_mode():
        for index, heads in enumerate(layer_heads(original, [*searched, *checked])):
            for j, part in far[index]:
                fit = _GroupFit(original, config, part, half_life_tokens)
                mixer, found = fit.run(index, heads[: len(searched)], heads[len(searched) :])
                prefix = f"model.layers.{index}.self_attn.mixers.{j}."
                tensors |= {prefix + n: p.data for n, p in mixer.named_parameters()}
                fits += found
            if progress:
                progress(index + 1, len(original.layers))
    return tensors, fits


def far_windows(config: ModelConfig) -> list[list[tuple[int, WindowMixer]]]:
    """Of each layer its windows with far memories, and which of its mixers they are."""
    return [
        [
            (j, part)
            for j, part in enumerate(layer.mixers)
            if part.mixer == "window" and part.memory is not None and part.memory.kind == "far"
        ]
        for layer in config.layers
    ]


def check_contexts(original: Decoder, parts: Sequence[WindowMixer], context_tokens: int) -> None:
    """Refuse to look for far attention where there is none to see.

    Args:
        original: The source.
        parts: Windows with far memories.
        context_tokens: Length of the text that is looked at.

    Raises:
        UsageError: It is too short for anything to be far.
        UnsupportedError: The original is no stack of attentions and MLPs.
    """
    least = 2 * max((part.window_tokens + part.sink_tokens for part in parts), default=0)
    if any(part.memory.kept_tokens for part in parts):  # type: ignore[union-attr]
        least += LEAST_TOKENS
    if context_tokens < least:
        raise UsageError(
            f"calibration needs contexts of at least {least} tokens, got {context_tokens}",
            hint="choose a smaller window_tokens, or set far.calibration_tokens=0",
        )
    if original.config.learned_sinks or any(layer.beside for layer in original.config.layers):
        raise UnsupportedError(
            "calibrating on a model with learned sinks, or with an attention beside another",
            hint="convert the original, or set far.calibration_tokens=0",
        )


@dataclass(frozen=True)
class Heads:
    """Of one layer on one context: q (1, T, H, K), k, v (1, T, G, K), not rotated, and output."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    def far_attention(self, decoder: Decoder, part: WindowMixer) -> FarAttention:
        """What its queries look at behind a window."""
        (span,) = _spans(decoder, self.q.shape[1], self.q.shape[1], torch.float32)
        q, k = self.q.float(), self.k.float()
        by_group = span.rotate(q)[0].unflatten(1, (k.shape[2], -1))  # type: ignore[no-untyped-call]
        limits = part.window_tokens, part.sink_tokens
        return FarAttention.of(by_group, k[0], span.rotate(k)[0], *limits)


def layer_heads(original: Decoder, contexts: Sequence[Tensor]) -> Iterator[list[Heads]]:
    """What each layer in turn makes of whole contexts, token ids (T) each."""
    xs = [original.model.embed_tokens(c[None].to(original.embedding.device)) for c in contexts]
    for layer in original.layers:
        heads = []
        for n, x in enumerate(xs):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            (span,) = _spans(original, x.shape[1], x.shape[1], x.dtype)
            qkv = attention.project(normed)
            mixed = _mixed(attention, normed, qkv, span)
            heads.append(Heads(*qkv, mixed))
            xs[n] = layer.add_mixed(x, attention.o_proj(mixed.flatten(2)))
        yield heads


def _mixed(
    attention: Attention, normed: Tensor, qkv: tuple[Tensor, Tensor, Tensor], span: Span
) -> Tensor:
    """What an attention makes of whole contexts: softmax over all by the kernel, if it can run."""
    q, k, v = qkv
    (mixer, *others) = attention.mixers
    if others or type(mixer) is not FullSoftmax or backends.choose("softmax", q, k, v) is None:
        return attention.mix(normed, qkv, span, attention.init_state(1, normed))[0]
    keys = Keys(span.rotate(k).transpose(1, 2), v.transpose(1, 2))
    return window_softmax(span.rotate(q), keys)[0]


def _spans(
    decoder: Decoder, num_tokens: int, chunk_tokens: int, dtype: torch.dtype
) -> Iterator[Span]:
    """One sequence from its beginning, chunk by chunk."""
    for begin in range(0, num_tokens, chunk_tokens):
        size = min(chunk_tokens, num_tokens - begin)
        start, device = torch.tensor([begin]), decoder.embedding.device
        yield Span(start, torch.tensor([size]), size, decoder.frequencies, dtype, device)


class _GroupFit:
    """Fits one mixer: the KV groups of a layer that share a window and a far memory."""

    def __init__(
        self, original: Decoder, config: ModelConfig, part: WindowMixer, half_life_tokens: float
    ) -> None:
        self.original, self.part = original, part
        self.groups, self.rep = list(part.groups), config.heads_per_group
        mixer = build_mixer(config, part)
        assert isinstance(mixer, FarSoftmax)
        self.mixer = mixer.to(original.embedding.device)
        self.mixer.log2_half_life.data.fill_(math.log2(half_life_tokens))
        self.mixer.beta.data.zero_()
        self.heads = [g * self.rep + r for g in self.groups for r in range(self.rep)]

    def run(
        self, index: int, searched: list[Heads], checked: list[Heads]
    ) -> tuple[FarSoftmax, list[HeadFit]]:
        """The fitted mixer and one entry a head."""
        known = [self._mine(x) for x in searched]
        self._cluster(known)
        if self.mixer.kept_tokens:
            self._weigh(known)
        curve = torch.stack([self._curves(x) for x in known]).mean(0)
        control = torch.stack([self._curves(self._mine(x)) for x in checked]).mean(0)
        fits = []
        for h, head in enumerate(self.heads):
            fit = _choose(curve[h], control[h], index, head)
            self.mixer.beta.data[h] = fit.beta
            fits.append(fit)
        return self.mixer, fits

    def _mine(self, x: Heads) -> Heads:
        """The heads and groups that this mixer serves, float32."""
        return Heads(
            x.q[:, :, self.heads].float(),
            x.k[:, :, self.groups].float(),
            x.v[:, :, self.groups].float(),
            x.out[:, :, self.heads].float(),
        )

    def _cluster(self, known: list[Heads]) -> None:
        """Prototypes of each group, as the mixer's weights."""
        window = self.part.window_tokens
        distances = torch.linspace(window, 4 * window, FAR_DISTANCES).round().long()
        cos, sin = rotary_tables(distances[None], self.original.frequencies)
        cos, sin = cos[0].mean(0), sin[0].mean(0)
        scale = self.mixer.key_weight.shape[-1] ** -0.5
        for n in range(len(self.groups)):
            mine = slice(n * self.rep, (n + 1) * self.rep)
            queries = torch.cat([x.q[0, :, mine].flatten(0, 1) for x in known])
            queries = _turn(queries, cos, sin) * scale
            keys = torch.cat([x.k[0, self.part.sink_tokens :, n] for x in known])
            metric = queries.T @ queries / len(queries)
            mean = metric.diagonal().mean()  # 0 of heads without queries, as pruning leaves them
            metric.diagonal().add_(1e-4 * torch.where(mean > 0, mean, 1.0))
            root = torch.linalg.cholesky(metric)
            centres = _k_means(keys @ root, self.mixer.key_weight.shape[1])
            self.mixer.key_weight.data[n] = centres @ root.T
            self.mixer.key_bias.data[n] = -centres.square().sum(-1) / 2
            prototypes = torch.linalg.solve_triangular(root, centres, upper=False, left=False)
            self.mixer.query_weight.data[mine] = _turn(prototypes, cos, -sin) * scale

    def _weigh(self, known: list[Heads]) -> None:
        """What a key of each group is worth, and how fast that halves."""
        seen = [x.far_attention(self.original, self.part) for x in known]
        for n in range(len(self.groups)):
            weight, half_life = fit_worth(seen, n, self.mixer.kept_tokens)
            self.mixer.keep_weight.data[n] = weight
            self.mixer.keep_log2_half_life.data[n] = math.log2(half_life)

    def _curves(self, x: Heads) -> Tensor:
        """Of one context: mean squared error, share and output square for every beta.

        (H, 1 + betas, 3); the first beta is shut.
        """
        T, H = x.q.shape[1:3]
        state = self.mixer.init_state(1, len(self.groups), x.q.shape[-1], x.q)
        total = torch.zeros(H, 1 + len(BETAS), 3)
        for span in _spans(self.original, T, PREFILL_CHUNK_TOKENS, x.q.dtype):
            assert span.offset is not None
            q, k, v, target = (part[:, span.offset : span.end] for part in (x.q, x.k, x.v, x.out))
            memory = state.memory.memory
            (near, near_mass), leaving, state = self.mixer.seen(q, k, v, span, state)
            far, mass, state.memory.memory = self.mixer.recall(q, leaving, span, memory)
            total[..., :2] += _sums(target - near, far - near, mass - near_mass).cpu()
        total[..., 2] = x.out.square().sum((0, 1, 3)).cpu()[:, None] / T
        total[..., :2] /= T
        return total


def _sums(miss: Tensor, step: Tensor, log_odds: Tensor) -> Tensor:
    """Squared errors and shares, summed over tokens, for shut and every beta: (H, 1 + betas, 2).

    Args:
        miss: What the window's output lacks (1, T, H, K).
        step: From the window's output to the memory's, likewise.
        log_odds: Of the memory against the window at beta 0 (1, T, H).
    """
    shut = torch.full((1,), -torch.inf)
    betas = torch.cat((shut, BETAS)).to(log_odds.device)
    share = torch.sigmoid(log_odds[0, :, :, None] + betas)  # T H betas
    mixed = (miss * step).sum(-1)[0, :, :, None]
    length = step.square().sum(-1)[0, :, :, None]
    error = miss.square().sum(-1)[0, :, :, None] - 2 * share * mixed + share.square() * length
    return torch.stack((error.sum(0), share.sum(0)), -1)


def _choose(searched: Tensor, checked: Tensor, layer: int, head: int) -> HeadFit:
    """The best beta on the text searched, if better than shut on the other."""
    beta = int(searched[:, 0].argmin())
    if checked[beta, 0] >= checked[0, 0]:
        beta = 0
    error, share, power = (float(x) for x in checked[beta])
    power = power or 1.0  # a head without values has nothing to miss
    return HeadFit(
        layer=layer,
        head=head,
        beta=float(BETAS[beta - 1]) if beta else -math.inf,
        error_shut=float(checked[0, 0]) / power,
        error=max(error, 0.0) / power,  # rounding may go below zero
        share=share,
    )


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of (..., K) times one matrix each, which need not be a rotation."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _k_means(x: Tensor, clusters: int) -> Tensor:
    """Centres (clusters, K) of points (N, K), by Lloyd's steps from random points."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    centres = x[order[torch.arange(clusters) % len(x)]].clone()
    for _ in range(CLUSTER_STEPS):
        nearest = (x @ centres.T - centres.square().sum(-1) / 2).argmax(-1)
        count = torch.bincount(nearest, minlength=clusters)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return centres
