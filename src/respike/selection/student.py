"""The model that selection tries groups on, and what it is measured by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from respike.config import ModelConfig
from respike.errors import UsageError
from respike.layers.far import FarSoftmax
from respike.layers.mixer import Mixer
from respike.layers.softmax import FullSoftmax
from respike.layers.span import Span
from respike.material import Trial
from respike.models.decoder import PREFILL_CHUNK_TOKENS, Decoder
from respike.models.state import DecoderState

Group = tuple[int, int]
"""(layer, KV group)."""


def check_original(config: ModelConfig) -> None:
    """Refuse a model whose attention is not what it was trained with.

    Raises:
        UsageError: It has windows or memories, or sinks.
    """
    total = config.num_hidden_layers * config.num_key_value_heads
    memories = any(getattr(part, "memory", None) for _, part in config.mixers())
    if len(config.softmax_groups()) < total or memories or config.learned_sinks:
        raise UsageError(
            f"the model has full softmax in {len(config.softmax_groups())} of its {total} KV "
            "groups, or memories or sinks beside it, and would be measured as what it is not",
            hint="run `respike select` on the original",
        )


class Probe:
    """Hidden states in, one number out; the lower the better."""

    def __init__(self, decoder: Decoder, tokens: Tensor, positions: Tensor) -> None:
        self.decoder, self.tokens, self.positions = decoder, tokens, positions

    def value(self, hidden: Tensor) -> float:
        """Mean over sequences and positions."""
        values = [
            self.one(row, hidden[row : row + 1, self.positions]) for row in range(len(hidden))
        ]
        return float(torch.stack(values).mean())

    def one(self, row: int, hidden: Tensor) -> Tensor:
        """Of one sequence's hidden states (1, positions, D), a scalar."""
        raise NotImplementedError


class TextProbe(Probe):
    """KL to the original beyond the window."""

    def __init__(self, decoder: Decoder, tokens: Tensor, positions: Tensor) -> None:
        super().__init__(decoder, tokens, positions)
        self.reference: list[Tensor] = []

    def remember(self, hidden: Tensor) -> None:
        """Take the original's hidden states as the reference."""
        self.reference = [
            self.decoder.head(row[None, self.positions])[0].float().log_softmax(-1)
            for row in hidden
        ]

    def one(self, row: int, hidden: Tensor) -> Tensor:
        """See `Probe.one`."""
        log_q = self.decoder.head(hidden)[0].float().log_softmax(-1)
        log_p = self.reference[row]
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


class RecallProbe(Probe):
    """Nats per answer token of a recall task; its answers stand at equal places in all trials."""

    def __init__(self, decoder: Decoder, trials: Sequence[Trial]) -> None:
        device = decoder.embedding.device
        # Every second answer of a long one: neighbours say the same.
        answers = trials[0].answers[:: 1 + (len(trials[0].answers) > 16)]
        super().__init__(
            decoder,
            torch.tensor([t.tokens for t in trials], device=device),
            torch.tensor(answers, device=device) - 1,
        )

    def one(self, row: int, hidden: Tensor) -> Tensor:
        """See `Probe.one`."""
        logits = self.decoder.head(hidden)[0].float()
        target = self.tokens[row, self.positions + 1]
        return torch.nn.functional.cross_entropy(logits, target)


class Student:
    """The decoder with some groups full, all others as ``rest``; measures with shared prefixes."""

    def __init__(self, decoder: Decoder, rest: Sequence[Mixer], probes: list[Probe]) -> None:
        self.decoder, self.rest, self.probes = decoder, rest, probes
        self.groups = range(decoder.config.num_key_value_heads)
        self.full: set[Group] = set()

    def arrange(self, full: set[Group]) -> None:
        """Make exactly ``full`` full and remember every layer's input."""
        self.full = full
        for layer in range(len(self.decoder.layers)):
            self._set(layer, full)
        self.inputs: list[tuple[list[Span], list[Tensor]]] = []
        for probe in self.probes:
            state = self.decoder.init_state(len(probe.tokens))
            spans = self._spans(state, probe.tokens.shape[1])
            x = self.decoder.model.embed_tokens(probe.tokens)
            trail = [x]
            for index in range(len(self.decoder.layers)):
                x = self._run(index, x, spans)
                trail.append(x)
            self.inputs.append((spans, trail))

    def _set(self, layer: int, full: set[Group]) -> None:
        kept = [g for g in self.groups if (layer, g) in full]
        rest = [g for g in self.groups if (layer, g) not in full]
        parts: list[tuple[list[int], Mixer]] = [(kept, FullSoftmax())] if kept else []
        if rest:
            mixer = self.rest[layer]
            some = mixer.of_groups(rest) if isinstance(mixer, FarSoftmax) else mixer
            parts.append((rest, some))
        self.decoder.layers[layer].self_attn.set_mixers(parts)

    def _spans(self, state: DecoderState, num_tokens: int) -> list[Span]:
        """The chunks a layer works through, as in a prefill: a window then costs what it sees."""
        spans = []
        for begin in range(0, num_tokens, PREFILL_CHUNK_TOKENS):
            size = min(PREFILL_CHUNK_TOKENS, num_tokens - begin)
            spans.append(self.decoder.span(state, size))
            state = DecoderState((), state.tokens_seen + size)
        return spans

    def _run(self, index: int, x: Tensor, spans: list[Span]) -> Tensor:
        layer = self.decoder.layers[index]
        state = layer.init_state(len(x), x)
        sizes = [s.num_tokens for s in spans]
        outputs = []
        for span, piece in zip(spans, torch.split(x, sizes, 1), strict=True):
            out, state = layer(piece, span, state)
            outputs.append(out)
        return torch.cat(outputs, 1)

    def values(self) -> list[float]:
        """Each probe's value as arranged."""
        return [p.value(trail[-1]) for p, (_, trail) in zip(self.probes, self.inputs, strict=True)]

    def values_with(self, group: Group, probes: list[int]) -> list[float]:
        """Values of some probes with one group switched; only layers from its own on are run."""
        layer = group[0]
        self._set(layer, self.full ^ {group})
        values = []
        for number in probes:
            spans, trail = self.inputs[number]
            x = trail[layer]
            for index in range(layer, len(self.decoder.layers)):
                x = self._run(index, x, spans)
            values.append(self.probes[number].value(x))
        self._set(layer, self.full)
        return values
