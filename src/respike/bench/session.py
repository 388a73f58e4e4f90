"""The measuring itself: who runs when, how often, and when to stop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from respike.bench.contenders import Contender
from respike.bench.fits import predicted_seconds
from respike.bench.process import ChildError, Outcome, TooSlowError, run_child
from respike.bench.prompts import Prompts
from respike.bench.results import Results
from respike.errors import UsageError

ONCE_ABOVE_SECONDS = 600.0
"""A point that takes longer is measured once."""
BEATEN_BY = 1.5
"""A setting of a peer that is slower than this times the best at both prefill and decode is not
tried at longer lengths."""

Report = Callable[[int, int, str], object]
"""Called with (tokens done, tokens in all, what runs)."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        lengths: Of the prompts, in tokens.
        repeats: Of each point.
        decode_tokens: Timed decoding steps after each prompt.
        threads: Of everyone.
        max_seconds: Of a point; a longer one is not made, or ended.
    """

    lengths: tuple[int, ...]
    repeats: int
    decode_tokens: int
    threads: int
    max_seconds: float


def parse_lengths(text: str) -> tuple[int, ...]:
    """Such as ``1k,64k,1M``: k is 1,024 tokens and M 1,048,576; ascending, each once.

    Raises:
        UsageError: Not a list of lengths.
    """
    found = []
    for part in text.split(","):
        digits, unit = part.strip(), 1
        if digits[-1:] in ("k", "K", "m", "M"):
            unit = 1024 if digits[-1] in "kK" else 1 << 20
            digits = digits[:-1]
        if not digits.isascii() or not digits.isdigit() or not 2 <= int(digits) * unit <= 1 << 24:
            raise UsageError(f"length {part.strip()!r}: expected 2 to 16M tokens, such as 512, 8k")
        found.append(int(digits) * unit)
    return tuple(sorted(set(found)))


class Session:
    """Everyone at every length, in turn.

    Args:
        contenders: Who is measured.
        settings: How.
        results: Where points go; those already there are not made again.
        prompts: What is read.
        folder: For prompts on their way to a process.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        settings: Settings,
        results: Results,
        prompts: Prompts,
        folder: Path,
    ) -> None:
        self.contenders, self.settings, self.results = contenders, settings, results
        self.prompts, self.folder = prompts, folder
        self.skipped: list[dict[str, Any]] = []
        self.beaten: set[str] = set()
        """Settings that were given up because another of the same peer is faster."""

    def run(self, report: Report) -> None:
        """Measure; ``self.skipped`` then says what was not, and why."""
        settings = self.settings
        total = sum(settings.lengths) * settings.repeats * len(self.contenders)
        done = 0
        for length in settings.lengths:
            reasons = {c.name: self._obstacle(c, length) for c in self.contenders}
            for repeat in range(settings.repeats):
                turn = repeat % max(1, len(self.contenders))
                for contender in [*self.contenders[turn:], *self.contenders[:turn]]:
                    report(done, total, f"{contender.name}, {length:,} tokens, {repeat + 1}")
                    if reasons[contender.name] is None and self._wanted(contender, length, repeat):
                        reasons[contender.name] = self._point(contender, length, repeat)
                    done += length
            for name, reason in reasons.items():
                if reason is not None:
                    self.skipped.append({"contender": name, "length": length, "reason": reason})
        report(total, total, "")

    def _wanted(self, contender: Contender, length: int, repeat: int) -> bool:
        """Not there yet, and not so slow that once is enough."""
        mine = [p for p in self._good(contender.name) if p["length"] == length]
        slow = any(seconds_of(p) > ONCE_ABOVE_SECONDS for p in mine)
        return not slow and all(p["repeat"] != repeat for p in mine)

    def _point(self, contender: Contender, length: int, repeat: int) -> str | None:
        """One measurement; returns why there is none."""
        settings = self.settings
        file = self.prompts.write(self.folder / "prompt", length, repeat)
        job = {
            **contender.job,
            "task": "measure",
            "tokens_file": str(file),
            "decode_tokens": settings.decode_tokens,
        }
        point: dict[str, Any] = {"contender": contender.name, "length": length, "repeat": repeat}
        reason = None
        try:
            outcome = run_child(
                contender.module,
                job,
                python=contender.python,
                threads=settings.threads,
                max_seconds=settings.max_seconds,
            )
            point |= facts_of(outcome)
        except ChildError as error:
            reason = str(error)
            point |= {"error": reason, "max_seconds": None}
            if isinstance(error, TooSlowError):
                point["max_seconds"] = settings.max_seconds
        self.results.add(point)
        return reason

    def _good(self, name: str) -> list[dict[str, Any]]:
        return [p for p in self.results.points if p["contender"] == name and "error" not in p]

    def _obstacle(self, contender: Contender, length: int) -> str | None:
        """Why not even to try."""
        limit = self.settings.max_seconds
        good = self._good(contender.name)
        if any(p["length"] == length for p in good):
            return None
        for point in self.results.points:
            ended = point.get("max_seconds") or 0
            mine = point["contender"] == contender.name and point["length"] <= length
            if mine and ended >= limit:
                return f"more than {ended:.0f} s at {point['length']:,} tokens"
        expected = predicted_seconds(seconds_by_length(good), length, grows=contender.grows)
        if expected > limit:
            return f"would take about {expected:.0f} s, more than {limit:.0f} s"
        return self._beaten(contender, length)

    def _beaten(self, contender: Contender, length: int) -> str | None:
        """By another setting of the same peer on the same weights, at the last length of both."""
        mine = last_medians(self._good(contender.name), length)
        for other in self.contenders:
            if mine is None or other.group != contender.group or other is contender:
                continue
            theirs = last_medians(self._good(other.name), mine[0] + 1)
            if theirs is None or theirs[0] != mine[0]:
                continue
            if all(a > BEATEN_BY * b for a, b in zip(mine[1:], theirs[1:], strict=True)):
                self.beaten.add(contender.name)
                times = min(a / b for a, b in zip(mine[1:], theirs[1:], strict=True))
                return (
                    f"{times:.1f} times slower than {other.name} at prefill and decode of "
                    f"{mine[0]:,} tokens"
                )
        return None


def facts_of(outcome: Outcome) -> dict[str, Any]:
    """A point's figures."""
    return {
        **outcome.result,
        "base_rss_bytes": outcome.base_rss_bytes,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "facts": outcome.facts,
    }


def seconds_of(point: dict[str, Any]) -> float:
    """Of prefill and decode together."""
    return float(point["ttft_seconds"] + point["decode_seconds"])


def seconds_by_length(points: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(length, median seconds), ascending."""
    lengths = sorted({p["length"] for p in points})
    return [(n, median(seconds_of(p) for p in points if p["length"] == n)) for n in lengths]


def last_medians(points: Sequence[dict[str, Any]], below: int) -> tuple[int, float, float] | None:
    """(length, median seconds of prefill, of decode) at the longest length under ``below``."""
    length = max((p["length"] for p in points if p["length"] < below), default=None)
    if length is None:
        return None
    here = [p for p in points if p["length"] == length]
    prefill = median(p["ttft_seconds"] for p in here)
    return length, prefill, median(p["decode_seconds"] for p in here)
