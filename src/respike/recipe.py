"""Recipes: what a person asks a conversion to do, as YAML, checked and applied to a model's shape.

The rules are read top to bottom and the first that matches a layer decides its mixer; then the
KV groups in ``softmax_groups`` keep softmax whatever their layer's rule says.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from respike.config import (
    MEMORIES,
    AnyMemory,
    BlockCount,
    BlockMixer,
    BlockTokens,
    DeltaMemory,
    FarMemory,
    FeatureCount,
    Frozen,
    FullMixer,
    GateNormalizer,
    GateRank,
    GlaMemory,
    LayerConfig,
    LinearMixer,
    Mixer,
    ModelConfig,
    ReachTokens,
    SinkTokens,
    TiedMemory,
    WindowMixer,
    WindowTokens,
)
from respike.errors import RecipeError, did_you_mean

MAX_RECIPE_BYTES = 1 << 20
Place = Literal["all", "rest", "even", "odd"]
MemoryName = Literal["none", "far", "gla", "tied", "delta"]
HalfLife = Annotated[float, Field(ge=2**-10, le=1 << 32)]


class Evenly(Frozen):
    """``count`` layers spread evenly over the depth."""

    evenly: int = Field(gt=0)


class Rule(Frozen):
    """Which mixer the layers at some places get."""

    at: Place | Evenly | tuple[int, ...]
    """all or rest, even or odd, {evenly: N}, or a list of indices (negative from the end)."""
    mixer: Literal["keep", "full", "blocks", "window", "linear"]
    """keep: what the source has there. linear: a memory without softmax."""
    memory: MemoryName | None = None
    """Of a window or linear rule. None: the recipe's."""
    window_tokens: WindowTokens | None = None
    """Of a window or blocks rule. None: the recipe's."""
    sink_tokens: SinkTokens | None = None
    """None: the recipe's."""

    @model_validator(mode="after")
    def _memory_has_a_home(self) -> "Rule":
        if self.memory is not None and self.mixer not in ("window", "linear"):
            raise ValueError(f"memory means nothing to mixer {self.mixer}")
        return self


class FarOptions(Frozen):
    """How far memories are made; see `respike.ops.far`."""

    features: FeatureCount = 64
    """Prototypes of each KV group."""
    half_life_lengths: HalfLife = 4.0
    """Tokens after which half of a memory is left, in trained lengths of the source."""
    calibration_tokens: int = Field(default=0, ge=0, le=1 << 24)
    """Text on which prototypes and gates are fitted; 0 leaves every gate shut."""


class GlaOptions(Frozen):
    """How gated linear attention is made."""

    feature: Literal["relu", "identity"] = "relu"
    gate_rank: GateRank = 16
    gate_normalizer: GateNormalizer = 16.0
    half_life_tokens: HalfLife = 4096.0
    """Of the memory before any training, the same for every channel."""


class DeltaOptions(Frozen):
    """How gated delta rules are made."""

    negative_eigenvalues: bool = False
    half_life_tokens: HalfLife = 4096.0
    """Of the memory before any training."""


class BlockOptions(Frozen):
    """How block-sparse softmax is made; see `respike.ops.blocks`."""

    block_tokens: BlockTokens = 16
    summary_tokens: BlockTokens = 16
    """Keys averaged in a summary; divides ``block_tokens``."""
    top_blocks: BlockCount = 64
    """Blocks outside the window that each token sees."""
    reach_tokens: ReachTokens | Literal["trained", "unbounded"] = "trained"
    """Largest distance at which those are seen. trained: the source's trained length; unbounded:
    their true one."""
    cache: Literal["model", "int8"] = "model"
    """model: keys and values are kept in the model's dtype."""

    @model_validator(mode="after")
    def _whole_summaries(self) -> "BlockOptions":
        if self.block_tokens % self.summary_tokens:
            raise ValueError(
                f"block_tokens {self.block_tokens} is not a multiple of summary_tokens "
                f"{self.summary_tokens}"
            )
        return self


class SourceShape(Frozen):
    """The shape of the model a recipe was made for; any other is refused."""

    family: str
    num_hidden_layers: int
    num_key_value_heads: int
    hidden_size: int


class Recipe(Frozen):
    """A conversion, complete but for the weights."""

    recipe: Literal[1]
    """Version of this schema."""
    name: str = Field(min_length=1, max_length=100)
    about: str = ""
    measured_on: str = ""
    """The model whose figures the recipe's text quotes."""
    source: SourceShape | None = None
    """None: fits every model."""
    layers: tuple[Rule, ...]
    window_tokens: WindowTokens = 256
    """Sliding window, self included, of every window rule without its own."""
    sink_tokens: SinkTokens = 4
    sink_reach_tokens: ReachTokens | Literal["trained"] = "trained"
    """Largest distance at which sinks are seen; trained: the source's trained length."""
    softmax_groups: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    """Layer -> KV groups that keep softmax over all that came before: the retrieval groups."""
    softmax: Literal["full", "blocks"] = "full"
    """How those see it: all of it, or sinks, window and the best blocks of the rest."""
    blocks: BlockOptions = BlockOptions()
    memory: MemoryName = "none"
    """What window and linear rules without their own remember beyond the window."""
    far: FarOptions = FarOptions()
    gla: GlaOptions = GlaOptions()
    delta: DeltaOptions = DeltaOptions()
    weights: Literal["f32", "bf16", "f16"] = "bf16"
    """Dtype in which the converted weights are stored."""
    retie: bool = False
    """Drop a separately stored output matrix and use the embedding instead."""


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
    if path.suffix in (".yaml", ".yml") or path.is_file():
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
        _override(raw, override)
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


def _override(raw: dict[Any, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: expected KEY=VALUE, such as window_tokens=128")
    node: Any = raw
    try:
        new = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--set {override!r}: {value!r} is not valid YAML") from error
    try:
        *parents, last = [int(p) if p.lstrip("-").isdigit() else p for p in key.split(".")]
        for part in parents:
            if isinstance(node, dict) and part not in node:
                node[part] = {}
            node = node[part]
        node[last] = new
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RecipeError(f"--set {override!r}: the recipe has no such place") from error


_SHORT = Repr()
_SHORT.maxlevel = 2


def _explain(error: ValidationError, where: str) -> RecipeError:
    # A misspelt key is also a missing one; unions report one error for each branch.
    first = max(
        error.errors(),
        key=lambda e: (
            e["type"] == "extra_forbidden",
            e["type"] != "literal_error",
            -len(e["loc"]),
        ),
    )
    union_tags = {"literal['all','rest','even','odd']", "Evenly", "literal['trained']"}
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
            "a list of layers, or {evenly: N}",
            hint=did_you_mean(word, places),
        )
    names = re.findall("'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
    if names:
        return RecipeError(
            f"{where}: {path}: {word!r} is not one of {', '.join(names)}",
            hint=did_you_mean(word, names),
        )
    return RecipeError(f"{where}: {path}: {first['msg']}, got {word!r}")


def _known_keys(loc: Sequence[Any]) -> list[str]:
    if "at" in loc[:-1]:
        return list(Evenly.model_fields)
    if loc[0] == "layers" and len(loc) > 1:
        return list(Rule.model_fields)
    parts: dict[str, type[Frozen]] = {
        "source": SourceShape, "far": FarOptions, "gla": GlaOptions, "delta": DeltaOptions,
        "blocks": BlockOptions,
    }  # fmt: skip
    if loc[0] in parts and len(loc) > 1:
        return list(parts[loc[0]].model_fields)
    return list(Recipe.model_fields)


def apply_recipe(recipe: Recipe, source: ModelConfig) -> ModelConfig:
    """The config of the converted model.

    Raises:
        RecipeError: The recipe was made for another shape, names layers or groups that are not
            there, or leaves a layer without a rule.
    """
    _check_source(recipe, source)
    _check_places(recipe, source.num_hidden_layers)
    _check_groups(recipe, source.num_hidden_layers, source.num_key_value_heads)
    layers = tuple(_layer(recipe, source, index) for index in range(source.num_hidden_layers))
    tie = source.tie_word_embeddings or recipe.retie
    return source.model_copy(update={"layers": layers, "tie_word_embeddings": tie})


def _check_source(recipe: Recipe, source: ModelConfig) -> None:
    if recipe.source is None:
        return
    for field, wanted in recipe.source:
        if getattr(source, field) != wanted:
            raise RecipeError(
                f"recipe {recipe.name!r} was measured on {recipe.measured_on or 'another model'} "
                f"({field} {wanted}), this model has {field} {getattr(source, field)}",
                hint="run `respike select MODEL -o my.yaml --softmax-groups N` to measure your own",
            )


def _layer(recipe: Recipe, source: ModelConfig, index: int) -> LayerConfig:
    depth, everyone = source.num_hidden_layers, tuple(range(source.num_key_value_heads))
    rule = next((r for r in recipe.layers if _matches(r.at, index, depth)), None)
    if rule is None:
        raise RecipeError(
            f"recipe {recipe.name!r}: no rule matches layer {index}",
            hint="end the layers with {at: rest, mixer: full} or {at: rest, mixer: window}",
        )
    if rule.mixer == "keep":
        return source.layers[index]
    memory = _memory(recipe, rule, index)
    whole = rule.mixer in ("full", "blocks")
    kept = tuple(sorted(set(everyone if whole else recipe.softmax_groups.get(index, ()))))
    stream = tuple(g for g in everyone if g not in kept)
    near = _near(recipe, rule, source)
    mixers: list[Mixer] = []
    if kept and (rule.mixer == "blocks" or (rule.mixer != "full" and recipe.softmax == "blocks")):
        mixers.append(_blocks(recipe, source, kept, near))
    elif kept:
        mixers.append(FullMixer(groups=kept))
    if stream and rule.mixer == "linear":
        assert memory is not None
        assert memory.kind != "far"
        mixers.append(LinearMixer(groups=stream, memory=memory))
    elif stream:
        mixers.append(WindowMixer(groups=stream, memory=memory, **near))
    return LayerConfig(mixers=tuple(mixers))


def _near(recipe: Recipe, rule: Rule, source: ModelConfig) -> dict[str, Any]:
    """What window and blocks mixers have in common: window, sinks, and how sinks are seen."""
    reach = recipe.sink_reach_tokens
    return {
        "window_tokens": rule.window_tokens or recipe.window_tokens,
        "sink_tokens": recipe.sink_tokens if rule.sink_tokens is None else rule.sink_tokens,
        "sink_reach_tokens": source.max_position_embeddings if reach == "trained" else reach,
    }


def _blocks(
    recipe: Recipe, source: ModelConfig, groups: tuple[int, ...], near: dict[str, Any]
) -> BlockMixer:
    options = recipe.blocks
    reach: int | None = None
    if options.reach_tokens == "trained":
        reach = source.max_position_embeddings
    elif options.reach_tokens != "unbounded":
        reach = options.reach_tokens
    return BlockMixer(
        groups=groups,
        block_tokens=options.block_tokens,
        summary_tokens=options.summary_tokens,
        top_blocks=options.top_blocks,
        reach_tokens=reach,
        cache=options.cache,
        **near,
    )


def _memory(recipe: Recipe, rule: Rule, index: int) -> AnyMemory | None:
    """What the rule's mixer remembers.

    Raises:
        RecipeError: A linear rule has no memory that can stand alone.
    """
    name = rule.memory or recipe.memory
    if rule.mixer == "linear" and name in ("none", "far"):
        alone = [m for m in MEMORIES if m != "far"]
        raise RecipeError(
            f"recipe {recipe.name!r}: layer {index} is linear with memory {name!r}, "
            f"expected one of {', '.join(alone)}",
            hint="far lives beside a window: {mixer: window, memory: far}",
        )
    if name == "far":
        return FarMemory(features=recipe.far.features)
    if name == "gla":
        gla = recipe.gla
        return GlaMemory(
            feature=gla.feature, gate_rank=gla.gate_rank, gate_normalizer=gla.gate_normalizer
        )
    if name == "tied":
        return TiedMemory()
    if name == "delta":
        return DeltaMemory(negative_eigenvalues=recipe.delta.negative_eigenvalues)
    return None


def _matches(at: Place | Evenly | Iterable[int], index: int, depth: int) -> bool:
    if at in ("all", "rest"):
        return True
    if at in ("even", "odd"):
        return index % 2 == (at == "odd")
    if isinstance(at, Evenly):
        count = min(at.evenly, depth)
        return index in {int((i + 0.5) * depth / count) for i in range(count)}
    assert not isinstance(at, str)
    return index in {i % depth for i in at}


def _check_places(recipe: Recipe, depth: int) -> None:
    for number, rule in enumerate(recipe.layers):
        for index in rule.at if isinstance(rule.at, tuple) else ():
            if not -depth <= index < depth:
                raise RecipeError(
                    f"recipe {recipe.name!r}: layers.{number}.at names layer {index}, "
                    f"the model has layers 0 to {depth - 1}"
                )


def _check_groups(recipe: Recipe, depth: int, num_groups: int) -> None:
    for index, groups in recipe.softmax_groups.items():
        if not 0 <= index < depth:
            raise RecipeError(
                f"recipe {recipe.name!r}: softmax_groups names layer {index}, "
                f"the model has layers 0 to {depth - 1}"
            )
        for group in groups:
            if not 0 <= group < num_groups:
                raise RecipeError(
                    f"recipe {recipe.name!r}: softmax_groups.{index} names KV group {group}, "
                    f"the model has groups 0 to {num_groups - 1}"
                )


def dump_recipe(recipe: Recipe, notes: Mapping[str, str] | None = None) -> str:
    """The recipe as YAML with every default written out; reading it back gives an equal recipe.

    Args:
        recipe: What to write.
        notes: Comment lines for the top, such as versions and hashes.
    """
    plain = recipe.model_dump(mode="json", exclude_none=True)
    plain["softmax_groups"] = {int(k): list(v) for k, v in sorted(recipe.softmax_groups.items())}
    lines = (" ".join(f"{key}: {value}".split()) for key, value in (notes or {}).items())
    head = "".join(f"# {line}\n" for line in lines)
    return head + yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=100)
