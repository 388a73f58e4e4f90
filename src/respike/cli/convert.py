"""The verb that makes models: convert."""

from typing import Any

import click

from respike.cli.show import (
    data_option,
    echo_json,
    human_bytes,
    json_option,
    pairs,
    progress,
    table,
    threads_option,
)


@click.command("convert")
@click.argument("model")
@click.argument("out")
@click.option(
    "--recipe",
    required=True,
    metavar="NAME|FILE",
    help="Built-in recipe or YAML file; see `respike recipes`.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe, such as window_tokens=128; repeatable.",
)
@click.option(
    "--weights",
    type=click.Choice(["f32", "bf16", "f16"]),
    help="Dtype to store.  [default: the recipe's]",
)
@data_option("Text to calibrate memories on")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace OUT if respike wrote it.")
@threads_option
@json_option
def convert_command(model: str, out: str, recipe: str, **options: Any) -> None:
    """Convert MODEL by a recipe and write the result to the folder OUT.

    OUT holds the weights, the tokenizer, the resolved recipe, report.json and a model card. A
    recipe with far.calibration_tokens runs the original on that much text to fit its memories.
    """
    from respike.conversion import convert, plan
    from respike.device import set_threads
    from respike.recipe import load_recipe

    overrides = options["overrides"]
    if options["weights"]:
        overrides = (*overrides, f"weights={options['weights']}")
    made = plan(model, load_recipe(recipe, overrides))
    if options["dry_run"]:
        report: dict[str, Any] = made.summary()
    else:
        set_threads(options["threads"])
        with progress("calibrating" if made.calibrates else "converting") as step:
            report = convert(made, out, force=options["force"], data=options["data"], progress=step)
    if options["as_json"]:
        echo_json(report)
        return
    click.echo(_plan_text(report))
    click.echo("nothing written (--dry-run)" if options["dry_run"] else f"wrote {out}", err=True)


def _plan_text(report: dict[str, Any]) -> str:
    tensors, lengths = report["tensors"], report["state_bytes_bf16"]
    facts = pairs(
        [
            ("source", f"{report['source']['name']} ({report['source']['family']})"),
            ("recipe", report["recipe"]),
            ("softmax groups", f"{report['softmax_groups']} of {report['kv_groups']} KV groups"),
            ("parameters", f"{report['parameters']:,} ({report['new_parameters']:+,} new)"),
            ("weights", f"{human_bytes(report['weight_bytes'])} as {report['weights']}"),
            ("tensors", ", ".join(f"{n} {a}" for a, n in tensors.items() if n)),
            *[("dropped", f"{name}: {why}") for name, why in report["dropped"].items()],
            ("state growth", f"{report['growth_bytes_per_token_bf16']:,} bytes a token (bf16)"),
        ]
    )
    layers = table(("layers", "mixers"), [(r["layers"], r["mixers"]) for r in report["layers"]])
    state = table(
        ("tokens", "state, original", "state, converted"),
        [
            (f"{int(n):,}", human_bytes(b["original"]), human_bytes(b["converted"]))
            for n, b in lengths.items()
        ],
    )
    return f"{facts}\n\n{layers}\n\n{state}"
