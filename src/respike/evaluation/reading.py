"""Reading texts and answering questions about them; what texts begin with alike is read once."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from respike.evaluation.distance import BATCH_TOKENS, HEAD_TOKENS
from respike.material import Trial
from respike.models.decoder import PREFILL_CHUNK_TOKENS, Decoder
from respike.models.state import DecoderState

Answered = tuple[Tensor, Tensor]
"""Of one question: which of its answer tokens came out first (bool), and their nats."""


def read_answers(decoder: Decoder, texts: Sequence[Sequence[Trial]]) -> Iterator[Answered]:
    """Answer every question of every text, in order.

    The questions about a text continue the same state, each on its own. Texts longer than
    ``BATCH_TOKENS / 2`` are read one by one, what all of them begin with alike only once.

    Args:
        decoder: The model.
        texts: The questions about each text: trials that begin alike, equally many a text.
    """
    every = [trial for text in texts for trial in text]
    size = max(1, BATCH_TOKENS // max(len(trial.tokens) for trial in every))
    state, begin = None, 0
    if size == 1 and len(texts) > 1:
        # Whole chunks, so that the numbers are those of a text read in one go.
        begin = common_beginning(every) // PREFILL_CHUNK_TOKENS * PREFILL_CHUNK_TOKENS
        if begin:
            state = _read(decoder, [every[0].tokens[:begin]], None)
    with torch.inference_mode():
        for number in range(0, len(texts), size):
            last = number + size >= len(texts)
            before = state if state is None or last else state.clone()
            yield from _of_texts(decoder, texts[number : number + size], before, begin)


def common_beginning(trials: Sequence[Trial]) -> int:
    """Tokens that all trials begin with and that stand before whatever predicts an answer."""
    end = min(min(trial.answers) for trial in trials) - 1
    first = trials[0].tokens
    for trial in trials[1:]:
        pairs = zip(first[:end], trial.tokens, strict=False)
        end = next((place for place, (a, b) in enumerate(pairs) if a != b), end)
    return end


def _of_texts(
    decoder: Decoder, texts: Sequence[Sequence[Trial]], state: DecoderState | None, begin: int
) -> list[Answered]:
    """``state`` has read the first ``begin`` tokens of every text; consumed."""
    if len(texts[0]) == 1:
        return _answers(decoder, [text[0] for text in texts], state, [begin] * len(texts))
    ends = [common_beginning(text) for text in texts]
    shared = [text[0].tokens[begin:end] for text, end in zip(texts, ends, strict=True)]
    state = _read(decoder, shared, state)
    rounds = []
    for number, trials in enumerate(zip(*texts, strict=True), start=1):
        mine = state if number == len(texts[0]) else state.clone()
        rounds.append(_answers(decoder, trials, mine, ends))
    return [answer for text in zip(*rounds, strict=True) for answer in text]


def _padded(rows: Sequence[list[int]], decoder: Decoder) -> Tensor:
    longest = max(map(len, rows))
    filled = [row + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=decoder.embedding.device)


def _read(decoder: Decoder, rows: Sequence[list[int]], state: DecoderState | None) -> DecoderState:
    """The state after these tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    with torch.inference_mode():
        _, after = decoder(_padded(rows, decoder), state, lengths=lengths, logits="none")
    return cast(DecoderState, after)


def _answers(
    decoder: Decoder, trials: Sequence[Trial], state: DecoderState | None, begins: Sequence[int]
) -> list[Answered]:
    """One question a row, of which ``state`` has read the first ``begins`` tokens; consumed."""
    rows = [trial.tokens[begin:] for trial, begin in zip(trials, begins, strict=True)]
    # Padding stands behind everything that is asked for, so causality keeps it out.
    tokens = _padded(rows, decoder)
    hidden, _ = decoder.hidden(tokens) if state is None else decoder.hidden(tokens, state)
    results = []
    for row, (trial, begin) in enumerate(zip(trials, begins, strict=True)):
        hits, losses = [], []
        answers = torch.tensor(trial.answers, device=tokens.device) - begin
        # Logits of a long trial's answers, all at once, would be gigabytes.
        for index in torch.split(answers, HEAD_TOKENS):
            logits = decoder.head(hidden[row : row + 1, index - 1])[0].float()
            target = tokens[row, index]
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            hits.append(logits.argmax(-1) == target)
        results.append((torch.cat(hits).cpu(), torch.cat(losses).cpu()))
    return results
