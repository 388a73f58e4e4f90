"""Answers that fit a JSON schema: which tokens may come next, by llguidance."""

import json
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from respike.errors import BackendError, UsageError
from respike.tokenizer import Tokenizer


class Grammars:
    """Makes grammars for one vocabulary.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _vocabulary(self) -> Any:
        from llguidance import LLTokenizer

        ends = list(self._tokenizer.eos_token_ids)
        if not ends:
            raise BackendError("this model has no end token, so no schema can end its answers")
        return LLTokenizer(self._tokenizer.definition, eos_token=ends)

    def of_schema(self, schema: dict[str, Any]) -> "Grammar":
        """Text that is JSON and fits ``schema``.

        Raises:
            UsageError: The schema is none, or has what llguidance does not know.
        """
        from llguidance import LLMatcher

        try:
            rules = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            matcher = LLMatcher(self._vocabulary, rules, log_level=0)
        except ValueError as error:
            raise UsageError(f"JSON schema: {' '.join(str(error).split())[:300]}") from None
        if matcher.is_error():
            raise UsageError(f"JSON schema: {' '.join(matcher.get_error().split())[:300]}")
        return Grammar(matcher)


class Grammar:
    """Where in a grammar an answer is."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> "Grammar":
        """An independent one at the same place."""
        return Grammar(self._matcher.deep_copy())

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,) with -inf where a token may not come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        mask = torch.zeros(len(logits), dtype=torch.bool)
        count = min(len(mask), len(allowed))
        mask[:count] = allowed[:count]
        return logits.float().masked_fill(~mask, -torch.inf)

    def take(self, token: int) -> None:
        """Go on by a token that `mask` allowed."""
        self._matcher.consume_token(token)
