"""From a recipe and a model's shape to the config of the converted model."""

from collections.abc import Iterable
from typing import Any

from respike.config import (
    MEMORIES,
    AnyMemory,
    BlockMixer,
    DeltaMemory,
    FarMemory,
    FullMixer,
    GlaMemory,
    LayerConfig,
    LinearMixer,
    Mixer,
    ModelConfig,
    TiedMemory,
    WindowMixer,
)
from respike.errors import RecipeError
from respike.recipe_options import Evenly, Place, Recipe, Rule


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
