"""Models of respike for lm-evaluation-harness (extra ``eval-harness``), registered as ``respike``.

Import this module before the harness looks the name up; `benchmarks/harness.py` does. Answers to
one prompt continue the same state, so that a question with many choices is read once.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from respike.device import set_threads
from respike.errors import UsageError
from respike.evaluation.distance import BATCH_TOKENS
from respike.evaluation.reading import read_answers
from respike.loading import Model, load
from respike.material import Trial

MAX_NEW_TOKENS = 256
"""Written where a task does not say how much."""
KNOWN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature"}
"""Keywords of `generate_until`; all else would be left undone in silence."""


@register_model("respike")
class HarnessModel(TemplateLM):  # type: ignore[misc] # the harness ships no types
    """A model folder or GGUF file, run by respike.

    Args:
        path: Of the model.
        dtype: f32, bf16 or f16; None takes the checkpoint's own.
        weights: stored, int8 or int4.
        threads: Of the processor; None takes all.
        max_length: Tokens that are read, the last of a longer text; None takes as many as the
            source was trained for.
        batch_size, device: Given by the harness; only ``cpu`` is known, batches go by tokens.

    Raises:
        UsageError: Another device.
    """

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        weights: str = "stored",
        threads: int | None = None,
        max_length: int | None = None,
        batch_size: object = None,
        device: str | None = None,
        **refused: object,
    ) -> None:
        super().__init__()
        del batch_size
        refused = {name: value for name, value in refused.items() if value is not None}
        if device not in (None, "cpu") or refused:
            raise UsageError(
                f"harness model: {refused or f'device {device!r}'}; expected path, dtype, weights, "
                "threads, max_length, and no device but cpu"
            )
        set_threads(threads)
        self.model: Model = load(path, dtype=dtype, weights=weights)
        self.max_length = max_length or self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self._ends[0])

    @property
    def _ends(self) -> list[int]:
        tokenizer, config = self.model.tokenizer, self.model.config
        return list(dict.fromkeys([*tokenizer.eos_token_ids, *config.eos_token_ids]))

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        bos = self.model.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return str(self.model.tokenizer.sha256)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Token ids; BOS as the model's own tokenizer has it, unless said."""
        return self.model.tokenizer.encode(string, bos=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """For each (name, context, continuation): its log-likelihood, and is it the greedy one."""
        texts: dict[tuple[int, ...], list[int]] = defaultdict(list)
        trials = []
        for number, (_name, context, continuation) in enumerate(requests):
            tokens = [*context, *continuation][-self.max_length :]
            begin = max(1, len(tokens) - len(continuation))
            trials.append(Trial(tokens, list(range(begin, len(tokens)))))
            texts[tuple(context)].append(number)
        alike: dict[int, list[list[int]]] = defaultdict(list)
        for numbers in texts.values():
            alike[len(numbers)].append(numbers)
        found: dict[int, tuple[float, bool]] = {}
        for groups in alike.values():
            groups.sort(key=lambda numbers: len(trials[numbers[0]].tokens), reverse=True)
            order = [number for numbers in groups for number in numbers]
            answers = read_answers(self.model.decoder, [[trials[n] for n in g] for g in groups])
            for number, (correct, nats) in zip(order, answers, strict=True):
                found[number] = -float(nats.sum()), bool(correct.all())
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of texts, in windows of ``max_length`` tokens that do not overlap."""
        del disable_tqdm
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id, self.max_length - 1, 1,
            )  # fmt: skip
            pairs = [("", *make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to a stop string, which is not part of it; prompts alike in batches."""
        del disable_tqdm
        wanted: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        prompts = []
        for number, request in enumerate(requests):
            prompt, options = request.args
            count, stops = _greedy_options(options)
            tokens = self.tok_encode(prompt) or [self.prefix_token_id]
            prompts.append(tokens[-max(1, self.max_length - count) :])
            wanted[count, stops].append(number)
        written: dict[int, str] = {}
        for (count, stops), numbers in wanted.items():
            numbers.sort(key=lambda number: len(prompts[number]), reverse=True)
            size = max(1, BATCH_TOKENS // (len(prompts[numbers[0]]) + count))
            for begin in range(0, len(numbers), size):
                batch = numbers[begin : begin + size]
                made = self._write([prompts[number] for number in batch], count, stops)
                written.update(zip(batch, made, strict=True))
        return [written[number] for number in range(len(requests))]

    def _write(self, prompts: Sequence[list[int]], count: int, stops: Sequence[str]) -> list[str]:
        decoder, tokenizer = self.model.decoder, self.model.tokenizer
        longest = max(map(len, prompts))
        tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        lengths: Tensor | None = torch.tensor([len(prompt) for prompt in prompts])
        made: list[list[int]] = [[] for _ in prompts]
        texts: list[str | None] = [None] * len(prompts)
        state = None
        with torch.inference_mode():
            for _ in range(count):
                logits, state = decoder(
                    tokens.to(decoder.embedding.device), state, lengths=lengths, logits="last"
                )
                tokens, lengths = logits[:, 0].float().argmax(-1, keepdim=True).cpu(), None
                for row, token in enumerate(tokens[:, 0].tolist()):
                    if texts[row] is None:
                        ended = token in self._ends
                        made[row] += [] if ended else [token]
                        text, stopped = _before_stop(tokenizer.decode(made[row]), stops)
                        texts[row] = text if ended or stopped else None
                if None not in texts:
                    break
        return [
            tokenizer.decode(row) if text is None else text
            for row, text in zip(made, texts, strict=True)
        ]


def _greedy_options(options: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """(tokens to write, stop strings) of a request.

    Raises:
        UsageError: It asks for what is not greedy, or for something unknown.
    """
    unknown = sorted(set(options) - KNOWN)
    if unknown or options.get("do_sample") or options.get("temperature", 0) > 0:
        raise UsageError(
            f"harness task asks to generate with {options}: greedy only, and {', '.join(KNOWN)}"
        )
    until = options.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    count = options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS
    return int(count), stops


def _before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """``text`` up to the first stop string, and whether there was one."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
