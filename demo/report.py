"""The report: results in, one HTML page out. A section is a function listed in `SECTIONS`."""

from collections.abc import Callable
from typing import Any

import page
from committed import Committed
from firing import spikes
from sections import (
    GOOD_FRAC,
    Results,
    far_back,
    frontier,
    layers,
    longer,
    memory,
    predictions,
    question,
    speed,
    untrained,
    what_changed,
    worth,
)

from respike.cli.show import human_bytes


def rows_of(results: Results, role: str) -> list[dict[str, Any]]:
    """Live timing rows of one model, ascending."""
    return [row for row in results["context"]["rows"] if row["model"] == role]


def at_length(results: Results, role: str, length: int) -> dict[str, Any] | None:
    """The live timing row of a model at one length."""
    return next((r for r in rows_of(results, role) if r["context_tokens"] == length), None)


def common_lengths(results: Results) -> list[int]:
    """Lengths at which both models were timed."""
    sets = [{r["context_tokens"] for r in rows_of(results, x)} for x in ("original", "converted")]
    return sorted(set.intersection(*sets))


def state_at(results: Results, role: str, tokens: int) -> int:
    """Computed bytes of state."""
    state = results["state"]
    return int(state["bytes"][role][state["tokens"].index(tokens)])


def telling_task(results: Results) -> dict[str, Any]:
    """The recall task that says most: the original can do it, and a window alone loses most."""
    rows = results["recall"]
    good = [r for r in rows if r["scores"]["original"]["accuracy_frac"] >= GOOD_FRAC]
    return max(good or rows, key=lambda r: r["scores"]["window"]["lost_frac"])


def summary_lines(results: Results) -> list[str]:
    """The lines that stand at the top of the report and at the end of the terminal."""
    beyond = {r: m["beyond"] for r, m in results["check"]["models"].items()}
    task = telling_task(results)
    found = {r: f"{s['accuracy_frac']:.2f}" for r, s in task["scores"].items()}
    million = {r: state_at(results, r, 1 << 20) for r in ("original", "converted")}
    window = results["convert"]["converted"]["window_tokens"]
    return [
        what_changed(results),
        f"Beyond the window (from {window} tokens on) predictions moved by KL "
        f"{beyond['converted']['kl_nats']:.3f} nats a token "
        f"{page.interval(beyond['converted']['kl_nats_95'], 3)}; with a window alone by "
        f"{beyond['window']['kl_nats']:.3f} {page.interval(beyond['window']['kl_nats_95'], 3)}.",
        f"Recall, {task['task']} ({task['trials']} trials): original {found['original']}, "
        f"converted {found['converted']}, window alone {found['window']}.",
        *memory_lines(results),
        f"State of one sequence at 1,048,576 tokens, computed: original "
        f"{human_bytes(million['original'])}, converted {human_bytes(million['converted'])} "
        f"({million['original'] / million['converted']:.1f}x less).",
        speed_line(results),
    ]


def memory_lines(results: Results) -> list[str]:
    """What the memory is worth, if there is one."""
    if not results["memory"]:
        return []
    rows = results["memory"]["rows"]
    said = "; ".join(
        f"{r['measure']} {r['on']:.{r['digits']}f} against {r['cut']:.{r['digits']}f}" for r in rows
    )
    return [f"The memory on, against the same model with it cut: {said}."]


def speed_line(results: Results) -> str:
    """Original against converted at the longest length where both were timed."""
    lengths = common_lengths(results)
    if not lengths:
        return "Time: this machine was too slow for a timed run; see the skipped points."
    a, b = (at_length(results, r, lengths[-1]) for r in ("original", "converted"))
    assert a is not None
    assert b is not None
    first = [row["ttft_seconds"]["median"] for row in (a, b)]
    decode = [row["decode_tokens_per_second"]["median"] for row in (a, b)]
    return (
        f"At {lengths[-1]:,} tokens: first token after {first[0]:.1f} s against {first[1]:.1f} s "
        f"({page.times(first[1], first[0])}), decode {decode[0]:.1f} against {decode[1]:.1f} "
        f"tokens/s ({page.times(decode[0], decode[1])})."
    )


# ---- sections --------------------------------------------------------------------------------


def glance(results: Results, _committed: Committed) -> str:
    """Every artefact on one row: what it costs beside what it gains."""
    length = results["check"]["context_tokens"]
    tasks = {r["task"]: r for r in (results["recall"][0], telling_task(results))}
    rows = []
    for role in ("original", "converted", "window"):
        check = results["check"]["models"].get(role)
        timed = at_length(results, role, length)
        rows.append((
            role,
            results["fingerprints"][role][:12],
            f"{check['beyond']['kl_nats']:.3f}" if check else "0 (itself)",
            *(f"{t['scores'][role]['accuracy_frac']:.2f}" for t in tasks.values()),
            human_bytes(state_at(results, role, length)),
            f"{timed['ttft_seconds']['median']:.2f}" if timed else "not timed",
            f"{timed['decode_tokens_per_second']['median']:.1f}" if timed else "not timed",
        ))  # fmt: skip
    header = (
        "model", "fingerprint", "KL beyond the window", *tasks, "state", "first token, s",
        "decode, tokens/s",
    )  # fmt: skip
    window = results["convert"]["converted"]["window_tokens"]
    return (
        page.listing(summary_lines(results), "short")
        + page.table(f"One artefact a row; state and times at {length:,} tokens", header, rows)
        + page.paragraph(
            f"Converted: the recipe {results['convert']['converted']['recipe']}. Window: a "
            f"strawman with the same window ({window} tokens) and sinks everywhere and nothing "
            "else: it shows what is lost when no KV group may look further back. A file stored in "
            "fewer bits is measured as it is dequantised: that is the original here.",
        )
    )


def done(results: Results, _committed: Committed) -> str:
    """Steps, commands, seconds."""
    parts = []
    for step in results["steps"]:
        parts.append(page.paragraph(f"{step['title']} ({step['seconds']:.1f} s)"))
        parts.append(page.commands(step["commands"]))
    return "".join(parts)


def limits(results: Results, _committed: Committed) -> str:
    """What got worse, and what this page does not show."""
    beyond = results["check"]["models"]["converted"]["beyond"]
    worse = [
        f"{row['task']} {row['scores']['original']['accuracy_frac']:.2f} to "
        f"{row['scores']['converted']['accuracy_frac']:.2f}"
        for row in results["recall"]
        if row["scores"]["converted"]["lost_frac"] > 0
    ]
    growth = results["convert"]["converted"]["growth_bytes_per_token"]
    grows = (
        f"Memory still grows, by {growth:,} bytes a token: the groups that keep softmax need it."
        if growth
        else "Memory does not grow at all, and neither does what can be found beyond the window."
    )
    check, trials = results["check"], results["recall"][0]["trials"]
    return page.listing([
        f"It lost {beyond['nats_added']:.4f} nats a token beyond the window "
        f"{page.interval(beyond['nats_added_95'], 4)} on this text.",
        f"Recall that fell: {'; '.join(worse)}." if worse else "No recall task fell here.",
        f"{untrained(results)} "
        + (
            "A memory blurs what it holds: it does not recall it word for word."
            if results["memory"]
            else "The groups that stream have no memory beyond window and sinks."
        ),
        grows,
        f"The original was trained for {results['original']['trained_tokens']:,} tokens. Quality "
        f"was measured up to {check['context_tokens']:,}; times at longer contexts are times only.",
        "Times are of one sequence at a time.",
        "This is a small model, where attention is a large share of the work: the gain in time "
        "shrinks as models grow.",
        f"Samples are small: {check['contexts']} contexts of {check['text']}, {trials} trials a "
        "task. Never judge by perplexity alone: compare the window's KL with what it finds.",
    ])  # fmt: skip


def origins(results: Results, _committed: Committed) -> str:
    """Machine, versions, fingerprints, date."""
    machine, versions = results["context"]["machine"], results["versions"]
    facts = {
        "date": results["date"],
        "command": results["command"],
        "commit": results["commit"],
        "processor": machine["processor"],
        "cores, threads": f"{machine['cores']}, {machine['threads']}",
        "features": " ".join(machine["cpu_features"]) or "unknown: no native extension",
        "native kernels": ", ".join(f"{k} {v}" for k, v in machine["kernels"].items()),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "dtype": ", ".join(f"{n} {f['dtype']}" for n, f in results["context"]["models"].items()),
    }
    prints = {f"fingerprint, {r}": f for r, f in results["fingerprints"].items()}
    return page.pairs(facts | prints)


Section = Callable[[Results, Committed], str]
SECTIONS: list[tuple[str, str, Section]] = [
    ("glance", "In short", glance),
    ("layers", "What was converted", layers),
    ("predictions", "How far the predictions moved", predictions),
    ("recall", "What is still found far back", far_back),
    ("worth", "The memory", worth),
    ("question", "The same question to each", question),
    ("spikes", "The same model as spikes", spikes),
    ("memory", "State against context", memory),
    ("speed", "Time and memory against context", speed),
    ("longer", "Longer contexts, from committed results", longer),
    ("frontier", "Quality against memory, from committed results", frontier),
    ("limits", "What this model lost, and the limits of this page", limits),
    ("done", "What was done", done),
    ("origin", "Where the figures come from", origins),
]


def render(results: Results, committed: Committed) -> str:
    """The page."""
    name = results["original"]["name"].removesuffix(".gguf")
    title = f"respike: {name} by the recipe {results['convert']['converted']['recipe']}"
    parts = [f"<h1>{page.escape(title)}</h1>"]
    for place, heading, make in SECTIONS:
        parts.append(
            f'<section id="{place}"><h2>{heading}</h2>{make(results, committed)}</section>'
        )
    return page.document(title, "\n".join(parts))
