"""The verb that makes recipes by measurement: select."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from respike.cli.show import (
    data_option,
    echo_json,
    given,
    json_option,
    load_options,
    need_matplotlib,
    number_option,
    progress,
    refuse_existing,
    refuse_unused,
    run_options,
    table,
    text_of,
)
from respike.errors import UsageError

KEPT_CONTEXT_TOKENS, KEPT_TEXTS = 4096, 3
"""Of text, with --kept-tokens, unless told otherwise: what a few hundred tokens miss must show.
Contexts are no longer than the source was trained for."""


@click.command("select")
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="FILE", help="Recipe to write (.yaml).")
@click.option(
    "--softmax-groups",
    type=int,
    metavar="N",
    help="Choose so many KV groups, of all layers together, that keep full softmax.",
)
@click.option(
    "--kept-tokens",
    type=int,
    metavar="N",
    help="Share out so many kept tokens a group, in the mean, among the far memories of --recipe.",
)
@click.option("--recipe", metavar="NAME|FILE", help="What --kept-tokens is measured for.")
@data_option("Text file")
@number_option("--window-tokens", 256, "Window of all other KV groups.")
@number_option("--sink-tokens", 4, "First tokens that those groups keep.", least=0)
@click.option(
    "--rest",
    metavar="FOLDER",
    help="Conversion of MODEL by the recipe constant: what those groups become, memories too.  "
    "[default: a window]",
)
@number_option(
    "--context-tokens", 1024, "Length of a piece of text; 4096 for kept tokens.", least=2
)
@number_option("--max-tokens", 3072, "Tokens of text in all; 12288 for kept tokens.")
@number_option("--copy-trials", 4, "Sequences of the copying probe.")
@number_option("--passkey-trials", 4, "Sequences of the passkey probe.", least=0)
@click.option("--heat-map/--no-heat-map", default=True, help="Draw the scores beside the recipe.")
@click.option("--force", is_flag=True, help="Replace the output files.")
@run_options
@json_option
def select_command(model: str, output: str, **options: Any) -> None:
    """Measure which KV groups of MODEL carry recall; write a recipe that keeps them.

    With --kept-tokens: how many tokens each group with a far memory should keep as they are. Beside
    the recipe FILE.yaml it writes FILE.scores.json, every score, and FILE.png, a heat map.
    """
    from respike.device import set_threads
    from respike.files import replace_text
    from respike.recipe import dump_recipe
    from respike.recipe_options import MAX_NAME

    _check_question(options)
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
    measure = _measure_groups if options["kept_tokens"] is None else _measure_kept
    found = measure(model, recipe_path.stem, options)
    name = Path(model).resolve().name
    replace_text(scores_path, json.dumps(found.scores, indent=1) + "\n")
    replace_text(recipe_path, dump_recipe(found.recipe, {"measured on": name}))
    if options["heat_map"]:
        found.draw(map_path)
    if options["as_json"]:
        echo_json(found.scores)
        return
    click.echo(found.shown)
    for path in wanted:
        click.echo(f"wrote {path}", err=True)
    click.echo(f"next: respike convert {model} OUT --recipe {recipe_path}", err=True)


def _check_question(options: dict[str, Any]) -> None:
    """One of two things is measured; the other's options mean nothing."""
    if (options["softmax_groups"] is None) == (options["kept_tokens"] is None):
        raise UsageError(
            "expected one of --softmax-groups N (which groups keep softmax) and --kept-tokens N "
            "--recipe NAME (how many tokens the others keep)"
        )
    if options["kept_tokens"] is None:
        refuse_unused(("recipe",), "without --kept-tokens")
        return
    if options["recipe"] is None:
        raise UsageError(
            "--kept-tokens needs --recipe, whose far memories keep them",
            hint="add --recipe retrieval-keep",
        )
    groups_only = ("window_tokens", "sink_tokens", "rest", "copy_trials", "passkey_trials")
    refuse_unused(groups_only, "beside --kept-tokens")


class _Measured(NamedTuple):
    recipe: Any
    scores: dict[str, Any]
    draw: Callable[[Path], None]
    shown: str


def _measure_groups(model: str, name: str, options: dict[str, Any]) -> _Measured:
    from respike.loading import load
    from respike.selection import Budget, select, selected_recipe

    rest_recipe = _recipe_of(options["rest"]) if options["rest"] else None
    loaded = load(model, **load_options(options))
    rest = load(options["rest"], **load_options(options)).decoder if options["rest"] else None
    text = text_of(loaded, options)
    budget = Budget(
        softmax_groups=options["softmax_groups"],
        window_tokens=rest_recipe.window_tokens if rest_recipe else options["window_tokens"],
        sink_tokens=rest_recipe.sink_tokens if rest_recipe else options["sink_tokens"],
        copy_trials=options["copy_trials"],
        passkey_trials=options["passkey_trials"],
    )
    with progress("measuring") as step:
        selection = select(loaded.decoder, loaded.tokenizer, text, budget, step, rest)
    measured_on = Path(model).resolve().name
    recipe = selected_recipe(selection, budget, loaded.config, name, measured_on, rest_recipe)
    scores = selection.as_dict()

    def draw(path: Path) -> None:
        from respike.selection.heat_map import draw_selection

        draw_selection(selection, loaded.config, path)

    return _Measured(recipe, scores, draw, _selection_text(scores))


def _measure_kept(model: str, name: str, options: dict[str, Any]) -> _Measured:
    from respike.loading import load
    from respike.recipe import apply_recipe, load_recipe
    from respike.selection import recipe_with_shares, share_kept_tokens

    uniform = ("far.kept_by_group={}", f"far.kept_tokens={options['kept_tokens']}")
    recipe = load_recipe(options["recipe"], uniform)
    loaded = load(model, **load_options(options))
    converted = apply_recipe(recipe, loaded.config)
    if not given("context_tokens"):
        trained_tokens = loaded.config.max_position_embeddings
        options["context_tokens"] = min(KEPT_CONTEXT_TOKENS, trained_tokens)
    if not given("max_tokens"):
        options["max_tokens"] = KEPT_TEXTS * options["context_tokens"]
    text = text_of(loaded, options)
    with progress("measuring") as step:
        shares = share_kept_tokens(loaded.decoder, converted, text, step)
    measured_on = Path(model).resolve().name
    made = recipe_with_shares(shares, recipe, loaded.config, name, measured_on)

    def draw(path: Path) -> None:
        from respike.selection.heat_map import draw_kept

        draw_kept(shares, loaded.config, path)

    return _Measured(made, shares.as_dict(), draw, _kept_text(shares.as_dict()))


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


def _kept_text(scores: dict[str, Any]) -> str:
    by_count: dict[int, list[str]] = {}
    for name, count in scores["kept"].items():
        by_count.setdefault(count, []).append(name)
    groups = [(f"{n:,}", " ".join(by_count[n])) for n in sorted(by_count, reverse=True)]
    missed = [
        (f"{scores['kept_tokens']} each", f"{100 * scores['missed_even_frac']:.2f}"),
        ("shared out", f"{100 * scores['missed_shared_frac']:.2f}"),
    ]
    kept = table(("tokens", "layer.group"), groups)
    return f"{kept}\n\n{table(('kept tokens', 'attention missed, % of a group'), missed)}"
