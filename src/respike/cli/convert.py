"""Verbs that make models and recipes: convert, select."""

import json
from pathlib import Path
from typing import Any

import click

from respike.cli.show import (
    data_option,
    echo_json,
    given,
    human_bytes,
    json_option,
    load_options,
    need_matplotlib,
    number_option,
    pairs,
    progress,
    refuse_existing,
    run_options,
    table,
    threads_option,
)
from respike.errors import UsageError


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


@click.command("select")
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="FILE", help="Recipe to write (.yaml).")
@click.option(
    "--softmax-groups",
    required=True,
    type=int,
    metavar="N",
    help="KV groups that keep full softmax, of all layers together.",
)
@data_option("Text file")
@number_option("--window-tokens", 256, "Window of all other KV groups.")
@number_option("--sink-tokens", 4, "First tokens that those groups keep.", least=0)
@click.option(
    "--rest",
    metavar="FOLDER",
    help="Conversion of MODEL by the recipe constant: what those groups become, memories too.  "
    "[default: a window]",
)
@number_option("--context-tokens", 1024, "Length of a piece of text.", least=2)
@number_option("--max-tokens", 3072, "Tokens of text in all.")
@number_option("--copy-trials", 4, "Sequences of the copying probe.")
@number_option("--passkey-trials", 4, "Sequences of the passkey probe.", least=0)
@click.option("--heat-map/--no-heat-map", default=True, help="Draw the scores beside the recipe.")
@click.option("--force", is_flag=True, help="Replace the output files.")
@run_options
@json_option
def select_command(model: str, output: str, **options: Any) -> None:
    """Measure which KV groups of MODEL carry recall; write a recipe that keeps them.

    Beside the recipe FILE.yaml it writes FILE.scores.json, every score, and FILE.png, a heat map.
    """
    from respike.device import set_threads
    from respike.files import replace_text
    from respike.loading import load
    from respike.recipe import dump_recipe
    from respike.recipe_options import MAX_NAME
    from respike.selection import Budget, select, selected_recipe
    from respike.text import contexts

    recipe_path = Path(output)
    if recipe_path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--output {output}: expected a name that ends in .yaml")
    if len(recipe_path.stem) > MAX_NAME:
        raise UsageError(f"--output {output}: a recipe's name has at most {MAX_NAME} characters")
    scores_path, map_path = recipe_path.with_suffix(".scores.json"), recipe_path.with_suffix(".png")
    wanted = [recipe_path, scores_path] + [map_path] * options["heat_map"]
    refuse_existing(wanted, options["force"])
    if options["heat_map"]:
        need_matplotlib("the heat map", "add --no-heat-map")
    set_threads(options["threads"])
    rest_recipe = _recipe_of(options["rest"]) if options["rest"] else None
    loaded = load(model, **load_options(options))
    rest = load(options["rest"], **load_options(options)).decoder if options["rest"] else None
    text = contexts(
        options["data"],
        loaded.tokenizer,
        context_tokens=options["context_tokens"],
        max_tokens=options["max_tokens"],
    )
    budget = Budget(
        softmax_groups=options["softmax_groups"],
        window_tokens=rest_recipe.window_tokens if rest_recipe else options["window_tokens"],
        sink_tokens=rest_recipe.sink_tokens if rest_recipe else options["sink_tokens"],
        copy_trials=options["copy_trials"],
        passkey_trials=options["passkey_trials"],
    )
    with progress("measuring") as step:
        selection = select(loaded.decoder, loaded.tokenizer, text, budget, step, rest)
    name = Path(model).resolve().name
    recipe = selected_recipe(selection, budget, loaded.config, recipe_path.stem, name, rest_recipe)
    scores = selection.as_dict()
    replace_text(scores_path, json.dumps(scores, indent=1) + "\n")
    replace_text(recipe_path, dump_recipe(recipe, {"measured on": name}))
    if options["heat_map"]:
        from respike.selection.heat_map import draw

        draw(selection, loaded.config, map_path)
    if options["as_json"]:
        echo_json(scores)
        return
    click.echo(_selection_text(scores))
    for path in wanted:
        click.echo(f"wrote {path}", err=True)
    click.echo(f"next: respike convert {model} OUT --recipe {recipe_path}", err=True)


def _recipe_of(folder: str) -> Any:
    """The recipe of a converted folder, whose window no option may contradict."""
    from respike.recipe import load_recipe

    for name in ("window_tokens", "sink_tokens"):
        if given(name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} means nothing beside --rest, which has its own")
    path = Path(folder) / "recipe.yaml"
    if not path.is_file():
        raise UsageError(
            f"--rest {folder}: has no recipe.yaml; expected a converted folder",
            hint="make one: respike convert MODEL FOLDER --recipe constant",
        )
    return load_recipe(str(path))


def _selection_text(scores: dict[str, Any]) -> str:
    rows = [(f"{i + 1}", f"{a}.{b}", why) for i, (a, b, why) in enumerate(scores["picked"])]
    measures = [
        (f"{r['kept']}", f"{r['kl_nats']:.4f}", f"{r['recall_nats']:.4f}") for r in scores["rounds"]
    ]
    picks = table(("pick", "layer.group", "for"), rows)
    course = table(("groups kept", "KL, nats a token", "recall, nats an answer"), measures)
    return f"{picks}\n\n{course}"
