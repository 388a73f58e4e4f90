"""A decoder on packed rows: linear layers on all tokens at once, mixers document by document.

Each document, or the piece of one that a row holds, is a sequence of its own: nothing is seen and
nothing remembered across a border. No mask of a whole row is ever made. Learned sinks stand before
every document that begins in the batch, and so get gradients from all of them.

Letters: B rows, T tokens of a row, N positions of all: B * T, and the learned sinks; D model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from respike.data import Batch
from respike.layers.attention import Attention
from respike.layers.softmax import WindowSoftmax
from respike.layers.span import Span
from respike.layers.state import MixerState
from respike.models.decoder import Decoder, Mix
from respike.models.state import DecoderState


@dataclass(frozen=True)
class Segment:
    """Tokens of one document in one row.

    Attributes:
        row: Of the batch.
        begin: First token in the row.
        end: Behind the last one.
        goes_on: The document began in an earlier batch.
    """

    row: int
    begin: int
    end: int
    goes_on: bool


def segments(batch: Batch) -> list[Segment]:
    """The documents of a batch, row by row; padding belongs to none."""
    found = []
    for row, documents in enumerate(batch.documents.tolist()):
        begin = 0
        while begin < len(documents) and documents[begin]:
            end = begin
            while end < len(documents) and documents[end] == documents[begin]:
                end += 1
            found.append(Segment(row, begin, end, begin == 0 and bool(batch.continues[row])))
            begin = end
    return found


@dataclass
class Lanes:
    """What each row of a stream of batches remembers, where states are carried.

    Attributes:
        states: By row.
        first: Row of the whole batch that is row 0 of the one at hand.
    """

    states: dict[int, DecoderState]
    first: int = 0

    def at(self, first: int) -> "Lanes":
        """The same for a micro-batch that begins at a row."""
        return Lanes(self.states, first)

    def before(self, decoder: Decoder, part: Segment) -> DecoderState:
        """The state a segment starts from."""
        row = self.first + part.row
        if part.goes_on and row in self.states:
            return self.states[row]
        return decoder.init_state(1)

    def leave(self, part: Segment, row_tokens: int, state: DecoderState) -> None:
        """Remember the state behind a segment if it is its row's last."""
        if part.end == row_tokens:
            self.states[self.first + part.row] = state
        else:
            self.states.pop(self.first + part.row, None)


class Packed:
    """One batch, cut into segments, ready to go through a decoder layer by layer.

    Args:
        decoder: Which will run it.
        tokens: Ids (B, T).
        parts: From `segments`.
        lanes: States to start from and to leave behind; None starts every segment afresh.
    """

    def __init__(
        self, decoder: Decoder, tokens: Tensor, parts: Sequence[Segment], lanes: Lanes | None
    ) -> None:
        self.decoder, self.tokens, self.parts, self.lanes = decoder, tokens, parts, lanes
        self.states: list[DecoderState] | None = None
        if lanes is not None:
            self.states = [lanes.before(decoder, part) for part in parts]
        spans: dict[tuple[int, int], Span] = {}
        self.spans: list[Span] = []
        self.slices: list[slice] = []
        """Of every segment, its learned sinks included, among all positions."""
        sinks, width, added = decoder.config.learned_sinks, tokens.shape[1], 0
        for n, part in enumerate(parts):
            start = 0 if self.states is None else int(self.states[n].tokens_seen[0])
            before = 0 if start else sinks
            key = (start, before + part.end - part.begin)
            if key not in spans:
                like = decoder.embedding
                spans[key] = Span(
                    torch.tensor([start]), torch.tensor([key[1]]), key[1], decoder.frequencies,
                    like.dtype, like.device, sinks,
                )  # fmt: skip
            self.spans.append(spans[key])
            begin = part.row * width + part.begin + added
            self.slices.append(slice(begin, begin + key[1]))
            added += before

    def embedded(self) -> tuple[Tensor, Tensor | None]:
        """Inputs of the first layer (1, N, D), and which positions are tokens; None: all."""
        model = self.decoder.model
        x: Tensor = model.embed_tokens(self.tokens.to(self.decoder.embedding.device)).flatten(0, 1)
        pieces, is_token, place = [], [], 0
        for part, where in zip(self.parts, self.slices, strict=True):
            sinks = where.stop - where.start - (part.end - part.begin)
            if sinks:
                begin = part.row * self.tokens.shape[1] + part.begin
                pieces += [x[place:begin], model.learned_sinks]
                is_token += [torch.ones(begin - place), torch.zeros(sinks)]
                place = begin
        if not pieces:
            return x[None], None
        is_token.append(torch.ones(len(x) - place))
        return torch.cat((*pieces, x[place:]))[None], torch.cat(is_token).bool().to(x.device)

    def hidden(self, *, recompute: bool = False) -> Tensor:
        """What `Decoder.head` turns into logits, (B, T, D).

        Args:
            recompute: The backward pass computes each layer again, so that only what goes into the
                layers is held. Not with states that are carried, which the first pass uses up.
        """
        x, is_token = self.embedded()
        after: list[list[tuple[MixerState, ...]]] = [[] for _ in self.parts]
        for index, layer in enumerate(self.decoder.layers):
            mix = self.mix(index, None if self.lanes is None else after)
            if recompute:
                x = checkpoint(layer.forward_with, x, mix, use_reentrant=False)
            else:
                x = layer.forward_with(x, mix)
        if self.lanes is not None:
            for part, span, layers in zip(self.parts, self.spans, after, strict=True):
                state = DecoderState(tuple(layers), torch.tensor([span.end]))
                self.lanes.leave(part, self.tokens.shape[1], state)
        x = x[0] if is_token is None else x[0, is_token]
        return x.view(*self.tokens.shape, -1)

    def mix(self, index: int, after: list[list[tuple[MixerState, ...]]] | None = None) -> Mix:
        """What a layer's mixers do on all segments; zeros where there is padding.

        Args:
            index: Of the layer.
            after: Where the states after the layer are appended to, for each segment.
        """

        def run(attention: Attention, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            pieces, place = [], 0
            for n, (part, span) in enumerate(zip(self.slices, self.spans, strict=True)):
                pieces.append(qkv[0].new_zeros(1, part.start - place, *qkv[0].shape[2:]))
                state = (
                    attention.init_state(1, x)
                    if self.states is None
                    else self.states[n].layers[index]
                )
                q, k, v = (y[:, part] for y in qkv)
                out, state = attention.mix(x[:, part], (q, k, v), span, state)
                if after is not None:
                    after[n].append(state)
                pieces.append(out)
                place = part.stop
            pieces.append(qkv[0].new_zeros(1, x.shape[1] - place, *qkv[0].shape[2:]))
            return torch.cat(pieces, 1)

        return run


@torch.no_grad()
def teacher_hidden(
    teacher: Decoder, tokens: Tensor, parts: Sequence[Segment], lanes: Lanes | None
) -> Tensor:
    """`Packed.hidden` of a decoder that is not trained, by its engine: (B, T, D).

    A state it carries that is longer than it was trained for goes no further: zeros from there.
    """
    like = teacher.embedding
    out = like.new_zeros(*tokens.shape, like.shape[1])
    for part in parts:
        state = None if lanes is None else lanes.before(teacher, part)
        if state and int(state.tokens_seen[0]) >= teacher.config.max_position_embeddings:
            continue
        piece = tokens[part.row : part.row + 1, part.begin : part.end].to(like.device)
        hidden, state = teacher.hidden(piece, state)
        out[part.row, part.begin : part.end] = hidden[0]
        if lanes is not None:
            lanes.leave(part, tokens.shape[1], state)
    return out


@contextmanager
def short_windows(decoder: Decoder, layers: set[int], window_tokens: int) -> Iterator[None]:
    """While the block runs, windows beside a memory are short in some layers.

    A softmax whose memory has projections of its own is left out there, as its makers do.

    Args:
        decoder: Its mixers are changed, and as they were afterwards.
        layers: Which of its layers.
        window_tokens: Length of the short windows.
    """
    before: list[tuple[WindowSoftmax, int]] = []
    besides = [b for b in (decoder.layers[i].beside for i in sorted(layers)) if b is not None]
    for index in layers:
        for mixer in decoder.layers[index].self_attn.mixers:
            window = getattr(mixer, "window", None)
            if isinstance(window, WindowSoftmax):
                before.append((window, window.window_tokens))
    try:
        for window, tokens in before:
            window.window_tokens = min(window_tokens, tokens)
        for beside in besides:
            beside.alone = True
        yield
    finally:
        for window, tokens in before:
            window.window_tokens = tokens
        for beside in besides:
            beside.alone = False
