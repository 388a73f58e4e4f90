"""From a recipe and a model's shape to the config of the converted model."""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from respike.config import (
    AnyMemory,
    BesideConfig,
    BlockMixer,
    DeltaMemory,
    FarMemory,
    FullMixer,
    GlaMemory,
    LayerConfig,
    LinearMixer,
    Mixer,
    ModelConfig,
    MoeConfig,
    SseMemory,
    TiedMemory,
    WindowMixer,
)
from respike.errors import RecipeError
from respike.recipe_options import At, Evenly, MemoryName, Recipe, Rule, Scaled


def apply_recipe(recipe: Recipe, source: ModelConfig) -> ModelConfig:
    """The config of the converted model.

    Raises:
        RecipeError: The recipe was made for another shape, names layers or groups that are not
            there, or leaves a layer without a rule.
    """
    _check_source(recipe, source)
    _check_places(recipe, source.num_hidden_layers)
    _check_groups(recipe, source.num_hidden_layers, source.num_key_value_heads)
    _check_kept(recipe, source.num_hidden_layers)
    _check_moe(recipe, source)
    _check_sinks(recipe, source)
    layers = tuple(_layer(recipe, source, index) for index in range(source.num_hidden_layers))
    tie = source.tie_word_embeddings or recipe.retie
    changes = {"layers": layers, "tie_word_embeddings": tie}
    if recipe.learned_sinks.count:
        changes["learned_sinks"] = recipe.learned_sinks.count
    try:
        return ModelConfig.model_validate({**dict(source), **changes})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"recipe {recipe.name!r}: {reason}") from error


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


def _rule(recipe: Recipe, index: int, depth: int) -> Rule | None:
    """The first rule that matches a layer."""
    return next((rule for rule in recipe.layers if _matches(rule.at, index, depth)), None)


def _layer(recipe: Recipe, source: ModelConfig, index: int) -> LayerConfig:
    depth, everyone = source.num_hidden_layers, tuple(range(source.num_key_value_heads))
    rule = _rule(recipe, index, depth)
    if rule is None:
        raise RecipeError(
            f"recipe {recipe.name!r}: no rule matches layer {index}",
            hint="end the layers with {at: rest, mixer: full} or {at: rest, mixer: window}",
        )
    moe = _moe(recipe, index, depth) or source.layers[index].moe
    if rule.mixer == "keep":
        return source.layers[index].model_copy(update={"moe": moe})
    memory = _memory(recipe, source, rule, index)
    whole = rule.mixer in ("full", "blocks")
    kept = tuple(sorted(set(everyone if whole else recipe.softmax_groups.get(index, ()))))
    stream = tuple(g for g in everyone if g not in kept)
    near = _near(recipe, rule, source)
    mixers: list[Mixer] = []
    if kept and (rule.mixer == "blocks" or (rule.mixer != "full" and recipe.softmax == "blocks")):
        mixers.append(_blocks(recipe, source, kept, near))
    elif kept:
        beside = memory if rule.mixer == "full" else None
        assert beside is None or beside.kind != "far"
        mixers.append(FullMixer(groups=kept, memory=beside))
    if stream and rule.mixer == "linear":
        assert memory is not None
        assert memory.kind != "far"
        mixers.append(LinearMixer(groups=stream, memory=memory))
    elif stream and memory is not None and memory.kind == "far":
        mixers += _far(recipe, memory, stream, index, near)
    elif stream:
        mixers.append(WindowMixer(groups=stream, memory=memory, **near))
    return LayerConfig(mixers=tuple(mixers), beside=_beside(recipe, source, rule), moe=moe)


def _far(
    recipe: Recipe, memory: FarMemory, stream: tuple[int, ...], index: int, near: dict[str, Any]
) -> list[Mixer]:
    """Windows with far memories, one for all groups of a layer that keep as many tokens."""
    own = recipe.far.kept_by_group.get(index, {})
    groups_of: dict[int, list[int]] = {}
    for group in stream:
        groups_of.setdefault(own.get(group, memory.kept_tokens), []).append(group)
    return [
        WindowMixer(
            groups=tuple(groups), memory=memory.model_copy(update={"kept_tokens": count}), **near
        )
        for count, groups in groups_of.items()
    ]


def _beside(recipe: Recipe, source: ModelConfig, rule: Rule) -> BesideConfig | None:
    options = recipe.beside
    if rule.beside is None or options.projections == "shared":
        return None
    groups = source.num_key_value_heads
    if options.groups == "heads":
        groups = source.num_attention_heads
    memory = _named(rule.beside, recipe, source)
    assert memory is not None
    assert memory.kind != "far"
    return BesideConfig(
        num_key_value_heads=groups,
        mixers=(LinearMixer(groups=tuple(range(groups)), memory=memory),),
        merge=options.merge,
        softmax_dropout=options.softmax_dropout,
    )


def _moe(recipe: Recipe, index: int, depth: int) -> MoeConfig | None:
    options = recipe.moe
    if options is None or not _matches(options.at, index, depth):
        return None
    return MoeConfig(
        experts=options.experts,
        chosen=options.chosen,
        shared=options.shared,
        router=options.router,
        normalised=options.normalised,
    )


def _near(recipe: Recipe, rule: Rule, source: ModelConfig) -> dict[str, Any]:
    """What window and blocks mixers have in common: window, sinks, and how sinks are seen."""
    reach = recipe.sink_reach_tokens
    sinks = recipe.sink_tokens if rule.sink_tokens is None else rule.sink_tokens
    if sinks == "learned":
        sinks = recipe.learned_sinks.count
    return {
        "window_tokens": rule.window_tokens or recipe.window_tokens,
        "sink_tokens": sinks,
        "sink_reach_tokens": source.max_position_embeddings if reach == "trained" else reach,
    }


def _blocks(
    recipe: Recipe, source: ModelConfig, groups: tuple[int, ...], near: dict[str, Any]
) -> BlockMixer:
    options, trained = recipe.blocks, source.max_position_embeddings
    reach: int | None = None
    if options.reach_tokens == "trained":
        reach = trained
    elif options.reach_tokens != "unbounded":
        reach = options.reach_tokens
    return BlockMixer(
        groups=groups,
        block_tokens=options.block_tokens,
        summary_tokens=options.summary_tokens,
        top_blocks=options.top_blocks,
        reach_tokens=reach,
        true_tokens=trained if options.true_tokens == "trained" else options.true_tokens,
        cache=options.cache,
        by_head=options.by_head,
        dense_decode=options.dense_decode,
        **near,
    )


def _memory(recipe: Recipe, source: ModelConfig, rule: Rule, index: int) -> AnyMemory | None:
    """What the rule's mixer remembers, with the layer's own projections.

    Raises:
        RecipeError: A linear rule has no memory that can stand alone; or a memory beside softmax
            is to share projections that another memory has.
    """
    name = rule.memory or ("none" if rule.mixer == "full" else recipe.memory)
    if rule.mixer == "linear" and name in ("none", "far"):
        alone = [m for m in get_args(MemoryName) if m not in ("none", "far")]
        raise RecipeError(
            f"recipe {recipe.name!r}: layer {index} is linear with memory {name!r}, "
            f"expected one of {', '.join(alone)}",
            hint="far lives beside a window: {mixer: window, memory: far}",
        )
    if rule.beside is None or recipe.beside.projections == "separate":
        return _named(name, recipe, source)
    if rule.mixer == "blocks" or name != "none":
        raise RecipeError(
            f"recipe {recipe.name!r}: layer {index}: {rule.beside} cannot share the projections "
            f"of {'blocks' if rule.mixer == 'blocks' else f'memory {name}'}",
            hint="set beside.projections=separate",
        )
    return _named(rule.beside, recipe, source)


def _named(name: MemoryName, recipe: Recipe, source: ModelConfig) -> AnyMemory | None:
    if name == "far":
        return FarMemory(features=recipe.far.features, kept_tokens=recipe.far.kept_tokens)
    if name == "gla":
        gla = recipe.gla
        return GlaMemory(
            feature=gla.feature, gate_rank=gla.gate_rank, gate_normalizer=gla.gate_normalizer
        )
    if name == "tied":
        return TiedMemory()
    if name == "delta":
        return DeltaMemory(negative_eigenvalues=recipe.delta.negative_eigenvalues)
    if name == "sse":
        sse = recipe.sse
        rank = source.head_dim if sse.rank == "head" else sse.rank
        if sse.chosen > sse.partitions:
            raise RecipeError(
                f"recipe {recipe.name!r}: sse.chosen {sse.chosen} is more than sse.partitions "
                f"{sse.partitions}"
            )
        return SseMemory(partitions=sse.partitions, chosen=sse.chosen, rank=rank, gate=sse.gate)
    return None


def _matches(at: At, index: int, depth: int) -> bool:
    if at in ("all", "rest"):
        return True
    if at in ("even", "odd"):
        return index % 2 == (at == "odd")
    if isinstance(at, Evenly):
        count = min(at.evenly, depth)
        return index in {int((i + 0.5) * depth / count) for i in range(count)}
    if isinstance(at, Scaled):
        return index in {int((i + 0.5) * depth / at.of) for i in at.layers}
    assert not isinstance(at, str)
    return index in {i % depth for i in at}


def _check_places(recipe: Recipe, depth: int) -> None:
    places = {f"layers.{number}.at": rule.at for number, rule in enumerate(recipe.layers)}
    if recipe.moe is not None:
        places["moe.at"] = recipe.moe.at
    for where, at in places.items():
        for index in at if isinstance(at, tuple) else ():
            if not -depth <= index < depth:
                raise RecipeError(
                    f"recipe {recipe.name!r}: {where} names layer {index}, "
                    f"the model has layers 0 to {depth - 1}"
                )


def _check_moe(recipe: Recipe, source: ModelConfig) -> None:
    if recipe.moe is None:
        return
    if recipe.moe.chosen > recipe.moe.experts:
        raise RecipeError(
            f"recipe {recipe.name!r}: moe.chosen {recipe.moe.chosen} is more than moe.experts "
            f"{recipe.moe.experts}"
        )
    if any(layer.moe for layer in source.layers):
        raise RecipeError(f"recipe {recipe.name!r}: the source has experts already")


def _check_sinks(recipe: Recipe, source: ModelConfig) -> None:
    options = recipe.learned_sinks
    if options.count and source.learned_sinks:
        raise RecipeError(f"recipe {recipe.name!r}: the source has learned sinks already")
    if not options.count or options.start != "bos":
        return
    token = first_token(source)
    if token is None:
        raise RecipeError(
            f"recipe {recipe.name!r}: learned_sinks.start is bos, the source names no such token",
            hint="set learned_sinks.start=random",
        )
    if not 0 <= token < source.vocab_size:
        raise RecipeError(
            f"recipe {recipe.name!r}: learned_sinks.start is bos, which is token {token} of "
            f"{source.vocab_size:,}",
            hint="set learned_sinks.start=random",
        )


def first_token(source: ModelConfig) -> int | None:
    """The token that begins a text, or else ends one: what stands first in training."""
    if source.bos_token_id is not None:
        return source.bos_token_id
    return source.eos_token_ids[0] if source.eos_token_ids else None


def _check_groups(recipe: Recipe, depth: int, num_groups: int) -> None:
    named: dict[str, Mapping[int, Iterable[int]]] = {
        "softmax_groups": recipe.softmax_groups,
        "far.kept_by_group": recipe.far.kept_by_group,
    }
    for field, layers in named.items():
        for index, groups in layers.items():
            if not 0 <= index < depth:
                raise RecipeError(
                    f"recipe {recipe.name!r}: {field} names layer {index}, "
                    f"the model has layers 0 to {depth - 1}"
                )
            for group in groups:
                if not 0 <= group < num_groups:
                    raise RecipeError(
                        f"recipe {recipe.name!r}: {field}.{index} names KV group {group}, "
                        f"the model has groups 0 to {num_groups - 1}"
                    )
    for index, groups in recipe.softmax_groups.items():
        rule = _rule(recipe, index, depth)
        if groups and rule is not None and rule.mixer == "keep":
            raise RecipeError(
                f"recipe {recipe.name!r}: softmax_groups names layer {index}, whose rule keeps "
                "what the source has there",
                hint="leave that layer out of one of them",
            )


def _check_kept(recipe: Recipe, depth: int) -> None:
    """No group without a far memory is told how many tokens to keep."""
    for index, groups in recipe.far.kept_by_group.items():
        rule = _rule(recipe, index, depth)
        far = rule is None or (rule.mixer == "window" and (rule.memory or recipe.memory) == "far")
        for group in groups:
            if not far or group in recipe.softmax_groups.get(index, ()):
                why = "its layer has none" if not far else "it keeps softmax"
                raise RecipeError(
                    f"recipe {recipe.name!r}: far.kept_by_group.{index} names KV group {group}, "
                    f"which has no far memory to keep tokens beside: {why}",
                    hint="leave that group out, or set far.kept_by_group={}",
                )
