"""An answer that is held back until it is known whether the document holds it."""

from dataclasses import dataclass, field
from typing import Any

from respike.documents.judging import JUDGED_TOKENS, Least, Verdict, judge, score
from respike.loading import Model
from respike.models.state import DecoderState


@dataclass
class Judged:
    """One answer; see `respike.documents.judging`.

    Attributes:
        least: What it must reach.
        prompt: What would stand before it without the document.
        state: After all of ``prompt`` but its last token; whoever reads the prompt fills it in.
        verdict: When it was judged.
        withheld: What would have been said, if it was not found.
    """

    least: Least
    prompt: list[int]
    state: DecoderState | None = None
    verdict: Verdict | None = None
    withheld: str = ""
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)

    def take(self, token: int, logprob: float) -> bool:
        """The next token and its log-probability, with the document; whether these are enough."""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        return len(self._tokens) >= JUDGED_TOKENS

    def judge(self, model: Model) -> Verdict:
        """Judge what was taken; uses up the state."""
        without: list[float] = []
        if self._tokens:
            assert self.state is not None
            without = score(model, self.prompt[-1:], self._tokens, self.state)
        self.state = None
        self.verdict = judge(self.least, self._logprobs, without)
        return self.verdict

    def facts(self) -> dict[str, Any]:
        """As a client is told; ``found`` is null while it was not judged."""
        told = self.verdict
        return {
            "found": told and told.found,
            "evidence": told and told.evidence,
            "confidence": told and told.confidence,
            "least": vars(self.least),
            "withheld": self.withheld,
        }
