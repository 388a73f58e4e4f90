"""Which weights are worth keeping: KL on held-out text, as long as recall has not suffered."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from respike.data import TextSource, TokenStore
from respike.errors import DataError
from respike.evaluation import Reference, recall
from respike.healing.config import Judging
from respike.material import Vocabulary
from respike.models.decoder import Decoder
from respike.models.silence import watch_firing
from respike.tasks import parse_task
from respike.tokenizer import Tokenizer

FIRST_BUCKET = 256


@dataclass(frozen=True)
class Verdict:
    """What was measured of some weights.

    Attributes:
        kl_nats: KL(original || weights) a token, from `FIRST_BUCKET` tokens on.
        kl_95: Its 95 % interval over contexts.
        nats_added: Of the text's own likelihood, likewise.
        recall_frac: Mean over tasks of the share that was right.
        answer_nats: Mean over tasks of the nats an answer token.
        tasks: By task: share right, nats an answer token.
        skipped_frac: Of a model that spikes: share of the weights behind neurons that was skipped.
    """

    kl_nats: float
    kl_95: Sequence[float]
    nats_added: float
    recall_frac: float
    answer_nats: float
    tasks: dict[str, Sequence[float]]
    skipped_frac: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the log: what it reads back as."""
        tasks = {name: list(score) for name, score in self.tasks.items()}
        return {**vars(self), "kl_95": list(self.kl_95), "tasks": tasks}


class Judge:
    """Measures weights on text and tasks that are not trained on.

    Args:
        teacher: The original, packed.
        store: Tokens of which a split is held out.
        tokenizer: Of the model.
        judging: How much is measured.
        heldout_frac: As for training.

    Raises:
        DataError: The held-out split is too small for one context.
    """

    def __init__(
        self,
        teacher: Decoder,
        store: TokenStore,
        tokenizer: Tokenizer,
        judging: Judging,
        heldout_frac: float,
    ) -> None:
        self.judging = judging
        self.vocabulary = Vocabulary(tokenizer)
        self.contexts = heldout_contexts(store, judging, heldout_frac)
        self.reference = Reference(teacher, self.contexts)

    def measure(
        self, decoder: Decoder, progress: Callable[[int, int], None] | None = None
    ) -> Verdict:
        """Measure a decoder that runs fast."""
        judging = self.judging
        found = self.reference.compare(decoder)
        bucket = found.bucket(
            min(FIRST_BUCKET, judging.context_tokens // 2), judging.context_tokens
        )
        tasks: dict[str, Sequence[float]] = {}
        for done, setting in enumerate(judging.recall, start=1):
            score = recall(
                decoder, self.vocabulary, parse_task(setting), trials=judging.trials, seed=1
            )
            tasks[setting] = (float(score.per_trial.mean()), score.answer_nats)
            if progress:
                progress(done, len(judging.recall))
        count = max(len(tasks), 1)
        return Verdict(
            kl_nats=bucket["kl_nats"],  # type: ignore[arg-type]
            kl_95=bucket["kl_nats_95"],  # type: ignore[arg-type]
            nats_added=bucket["nats_added"],  # type: ignore[arg-type]
            recall_frac=sum(right for right, _ in tasks.values()) / count,
            answer_nats=sum(nats for _, nats in tasks.values()) / count,
            tasks=tasks,
            skipped_frac=self._skipped_frac(decoder),
        )

    @torch.no_grad()
    def _skipped_frac(self, decoder: Decoder) -> float | None:
        """What neurons leave out on the first contexts."""
        if decoder.config.spikes is None:
            return None
        with watch_firing(decoder) as seen:
            for tokens in self.contexts[: self.judging.silence_contexts]:
                decoder.hidden(tokens[None].to(decoder.embedding.device))
        return 1 - float(seen.touched_frac())


def heldout_contexts(store: TokenStore, judging: Judging, heldout_frac: float) -> Tensor:
    """Contexts (N, T) of held-out documents that are long enough, in the order of their hashes."""
    too_little = DataError(
        f"{store.folder}: no held-out document has {judging.context_tokens} tokens",
        hint="give more data, raise heldout_frac, or lower judge.context_tokens",
    )
    try:
        source = TextSource("heldout", store, split="heldout", heldout_frac=heldout_frac)
    except DataError:
        raise too_little from None
    rows = []
    for number in range(source.epoch_samples or 0):
        tokens = source.draw(number).tokens
        if len(tokens) >= judging.context_tokens:
            rows.append(torch.from_numpy(tokens[: judging.context_tokens]))
        if len(rows) == judging.contexts:
            break
    if not rows:
        raise too_little
    return torch.stack(rows)


def is_better(new: Verdict, best: Verdict | None, start: Verdict, judging: Judging) -> bool:
    """Whether weights are to be kept instead of the best so far.

    Recall may not have suffered. Among those of a spiking model that skip what is asked the nearest
    to the original is kept. A louder one is always nearer, so as long as none skips that much, the
    most silent one is.
    """
    if (
        not math.isfinite(new.kl_nats)
        or new.recall_frac < start.recall_frac - judging.recall_slack_frac
    ):
        return False
    if best is None:
        return True
    if new.skipped_frac is not None and best.skipped_frac is not None:
        goal = judging.silent_frac
        if min(new.skipped_frac, best.skipped_frac) < goal:
            return new.skipped_frac > best.skipped_frac
    return new.kl_nats < best.kl_nats
