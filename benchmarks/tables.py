"""Markdown tables of result files; `scripts/docs.py` puts them into the documents."""

import math
from typing import Any

from respike.bench.report import middle


def source_line(result: dict[str, Any]) -> str:
    """What was measured on what, and where."""
    machine = result.get("machine")
    where = (
        f" {machine['processor']}, {result['date']}, commit {result['commit']}." if machine else ""
    )
    return f"{result['model']}, computed in {result['asked']['dtype']}.{where}"


def interval(ends: list[float], digits: int, scale: float = 1.0) -> str:
    return f"{scale * ends[0]:.{digits}f} to {scale * ends[1]:.{digits}f}"


def with_interval(found: dict[str, Any], name: str, digits: int, scale: float = 1.0) -> str:
    """A figure and its interval; a share's interval is named without the word for its unit."""
    ends = found.get(f"{name}_95") or found[f"{name.removesuffix('_frac')}_95"]
    return f"{scale * found[name]:.{digits}f} ({interval(ends, digits, scale)})"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """Text to the left in the first column, figures to the right in the others."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def brains_table(result: dict[str, Any]) -> str:
    """One row a twin: its size, its distance untrained, and how its loss went down."""
    asked = result["asked"]
    header = ["twin", "parameters, active", "KL untrained, nats", "loss, first and last tenth"]
    rows = []
    for row in result["rows"]:
        sizes = f"{row['parameters'] / 1e6:.1f}M, {row['active_parameters'] / 1e6:.1f}M"
        kl = f"{row['kl_nats']:.3f}" if "kl_nats" in row else "-"
        loss = loaded = "-"
        if asked["steps"]:
            loss = f"{row['first_tenth_nats']:.3f} to {row['last_tenth_nats']:.3f}"
            loaded = "yes" if row["same_logits_when_loaded"] else "NO"
        rows.append([row["name"], sizes, kl, loss, loaded])
    lines = markdown([*header, "same logits when loaded"], rows)
    how = f"{asked['steps']} steps of {asked['context_tokens']} tokens, all weights, Adam"
    return "\n".join([f"{source_line(result)} Trained {how} {asked['rate']:g}.", "", *lines])


def context_table(result: dict[str, Any]) -> str:
    """A row for each length and contender: time, state and memory; what is fitted in italics."""
    header = ["tokens", "model", "first token, s", "decoding, tokens/s", "state, MiB", "peak, MiB"]
    rows = []
    for row in sorted(result["rows"] + result["fitted"], key=lambda row: row["context_tokens"]):
        mark = "*" if row.get("fitted") else ""
        figures = [middle(row["ttft_seconds"]), middle(row["decode_tokens_per_second"])]
        sizes = [f"{row[name] / 2**20:,.0f}" if row.get(name) else "-"
                 for name in ("state_bytes", "peak_rss_bytes")]  # fmt: skip
        rows.append([
            f"{row['context_tokens']:,}", row["contender"],
            *(f"{mark}{figure:,.1f}{mark}" for figure in figures), *sizes,
        ])  # fmt: skip
    head = f"{source_line(result)} Threads {result['asked']['threads']}; fitted figures in italics."
    return "\n".join([head, "", *markdown(header, rows)])


def healing_table(result: dict[str, Any]) -> str:
    """One table a length of text, one of what is written, one of paired differences."""
    lines = [
        f"{source_line(result)} Text: {result['text']}. Intervals are 95 %, over contexts or "
        "prompts.",
        "",
    ]
    parts = list(dict.fromkeys(part for row in result["rows"] for part in row["parts"]))
    for part in parts:
        rows = [(row["name"], row["parts"][part]) for row in result["rows"] if part in row["parts"]]
        lines += (_text_part if part.startswith("text") else _written_part)(part, rows, result)
        lines.append("")
    if result.get("differences"):
        lines += _differences(result["differences"])
    return "\n".join(lines).rstrip()


def _text_part(
    part: str, rows: list[tuple[str, dict[str, Any]]], result: dict[str, Any]
) -> list[str]:
    _, length, _, contexts = part.split()
    buckets = [f"{b['from_tokens']}-{b['to_tokens'] - 1}" for b in rows[0][1]["buckets"]]
    beyond = f"beyond {result['asked']['beyond_tokens']} tokens"
    header = [f"{contexts} contexts of {length}", *(f"nats at {b}" for b in buckets)]
    header += [f"KL {beyond}", f"perplexity ratio {beyond}", f"top-1 agreement {beyond}"]
    cells = []
    for name, found in rows:
        far = found["beyond"]
        ratio = {"ratio": 2.718281828459045 ** far["nats_added"]}
        ratio["ratio_95"] = [2.718281828459045**end for end in far["nats_added_95"]]
        cells.append([
            name, *(f"{b['nats']:.4f}" for b in found["buckets"]),
            with_interval(far, "kl_nats", 4), with_interval(ratio, "ratio", 3),
            f"{100 * far['top1_agreement_frac']:.1f} %",
        ])  # fmt: skip
    return markdown(header, cells)


def _written_part(
    part: str, rows: list[tuple[str, dict[str, Any]]], result: dict[str, Any]
) -> list[str]:
    del result
    _, written, _, prompts, _, length = part.split()
    header = [
        f"{written} tokens after {prompts} prompts of {length}",
        "tokens before the first difference", "same token at the same place, %",
        "repeated 4-grams, %", "of the original, %", "added, %",
    ]  # fmt: skip
    return markdown(
        header,
        [
            [
                name, with_interval(found, "prefix_tokens", 0),
                with_interval(found, "agreement_frac", 0, 100),
                with_interval(found, "repetition_frac", 0, 100),
                f"{100 * found['repetition_reference_frac']:.0f}",
                with_interval(found, "repetition_added_frac", 0, 100),
            ]
            for name, found in rows
        ],
    )  # fmt: skip


MEASURES = {
    "kl_nats": "KL, nats", "nats": "nats", "top1_agreement_frac": "top-1 agreement",
    "agreement_frac": "same token written", "repetition_added_frac": "repetition added",
}  # fmt: skip


def _differences(found: list[dict[str, Any]]) -> list[str]:
    rows = []
    for row in found:
        low, high = row["gain_95"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        gain = f"{row['gain']:+.4f} ({interval([low, high], 4)})"
        what = f"{row['better']} against {row['than']}"
        rows.append([what, row["part"], MEASURES[row["measure"]], str(row["n"]), gain, verdict])
    header = ["paired by context or prompt", "on", "measure", "n", "gain (above 0 is better)", ""]
    return markdown(header, rows)


def curve_table(result: dict[str, Any]) -> str:
    """A row for every judgement of a course; the published systems last, which report no KL."""
    header = ["model", "softmax, %", "tokens of training", "KL, nats", "nats added", "recall, %"]
    rows = []
    for row in result["rows"]:
        share = f"{100 * row['softmax_frac']:.0f}"
        for seen in row["verdicts"]:
            kl = f"{seen['kl_nats']:.3f} ({interval(seen['kl_95'], 3)})"
            rows.append([
                row["name"], share, f"{seen['tokens']:,}", kl,
                f"{seen['nats_added']:+.3f}", f"{100 * seen['recall_frac']:.0f}",
            ])  # fmt: skip
    for other in result["published"]:
        share = f"{100 * other['softmax_frac']:.0f}"
        rows.append([f"{other['name']} ({other['source']})", share, f"{other['tokens']:,.0f}",
                     "-", "-", "-"])  # fmt: skip
    return "\n".join(markdown(header, rows))


def ablations_table(result: dict[str, Any]) -> str:
    """A row for every arm, before and after training."""
    tasks = list(result["rows"][0]["after"]["tasks"])
    dtypes = sorted({row["compute"] for row in result["rows"]})
    header = ["one thing changed", *["computed in"] * (len(dtypes) > 1), "KL untrained",
              "KL healed", "nats added, healed",
              *(f"{task}, % untrained, healed" for task in tasks)]  # fmt: skip
    rows = []
    for row in result["rows"]:
        before, after = row["before"], row["after"]
        rows.append([
            row["name"], *[row["compute"]] * (len(dtypes) > 1), f"{before['kl_nats']:.4f}",
            f"{after['kl_nats']:.4f} ({interval(after['kl_95'], 4)})",
            f"{after['nats_added']:+.4f}",
            *(
                ", ".join(f"{100 * seen['tasks'][task][0]:.0f}" for seen in (before, after))
                for task in tasks
            ),
        ])  # fmt: skip
    asked = result["asked"]
    about = (
        f"{asked['model']}, {asked['tokens']:,} tokens of training an arm, computed in "
        f"{' or '.join(dtypes)}. {result['machine']['processor']}, {result['date']}, "
        f"commit {result['commit']}."
    )
    return "\n".join([about, "", *markdown(header, rows)])


def recall_table(result: dict[str, Any]) -> str:
    """One table a family: lengths down, models across."""
    trained = result["trained_tokens"]
    lines = [
        f"{source_line(result)} Share of questions answered, % (95 % interval); lost: against the "
        f"original, paired by trial. The original was trained for {trained:,} tokens.",
        "",
    ]
    names = [row["name"] for row in result["rows"]]
    found = {
        (*part.split(maxsplit=1), row["name"]): score
        for row in result["rows"]
        for part, score in row["parts"].items()
    }
    for family in dict.fromkeys(key[0] for key in found):
        weak = "" if result.get("evidence", {}).get(family, True) else " (no evidence)"
        header = [f"{family}{weak}", "trials", "chance, %", "original"]
        for name in names[1:]:
            header += [name, "lost, points"]
        settings = sorted({key[1] for key in found if key[0] == family}, key=_length_of)
        rows = [_recall_row(found, family, setting, names) for setting in settings]
        lines += [*markdown(header, rows), ""]
    return "\n".join(lines).rstrip()


def _length_of(setting: str) -> tuple[int, str]:
    """Of ``1024 x 200``; other trials of the same length are another row, behind it."""
    return int(setting.split()[0]), setting


def _recall_row(
    found: dict[tuple[str, ...], dict[str, Any]], family: str, setting: str, names: list[str]
) -> list[str]:
    mine = [found.get((family, setting, name)) for name in names]
    some = next(score for score in mine if score)
    cells = [f"{_length_of(setting)[0]:,}", str(some["trials"]), f"{100 * some['chance_frac']:.2g}"]
    for number, score in enumerate(mine):
        cells.append(with_interval(score, "accuracy_frac", 0, 100) if score else "-")
        if number:
            lost = score is not None and "lost_frac" in score
            cells.append(with_interval(score, "lost_frac", 1, 100) if lost and score else "-")
    return cells


def harness_table(result: dict[str, Any]) -> str:
    """Tasks down, models across."""
    lines = [
        f"{source_line(result)} Small slices, 0-shot, %; 95 % intervals. Lost: against the "
        "original, paired by question.",
        "",
    ]
    original, *others = result["rows"]
    header = ["task", "questions", "chance, %", "original"]
    for row in others:
        header += [row["name"], "lost, points"]
    rows = []
    for task, found in original["parts"].items():
        weak = "" if found["informative"] else " (original not above chance: no evidence)"
        cells = [f"{task}{weak}", str(found["questions"]), f"{100 * found['chance_frac']:.0f}"]
        cells.append(with_interval(found, "accuracy_frac", 0, 100))
        for row in others:
            score = row["parts"].get(task)
            cells += (
                [with_interval(score, n, 0, 100) for n in ("accuracy_frac", "lost_frac")]
                if score
                else ["-", "-"]
            )
        rows.append(cells)
    return "\n".join([*lines, *markdown(header, rows)])


def spikes_table(result: dict[str, Any]) -> str:
    """One row a contender: how near, how many bytes, how fast."""
    threads = list(result["rows"][0]["tokens_per_second"])
    rows = []
    for row in result["rows"]:
        speeds = [row["tokens_per_second"][t] for t in threads]
        rows.append([
            row["name"], f"{100 * row['skipped_frac']:.1f}", with_interval(row, "kl_nats", 4),
            f"{math.exp(row['nats_added']):.3f}", f"{row['token_bytes'] / 2**20:.1f}",
            *(f"{s['median']:.0f} [{s['min']:.0f}, {s['max']:.0f}]" for s in speeds),
        ])  # fmt: skip
    header = [
        "", "weights skipped, %", "KL, nats", "perplexity ratio", "weights read a token, MiB",
        *(f"tokens/s, {t} thread{'s' * (t != '1')}" for t in threads),
    ]  # fmt: skip
    machine = result["machine"]
    where = f"{machine['processor']}, {result['date']}, commit {result['commit']}"
    about = (
        f"{result['model']}, {result['text']}; {result['settings']}. Median [least, most]; KL to "
        f"the model named, in float32, 95 % over contexts. {where}."
    )
    return "\n".join([about, "", *markdown(header, rows)])


def neurons_table(result: dict[str, Any]) -> str:
    """One row for each neuron and way to share silence out."""
    rows = [
        [
            row["neuron"], row["budget"], f"{100 * row['skipped_frac']:.0f}",
            with_interval(row, "kl_nats", 3), f"{math.exp(row['nats_added']):.2f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    about = (
        f"{result['model']}, {result['text']}, float weights in float32. "
        f"{result['machine']['processor']}, {result['date']}, commit {result['commit']}."
    )
    header = ["neuron", "silence shared out", "weights skipped, %", "KL, nats", "perplexity ratio"]
    return "\n".join([about, "", *markdown(header, rows)])


def documents_table(result: dict[str, Any]) -> str:
    """One table a length: kinds down, contenders across."""
    asked = result["asked"]
    lines = [
        f"{source_line(result)} Weights {asked['weights']}. Right answers, % (95 % interval), and "
        "[what would have been right had nothing been refused]. The original was trained for "
        f"{result['trained_tokens']:,} tokens and is not asked beyond.",
        "",
    ]
    found = result["summary"]
    for length in sorted({row["length"] for row in found}):
        some = [row for row in found if row["length"] == length]
        names = list(dict.fromkeys(row["contender"] for row in some))
        cells = {(row["kind"], row["contender"]): row for row in some}
        most = max(row["n"] for row in some)
        rows = [
            [kind, *(_answers(cells.get((kind, name)), most) for name in names)]
            for kind in dict.fromkeys(row["kind"] for row in some)
        ]
        lines += [*markdown([f"{length:,} tokens, {most} documents", *names], rows), ""]
    return "\n".join(lines).rstrip()


def _answers(row: dict[str, Any] | None, most: int) -> str:
    if row is None:
        return "-"
    text = with_interval(row, "exact_frac", 0, 100.0)
    if row["kind"] != "absent":
        text += f" [{100 * row['unrefused_exact_frac']:.0f}]"
    return text if row["n"] == most else f"{text}, n = {row['n']}"


def abstain_table(result: dict[str, Any]) -> str:
    """What thresholds make of documents that they were not chosen on."""
    rows = []
    for name in ("chosen", "in_use"):
        found = result[name]
        least = found["least"]
        for part in ("fit", "test"):
            if part in found:
                rows.append([
                    f"{name.replace('_', ' ')}: {least['evidence']:.2f}, {least['confidence']:.2f}",
                    "chosen on these" if part == "fit" else "others",
                    with_interval(found[part], "kept_present_frac", 0, 100.0),
                    with_interval(found[part], "refused_absent_frac", 0, 100.0),
                ])  # fmt: skip
    many = {part: sum(row["set"] == part for row in result["rows"]) for part in ("fit", "test")}
    return "\n".join([
        f"{source_line(result)} {many['fit']} cases to choose on, {many['test']} others, half of "
        "each with the fact; 95 % intervals.",
        "",
        *markdown(["least evidence, confidence", "cases", "present facts kept, %",
                   "absent facts refused, %"], rows),
    ])  # fmt: skip


def reading_table(result: dict[str, Any]) -> str:
    """A long text: what reading took, and what was then answered."""
    found, answers = result["read"], result["answers"]
    taken = " An interrupted reading was taken up: seconds are those of the rest." * bool(
        result.get("taken_up")
    )
    guess = found["estimate"]
    facts = [
        ["tokens", f"{found['tokens']:,}"],
        ["seconds (estimated before)", f"{found['seconds']:,.0f} ({guess['seconds']:,.0f})"],
        ["peak memory, MiB (estimated)",
         f"{found['peak_bytes'] / 2**20:,.0f} ({guess['memory_bytes'] / 2**20:,.0f})"],
        ["peak memory over that after 32k tokens", f"{found['peak_over_settled_frac']:.3f}"],
        ["state, MiB", f"{found['state_bytes'] / 2**20:,.1f}"],
        ["file, MiB", f"{found['file_bytes'] / 2**20:,.1f}"],
    ]  # fmt: skip
    asked = [
        [f"{a['depth_frac']:.2f}", "yes" if a["exact"] else "no",
         "yes" if a["passage_found"] else "no", f"{a['first_token_seconds']:.2f}"]
        for a in answers
    ]  # fmt: skip
    return "\n".join([
        f"{source_line(result)} Weights {result['asked']['weights']}, {result['asked']['threads']} "
        f"threads.{taken}",
        "",
        *markdown(["reading", "measured"], facts),
        "",
        *markdown(["depth", "answered exactly", "in a passage named", "first token, s"], asked),
    ])  # fmt: skip
