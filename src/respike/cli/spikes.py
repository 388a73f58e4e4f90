"""The verb that makes models spike: spikes."""

from typing import Any

import click

from respike.cli.show import (
    data_option,
    device_options,
    echo_json,
    human_bytes,
    json_option,
    need_matplotlib,
    number_option,
    pairs,
    progress,
    table,
)


@click.command("spikes")
@click.argument("model")
@click.argument("out")
@click.option(
    "--neuron",
    type=click.Choice(["dead-zone", "adaptive", "absmax", "teal"]),
    default="dead-zone",
    show_default=True,
    help="adaptive: SpikingBrain-1.0's; absmax: 2.0's; teal: magnitudes, the rival.",
)
@click.option("--silent", type=float, metavar="X", help="Share of weights to skip, 0 to 0.95.")
@click.option("--kl", type=float, metavar="NATS", help="Or: most KL a token on the text.")
@click.option(
    "--budget",
    type=click.Choice(["sensitivity", "uniform"]),
    default="sensitivity",
    show_default=True,
    help="How silence is shared out over layers and projections.",
)
@click.option("--by-channel", is_flag=True, help="Bands by each channel's weight norm.")
@click.option(
    "--step",
    type=click.Choice(["absmax", "mean"]),
    default="absmax",
    show_default=True,
    help="dead-zone: threshold max|x| / 127, or mean|x| / k.",
)
@click.option("--k", type=float, default=3.0, show_default=True, help="Thresholds in a mean |x|.")
@click.option(
    "--weights",
    type=click.Choice(["int8", "int4", "float"]),
    help="How spiking layers run: by events, or emulated.  [default: int8; teal: float]",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="32",
    show_default=True,
    help="Inputs that share a weight scale; scales are read even where most inputs are silent.",
)
@data_option("Text to calibrate and measure on")
@number_option("--context-tokens", 512, "Length of a piece of text.", least=2)
@number_option("--calibration-tokens", 2048, "Tokens to calibrate on.")
@number_option("--max-tokens", 4096, "Other tokens to measure on.")
@click.option("--rasters/--no-rasters", default=True, help="Draw what was fired.")
@click.option("--force", is_flag=True, help="Replace OUT if respike wrote it.")
@device_options
@json_option
def spikes_command(model: str, out: str, **options: Any) -> int:
    """Put neurons in front of MODEL's linear layers; write the spiking model to OUT.

    Weights stay as they are stored. OUT's config.json holds the neurons, report.json what they
    fired on text they were not calibrated on. Fails if a layer that should spike never did.
    """
    from respike.device import set_threads
    from respike.spiking import Goal, Measure, spike

    neuron = options["neuron"]
    goal = Goal(
        neuron=neuron,
        step=options["step"],
        k=options["k"],
        by_channel=options["by_channel"],
        weights=options["weights"] or ("float" if neuron == "teal" else "int8"),
        silent_frac=options["silent"],
        kl_nats=options["kl"],
        budget=options["budget"],
        group_size=int(options["group_size"]),  # type: ignore[arg-type]
    )
    measure = Measure(
        data=options["data"],
        context_tokens=options["context_tokens"],
        calibration_tokens=options["calibration_tokens"],
        held_out_tokens=options["max_tokens"],
        device=options["device"],
        dtype=options["dtype"],
    )
    goal.check()
    if options["rasters"] and neuron != "teal":
        need_matplotlib("the raster", "add --no-rasters")
    set_threads(options["threads"])
    with progress("spiking") as step:
        report = spike(
            model,
            out,
            goal,
            measure,
            rasters=options["rasters"],
            force=options["force"],
            progress=lambda _, done, total: step(done, total),
        )
    if options["as_json"]:
        echo_json(report)
    else:
        click.echo(_text(report))
        click.echo(f"wrote {out}", err=True)
    if report["without_spikes"]:
        click.echo(
            f"check failed: nothing fired in {', '.join(report['without_spikes'])}", err=True
        )
        return 1
    return 0


def _text(report: dict[str, Any]) -> str:
    total, far = report["total"], report["distance"]
    low, high = far["kl_nats_95"]
    rows = [
        ("neuron", report["neuron"]["neuron"]),
        ("runs", report["runs"]),
        ("measured on", f"{report['tokens']:,} tokens it was not calibrated on"),
        ("silent inputs", f"{_percent(total['silent_frac'])} (exact zeros)"),
        (
            "events",
            f"{total['events']:,.0f} of {total['multiply_accumulates']:,} multiply-accumulates a "
            f"token: {_percent(total['skipped_frac'])} skipped",
        ),
    ]
    if "weight_bytes" in total:
        touched, stored = int(total["weight_bytes_touched"]), total["weight_bytes"]
        rows.append(("weights touched", f"{human_bytes(touched)} of {human_bytes(stored)} a token"))
    if "mean_abs_count" in total:
        rows += _count_rows(total)
    rows.append(("KL to the original", f"{far['kl_nats']:.4f} ({low:.4f} to {high:.4f}) nats"))
    for part in report["not_spiked"]:
        work = part["multiply_accumulates"]
        rows.append(("not spiked", part["what"] + (f", {work:,} a token" if work else "")))
    sites = {(s["layer"], s["site"]): s for s in report["sites"]}
    names = list(dict.fromkeys(name for _, name in sites))
    layers = table(
        ("layer", *(f"silent, {name}" for name in names), "skipped"),
        [
            (
                str(row["layer"]),
                *(_percent(sites[row["layer"], name]["silent_frac"]) for name in names),
                _percent(row["skipped_frac"]),
            )
            for row in report["layers"]
        ],
    )
    return "\n\n".join([pairs(rows), layers, *_energy(report)])


def _count_rows(total: dict[str, Any]) -> list[tuple[str, str]]:
    windows = total["three_step_windows"]
    rows = [
        ("mean |count|", f"{total['mean_abs_count']:.3f}"),
        (
            "counts above 7, 127",
            f"{_percent(total['above_7_frac'])}, {_percent(total['above_127_frac'])}",
        ),
    ]
    rows += [
        (
            f"zero bits, {coding}",
            f"{_percent(found['zero_frac'])} of {found['steps']} steps"
            + (f", zero point {found['zero_point']}" if found["zero_point"] else ""),
        )
        for coding, found in total["bit_sparsity"].items()
    ]
    empty = windows["with_0_1_2_3_spikes_frac"][0]
    return [*rows, ("empty windows", f"{_percent(empty)} ({windows['what']})")]


def _energy(report: dict[str, Any]) -> list[str]:
    if "energy" not in report:
        return []
    energy = report["energy"]
    rows = [
        (way, f"{e['arithmetic'] / 1000:,.1f}", f"{e['weights_from_dram'] / 1000:,.1f}")
        for way, e in energy["nanojoules_a_token"].items()
    ]
    title = f"Energy, microjoules a token ({energy['what']}):"
    shown = table(("way", "arithmetic", "weights from DRAM"), rows)
    constants = ", ".join(f"{what} {cost:g}" for what, cost in energy["picojoules"].items())
    return [f"{title}\n{shown}\nconstants, pJ: {constants}"]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
