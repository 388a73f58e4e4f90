"""Sections of the report: results in, HTML out, one function each."""

from html import escape
from typing import Any

import page
import plots
from committed import Committed, origin

from respike.cli.show import human_bytes

Results = dict[str, Any]
GOOD_FRAC = 0.8
"""A recall task counts where the original itself finds at least this share."""

TASKS = {
    "copy": "random words, then the same words again",
    "passkey": "a number hidden in filler, 0 the beginning and 1 the end",
    "multi-query": "word pairs, then the keys again in another order",
}


def what_changed(results: Results) -> str:
    """The conversion in two sentences."""
    made, rest = results["convert"]["converted"], ""
    if results["memory"]:
        rest = ", and the rest through a memory of constant size"
    return (
        f"{made['softmax_groups']} of {made['kv_groups']} KV groups keep full softmax attention; "
        f"the others see the last {made['window_tokens']} tokens and the first "
        f"{made['sink_tokens']}{rest}. {untrained(results)}"
    )


def untrained(results: Results) -> str:
    """What became of the weights, in one sentence."""
    if healing := results.get("healing"):
        return (
            f"The model was then healed by {healing['tokens']:,} tokens of distillation (the "
            f"course {healing['name']}, run before; its difference is in the repository)."
        )
    if not results["memory"]:
        return "The weights are the original's: nothing was trained."
    fitted = results["convert"]["converted"]["calibration"]
    if not fitted:
        return "The weights are the original's; the memories are as they start, not fitted."
    return (
        "The weights are the original's; the memories were fitted to "
        f"{fitted['text_tokens']:,} tokens of text, not trained."
    )


def layers(results: Results, _committed: Committed) -> str:
    """The map of kept groups."""
    original, made = results["original"], results["convert"]
    shape = (
        f"{original['name']}: {original['family']}, {original['parameters']:,} parameters, "
        f"{original['layers']} layers of {original['heads']} heads in "
        f"{original['groups_per_layer']} KV groups, trained for {original['trained_tokens']:,} "
        f"tokens, licence {original['license']}."
    )
    caption = "Layers across, KV groups down. Filled: keeps full softmax. Open: window and sinks"
    caption += ", with a memory where the table says so." if results["memory"] else "."
    rows = [(where, what) for where, what in made["layers"]]
    return (
        page.paragraph(shape)
        + page.paragraph(made["about"] + " " + what_changed(results))
        + page.figure(plots.layer_map(made["keeps_softmax"]), caption, "wide")
        + "<details><summary>The same as a table</summary>"
        + page.table("Mixers of each layer", ("layers", "mixers"), rows)
        + "</details>"
    )


def predictions(results: Results, _committed: Committed) -> str:
    """KL by position."""
    check = results["check"]
    both = check["models"]
    rows = []
    pairs = zip(both["converted"]["buckets"], both["window"]["buckets"], strict=True)
    for a, b in [*pairs, (both["converted"]["beyond"], both["window"]["beyond"])]:
        span = f"{a['from_tokens']}-{a['to_tokens'] - 1}"
        rows.append((
            span if len(rows) < len(both["converted"]["buckets"]) else f"{span} (beyond)",
            f"{a['predictions']:,}",
            f"{a['nats_reference']:.3f}",
            f"{a['nats_added']:+.4f} {page.interval(a['nats_added_95'], 4)}",
            f"{a['kl_nats']:.4f} {page.interval(a['kl_nats_95'], 4)}",
            f"{a['top1_agreement_frac']:.3f}",
            f"{b['kl_nats']:.4f} {page.interval(b['kl_nats_95'], 4)}",
        ))  # fmt: skip
    header = ("context tokens", "predictions", "nats, original", "nats added, converted",
              "KL, converted", "same first choice", "KL, window")  # fmt: skip
    note = (
        f"On {check['contexts']} contexts of {check['context_tokens']:,} tokens of "
        f"{check['text']}. KL is summed over the vocabulary, in nats a token, and is 0 for equal "
        "predictions; brackets are 95 % intervals over contexts."
    )
    drawn = page.figure(plots.kl_plot(check), "Bars are means, whiskers 95 % intervals.")
    return page.paragraph(note) + drawn + page.table("By position", header, rows)


def far_back(results: Results, _committed: Committed) -> str:
    """Recall."""
    rows, weak = [], []
    window = results["convert"]["converted"]["window_tokens"]
    for row in results["recall"]:
        scores = row["scores"]
        cells = [
            f"{scores[r]['accuracy_frac']:.2f} {page.interval(scores[r]['accuracy_95'], 2)}"
            for r in ("original", "converted", "window")
        ]
        lost = scores["converted"]
        lost_text = f"{lost['lost_frac']:+.2f} {page.interval(lost['lost_95'], 2)}"
        rows.append(
            (row["task"], row["reach_tokens"], f"{row['chance_frac']:.2g}", *cells, lost_text)
        )
        if scores["original"]["accuracy_frac"] < GOOD_FRAC:
            weak.append(row["task"])
    header = (
        "task",
        "tokens back",
        "chance",
        "original",
        "converted",
        "window",
        "lost by converting",
    )
    families = {row["task"].split()[0] for row in results["recall"]}
    text = (
        " ".join(f"{name}: {what}." for name, what in TASKS.items() if name in families)
        + f" All models get the same {results['recall'][0]['trials']} trials of each. Tasks that "
        f"reach back no further than the window of {window} tokens are controls: all should "
        "agree there."
    )
    few = "Few trials: read the intervals. A fuller measurement takes `respike eval`."
    if weak:
        few += f" The original itself finds less than {GOOD_FRAC:.0%} in {', '.join(weak)}: "
        few += "there is little to lose in those, so they say little."
    drawn = plots.recall_plot(results["recall"])
    caption = "Share found, 95 % intervals; the broken line is the chance level."
    return (
        page.paragraph(text)
        + page.figure(drawn, caption)
        + page.table("Share found", header, rows)
        + page.paragraph(few, "faint")
    )


def worth(results: Results, _committed: Committed) -> str:
    """The memory: what it is, what it is worth, what it cannot do."""
    found = results["memory"]
    if not found:
        text = "This model has no memory: what leaves a window is gone for the groups that stream."
        return page.paragraph(text)
    rows = [
        (
            row["measure"],
            *(
                f"{row[k]:.{row['digits']}f} {page.interval(row[k + '_95'], row['digits'])}"
                for k in ("on", "cut")
            ),
            f"{row['worth']:+.{row['digits']}f} {page.interval(row['worth_95'], row['digits'])}",
        )
        for row in found["rows"]
    ]
    header = ("measure", "memory on", "memory cut", "the memory's worth")
    note = (
        "Cut: the very same folder with the memory switched off, on the same text and trials. KL "
        "in nats a token, less is better; recall is the share found. Worth: by how much the memory "
        "betters either, paired. Brackets are 95 % intervals; of "
        f"{page.plural(results['recall'][0]['trials'], 'trial')} a task they are wide."
    )
    drawn = ""
    if share := found["share"]:
        caption = (
            f"Mean over the {share['heads']} heads beside the softmax groups, shut ones included, "
            f"for the queries from token {share['from_tokens']} on in one context of "
            f"{share['context_tokens']:,} tokens; the largest of a head is "
            f"{share['largest_frac']:.2f}."
        )
        drawn = page.figure(plots.share_plot(share), caption)
    return (
        page.paragraph(what_memory_is(results))
        + page.table("The converted model with its memory, and with it cut", header, rows)
        + page.paragraph(note, "faint")
        + drawn
        + page.paragraph(
            "What it cannot do: hold words. It keeps sums of values, not tokens; verbatim recall "
            "is the work of the groups that keep softmax. Where a task fails with the memory cut, "
            "those groups depend on what it adds."
        )
    )


def what_memory_is(results: Results) -> str:
    """Its nature, and how it was fitted."""
    found, made = results["memory"], results["convert"]["converted"]
    kinds = ", ".join(found["kinds"])
    where = f"In {found['groups']} of {made['kv_groups']} KV groups"
    if kinds != "far":
        return (
            f"{where} a linear memory ({kinds}) of constant size takes in what is read. "
            f"{untrained(results)}"
        )
    features = " or ".join(map(str, found["features"]))
    text = (
        f"{where} a token that leaves the window is added to a fixed number of prototypes of keys "
        f"({features} a group), each with the sum of the values that belong to it; queries read "
        f"them under the window's own softmax. {untrained(results)}"
    )
    fitted = made["calibration"]
    if not fitted:
        return f"{text} Every head is shut, so nothing is read from it."
    return (
        f"{text} That is {fitted['text_tokens']:,} tokens of the other half of the text that is "
        "measured on here (text of another kind may gain less), and "
        f"{fitted['recall_tokens']:,} of random words to copy. {fitted['shut'] or 'None'} of "
        f"{fitted['heads']} heads stayed shut, as one does that a memory would not help. The "
        "squared error of a head's output, as a share of its square, is "
        f"{fitted['error_shut_frac']:.3f} with all shut and {fitted['error_frac']:.3f} fitted, "
        "the mean over heads on the part that the fit did not see."
    )


def question(results: Results, _committed: Committed) -> str:
    """One question, every model's own words."""
    asked = results["question"]
    intro = (
        f'A prompt of {asked["prompt_tokens"]} tokens: the sentence "{asked["fact"]}", then a '
        f'page of Python\'s reference, then "{asked["question"]}". Greedy, at most '
        f"{asked['max_tokens']} tokens. One question is an anecdote; the figures are above."
    )
    parts = [
        f'<p class="{role}">{escape(role)}</p>{page.quote(text)}'
        for role, text in asked["answers"].items()
    ]
    return page.paragraph(intro) + "".join(parts)


def memory(results: Results, _committed: Committed) -> str:
    """State bytes against context."""
    state = results["state"]
    rows = [
        (f"{n:,}", *(human_bytes(values[i]) for values in state["bytes"].values()))
        for i, n in enumerate(state["tokens"])
        if str(n) in state["parts"]
    ]
    parts = [
        (f"{int(n):,}", *map(human_bytes, (*part.values(), sum(part.values()))))
        for n, part in state["parts"].items()
    ]
    drawn = plots.state_plot(state, results["context"]["rows"])
    growth = results["convert"]["converted"]["growth_bytes_per_token"]
    text = (
        f"Each further token adds {results['original']['growth_bytes_per_token']:,} bytes to the "
        f"original's state and {growth:,} to the converted model's, in bf16. The lines are "
        "computed from the shapes; the dots were counted in the states of this run."
    )
    caption = "State of one sequence. Dashed: computed. Markers: measured."
    return (
        page.paragraph(text)
        + page.figure(drawn, caption)
        + page.table("State, computed, bf16", ("tokens", *state["bytes"]), rows)
        + page.table(
            "The converted model's state by part: keys and values in bf16, memories in f32",
            ("tokens", "softmax groups", "windows and sinks", "memories", "together"),
            parts,
        )
    )


def timing_table(report: Results, caption: str) -> str:
    """The rows of a context measurement."""
    rows = [
        (
            f"{row['context_tokens']:,}",
            row["model"],
            row["n"],
            f"{row['ttft_seconds']['median']:.2f} {_range(row['ttft_seconds'], 2)}",
            f"{row['prefill_tokens_per_second']['median']:,.0f}",
            f"{row['decode_tokens_per_second']['median']:.1f} "
            f"{_range(row['decode_tokens_per_second'], 1)}",
            human_bytes(row["state_bytes"]),
            human_bytes(row["peak_rss_bytes"]),
        )
        for row in report["rows"]
    ]
    header = ("tokens", "model", "n", "first token, s", "prefill, tokens/s", "decode, tokens/s",
              "state", "peak of the process")  # fmt: skip
    skipped = [
        f"Skipped: {gap['model']} at {gap['context_tokens']:,} tokens: {gap['reason']}."
        for gap in report["skipped"]
    ]
    return page.table(caption, header, rows) + (page.listing(skipped) if skipped else "")


def _range(part: dict[str, float], digits: int) -> str:
    return page.interval((part["min"], part["max"]), digits)


def speed(results: Results, committed: Committed) -> str:
    """Time against context: this run and, marked apart, committed longer lengths."""
    report = results["context"]
    drawn = [
        ("ttft_seconds", "time to first token, s"),
        ("decode_tokens_per_second", "decode, tokens/s"),
    ]
    caption = "Line and filled markers: this run, median and range."
    if committed.context:
        caption += f" Open squares: {origin(committed.context)}."
    figures = "".join(
        page.figure(plots.context_plot(key, label, report["rows"], committed.context), caption)
        for key, label in drawn
        if report["rows"] or committed.context
    )
    settings = report["settings"]
    text = (
        "Real text in new pieces each time, the two models taking turns, "
        f"{settings['repeats']} repeats after a warm-up, "
        f"{page.plural(report['machine']['threads'], 'thread')}; {settings['path']}. "
        "Brackets are the smallest and the largest value. Differences below "
        f"{page.TIE}x are a tie: machines drift."
    )
    return (
        page.paragraph(text)
        + f'<div class="figures">{figures}</div>'
        + timing_table(report, "This run")
    )


def longer(results: Results, committed: Committed) -> str:
    """Committed longer lengths."""
    report = committed.context
    if report is None:
        return page.paragraph(
            "There is no committed benchmarks/results/context_*.json, so no longer lengths."
        )
    mine = set(results["fingerprints"].values())
    foreign = [n for n, facts in report["models"].items() if facts["fingerprint"] not in mine]
    text = f"Not of this run: from {origin(report)}; {report['settings']['path']}."
    if foreign:
        text += f" Other weights or another recipe than this run's: {', '.join(foreign)}."
    return page.paragraph(text) + timing_table(report, f"From {report['file']}")


def frontier(_results: Results, committed: Committed) -> str:
    """Quality against cache bytes, committed."""
    if not committed.frontiers:
        return page.paragraph(
            "There is no committed benchmarks/results/frontier_*.json, so no frontier."
        )
    return "".join(
        one_frontier(result, number) for number, result in enumerate(committed.frontiers)
    )


def one_frontier(result: Results, number: int) -> str:
    """Plots and table of one frontier file."""
    length = max(result["rows"][0]["state_bytes"], key=lambda n: (n == "8192", int(n)))
    caption = "Numbers: KV groups that keep softmax. Whiskers: 95 % intervals."
    drawn = "".join(
        page.figure(plots.frontier_plot(result, m, length, f"frontier-{m}-{number}"), caption)
        for m in ("kl", "copy")
    )
    rows = [
        (
            row["name"],
            row["softmax_groups"],
            human_bytes(row["state_bytes"][length]),
            f"{row['beyond']['kl_nats']:.4f} {page.interval(row['beyond']['kl_nats_95'], 4)}",
            f"{row['copy']['accuracy_frac']:.2f} {page.interval(row['copy']['accuracy_95'], 2)}",
        )
        for row in result["rows"]
    ]
    header = ("conversion", "softmax groups", f"state at {int(length):,}", "KL beyond the window",
              "copying")  # fmt: skip
    return (
        page.paragraph(
            f"{result['model']}, on {result['text']}. Not of this run: {origin(result)}."
        )
        + f'<div class="figures">{drawn}</div>'
        + page.table(f"Quality against memory: {result['model']}", header, rows)
    )
