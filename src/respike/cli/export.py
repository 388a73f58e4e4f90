"""The verb that writes models for others: export."""

import click

from respike.cli.show import echo_json, json_option, pairs, progress


@click.command("export")
@click.argument("model")
@click.argument("out")
@click.option(
    "--format",
    "kind",
    default="hf",
    show_default=True,
    type=click.Choice(["hf"]),
    help="hf: a Hugging Face folder.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is empty.")
@json_option
def export_command(model: str, out: str, kind: str, *, force: bool, as_json: bool) -> None:
    """Write MODEL to the folder OUT under the names and config that others read.

    Held are models of full softmax (llama, qwen2, qwen3), the layout of SpikingBrain-7B and that of
    SpikingBrain2.0; of any other it says what does not fit.
    """
    del kind
    from respike.conversion.export import export

    with progress("exporting") as step:
        report = export(model, out, force=force, progress=step)
    if as_json:
        echo_json(report)
        return
    shown = [("form", report["form"]), ("model_type", report["model_type"])]
    shown += [("tensors", report["tensors"]), ("files", ", ".join(report["files"]))]
    click.echo(pairs(shown))
    click.echo(f"wrote {out}", err=True)
