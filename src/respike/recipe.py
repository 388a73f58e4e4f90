"""Recipes: what a person asks a conversion to do, as YAML, read and checked.

What they may say stands in `respike.recipe_options`, what it means for a model in
`respike.recipe_apply`.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from reprlib import Repr
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from respike.errors import RecipeError, did_you_mean
from respike.overrides import set_value
from respike.recipe_apply import apply_recipe
from respike.recipe_options import (
    BesideOptions,
    BlockOptions,
    DeltaOptions,
    Evenly,
    FarOptions,
    GlaOptions,
    LinearOptions,
    MoeOptions,
    Place,
    Recipe,
    Rule,
    Scaled,
    SinkOptions,
    SourceShape,
    SseOptions,
)
from respike.schema import Frozen

__all__ = [
    "Evenly",
    "Recipe",
    "Rule",
    "SourceShape",
    "apply_recipe",
    "builtin_recipes",
    "dump_recipe",
    "load_recipe",
    "recipe_text",
]

MAX_RECIPE_BYTES = 1 << 20


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with respike."""
    folder = resources.files("respike") / "recipes"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """A built-in recipe as it stands in its file.

    Raises:
        RecipeError: No recipe has this name.
    """
    known = builtin_recipes()
    if name not in known:
        raise RecipeError(
            f"no recipe {name!r}: neither a file nor one of {', '.join(known)}",
            hint=did_you_mean(name, known) or "run `respike recipes` to see what each one does",
        )
    return (resources.files("respike") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides.

    Args:
        name_or_path: A built-in's name or a YAML file.
        overrides: Such as ``window_tokens=128`` or ``layers.0.at.evenly=12``; values are YAML.

    Raises:
        RecipeError: Not found, not YAML, or not a recipe; says which key and what was expected.
    """
    path = Path(name_or_path)
    try:
        is_file = path.suffix in (".yaml", ".yml") or path.is_file()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if is_file:
        text, where = _read(path), str(path)
    else:
        text, where = recipe_text(name_or_path), name_or_path
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a 13th month
        line = " ".join(str(error).split())
        raise RecipeError(f"{where}: not valid YAML: {line}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a mapping, got a {type(raw).__name__}")
    for override in overrides:
        set_value(raw, override, RecipeError, "window_tokens=128")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, where) from error


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes, not a recipe")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path}: cannot be read: {error}", hint="run `respike recipes` for the built-in ones"
        ) from error


_SHORT = Repr()
_SHORT.maxlevel = 2


def _explain(error: ValidationError, where: str) -> RecipeError:
    # A misspelt key is also a missing one; unions report one error for each branch.
    first = max(
        _meant(error.errors()),
        key=lambda e: (
            e["type"] == "extra_forbidden",
            e["type"] != "literal_error",
            -len(e["loc"]),
        ),
    )
    union_tags = {"literal['all','rest','even','odd']", "Evenly", "Scaled", "literal['trained']"}
    union_tags.add("literal['head']")
    union_tags.add("literal['trained','unbounded']")
    union_tags |= {"int", "constrained-int"}
    loc = [p for p in first["loc"] if str(p) not in union_tags and "tuple" not in str(p)]
    path, got = ".".join(map(str, loc))[:200], first["input"]
    # YAML aliases make small files of huge values, so nothing may spell a value out.
    word = (got if isinstance(got, str) else _SHORT.repr(got))[:60]
    if first["type"] == "missing":
        return RecipeError(f"{where}: {path}: missing")
    if first["type"] == "extra_forbidden":
        known = _known_keys(loc)
        return RecipeError(
            f"{where}: {path}: unknown key; expected one of {', '.join(known)}",
            hint=did_you_mean(str(loc[-1]), known),
        )
    if loc and loc[-1] == "at":
        places = get_args(Place)
        return RecipeError(
            f"{where}: {path}: {word!r} is not one of {', '.join(places)}, "
            "a list of layers, {evenly: N}, or {layers: [...], of: N}",
            hint=did_you_mean(word, places),
        )
    names = re.findall("'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
    if names:
        return RecipeError(
            f"{where}: {path}: {word!r} is not one of {', '.join(names)}",
            hint=did_you_mean(word, names),
        )
    return RecipeError(f"{where}: {path}: {first['msg']}, got {word!r}")


def _meant(errors: Sequence[Any]) -> list[Any]:
    """Of a place's many forms the errors of the one that was meant.

    A mapping is {layers: .., of: ..} if it has either key, else {evenly: ..}.
    """

    def place(error: Any, form: str) -> tuple[Any, ...] | None:
        loc = error["loc"]
        inside = form in loc and loc.index(form) < len(loc) - 1
        return loc[: loc.index(form)] if inside else None

    absent = [place(e, "Scaled") for e in errors if e["type"] == "missing"]
    for error in errors:
        for form in ("Scaled", "Evenly"):
            where = place(error, form)
            scaled = absent.count(where) < len(Scaled.model_fields)
            if where is not None and scaled == (form == "Scaled"):
                return [e for e in errors if e["loc"][: len(where)] != where or form in e["loc"]]
    return list(errors)


def _known_keys(loc: Sequence[Any]) -> list[str]:
    if "at" in loc[:-1]:
        return [*Evenly.model_fields, *Scaled.model_fields]
    if loc[0] == "layers" and len(loc) > 1:
        return list(Rule.model_fields)
    parts: dict[str, type[Frozen]] = {
        "source": SourceShape, "far": FarOptions, "gla": GlaOptions, "delta": DeltaOptions,
        "blocks": BlockOptions, "sse": SseOptions, "beside": BesideOptions, "moe": MoeOptions,
        "learned_sinks": SinkOptions,
        "linear": LinearOptions,
    }  # fmt: skip
    if loc[0] in parts and len(loc) > 1:
        return list(parts[loc[0]].model_fields)
    return list(Recipe.model_fields)


def dump_recipe(recipe: Recipe, notes: Mapping[str, str] | None = None) -> str:
    """The recipe as YAML with every default written out; reading it back gives an equal recipe.

    Args:
        recipe: What to write.
        notes: Comment lines for the top, such as versions and hashes.
    """
    plain = recipe.model_dump(mode="json", exclude_none=True)
    plain["softmax_groups"] = {int(k): list(v) for k, v in sorted(recipe.softmax_groups.items())}
    plain["far"]["kept_by_group"] = recipe.far.kept_by_group
    lines = (" ".join(f"{key}: {value}".split()) for key, value in (notes or {}).items())
    head = "".join(f"# {line}\n" for line in lines)
    return head + yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=100)
