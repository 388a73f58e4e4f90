"""From points to rows: medians and spreads, bandwidth, fits, ratios, the best of each peer."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from respike.bench.contenders import Contender
from respike.bench.fits import fit

Row = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def row_of(
    contender: Contender, points: Sequence[Mapping[str, Any]], decode_tokens: int, read: float
) -> Row:
    """One contender at one length.

    Args:
        contender: Who.
        points: Its measurements there.
        decode_tokens: Timed steps in each.
        read: What this machine reads, bytes a second.
    """
    length, facts = points[0]["length"], points[0]["facts"]
    state = max(p["state_bytes"] for p in points)
    if contender.cache_bytes is not None:
        state = round(contender.cache_bytes(length))
    weights = facts.get("step_weight_bytes")
    if weights is None:
        weights = round(facts["weight_bytes"] * (1 - contender.looked_up_frac))
    moved = weights + points[0].get("step_state_bytes", state) + facts.get("memory_bytes", 0)
    decode = spread([decode_tokens / p["decode_seconds"] for p in points])
    peaks = [p["peak_rss_bytes"] for p in points if p["peak_rss_bytes"] is not None]
    return {
        "contender": contender.name,
        "group": contender.group,
        "context_tokens": length,
        "n": len(points),
        "ttft_seconds": spread([p["ttft_seconds"] for p in points]),
        "prefill_tokens_per_second": spread([length / p["ttft_seconds"] for p in points]),
        "decode_tokens_per_second": decode,
        "weight_bytes": facts["weight_bytes"],
        "state_bytes": state,
        "peak_rss_bytes": max(peaks, default=None),
        "moved_bytes_per_token": moved,
        "moved_bytes_per_second": moved * decode["median"],
        "read_frac": moved * decode["median"] / read,
        "ideal_decode_tokens_per_second": read / moved,
    }


def fitted_rows(
    contender: Contender, rows: Sequence[Row], lengths: Sequence[int], read: float
) -> list[Row]:
    """Figures at lengths that were not measured, by fits to those that were.

    Args:
        contender: Who.
        rows: From `row_of`, of everyone.
        lengths: All that were asked for.
        read: What this machine reads, bytes a second.
    """
    mine = [row for row in rows if row["contender"] == contender.name]
    missing = sorted(set(lengths) - {row["context_tokens"] for row in mine})
    first = fit(_points(mine, "ttft_seconds"), 2 if contender.grows else 1)
    step = fit(
        [(n, 1000 / rate) for n, rate in _points(mine, "decode_tokens_per_second")],
        1,
    )
    moved = fit([(row["context_tokens"], float(row["moved_bytes_per_token"])) for row in mine], 1)
    if first is None or step is None or moved is None:
        return []
    found = []
    for length in missing:
        found.append(
            {
                "contender": contender.name,
                "group": contender.group,
                "context_tokens": length,
                "fitted": True,
                "ttft_seconds": first.at(length),
                "prefill_tokens_per_second": length / first.at(length),
                "decode_tokens_per_second": 1000 / step.at(length),
                "ideal_decode_tokens_per_second": read / moved.at(length),
                "fit_points": first.points,
                "fit_error_frac": max(first.largest_error_frac, step.largest_error_frac),
            }
        )
    return found


def _points(rows: Sequence[Row], key: str) -> list[tuple[int, float]]:
    return [(row["context_tokens"], row[key]["median"]) for row in rows]


def ratios(rows: Sequence[Row], fitted: Sequence[Row]) -> list[Row]:
    """How many times faster ours is at each length: than the original, than each peer's best.

    A peer's best is chosen for prefill and for decode separately. Its ideal is the speed at which
    its weights and cache could be read.
    """
    found = []
    everyone = [*rows, *fitted]
    for mine in (row for row in everyone if row["group"] == "ours"):
        length = mine["context_tokens"]
        others = [r for r in everyone if r["context_tokens"] == length and r["group"] != "ours"]
        for group in dict.fromkeys(r["group"] for r in others):
            part = [r for r in others if r["group"] == group]
            first = min(part, key=lambda r: middle(r["ttft_seconds"]))
            step = max(part, key=lambda r: middle(r["decode_tokens_per_second"]))
            ideal = max(r["ideal_decode_tokens_per_second"] for r in part)
            rate = middle(mine["decode_tokens_per_second"])
            found.append(
                {
                    "group": group,
                    "context_tokens": length,
                    "ttft_times": middle(first["ttft_seconds"]) / middle(mine["ttft_seconds"]),
                    "ttft_best": first["contender"],
                    "ttft_fitted": bool(first.get("fitted")),
                    "decode_times": rate / middle(step["decode_tokens_per_second"]),
                    "decode_best": step["contender"],
                    "decode_fitted": bool(step.get("fitted")),
                    "ours_fitted": bool(mine.get("fitted")),
                    "decode_times_of_ideal": rate / ideal,
                }
            )
    return found


def middle(figure: Any) -> float:
    """The median of a measured figure, or the fitted one."""
    return float(figure["median"] if isinstance(figure, Mapping) else figure)
