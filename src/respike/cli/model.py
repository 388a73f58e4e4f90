"""Verbs that look without running: inspect, recipes, doctor."""

import platform
from dataclasses import asdict
from typing import Any

import click
import yaml

from respike.cli.show import echo_json, human_bytes, json_option, pairs, table


@click.command("inspect")
@click.argument("model")
@json_option
def inspect_command(model: str, as_json: bool) -> None:
    """What MODEL is: family, layers, mixers, parameters, bytes, state bytes per token."""
    from respike.account import (
        REPORT_LENGTHS,
        growth_bytes_per_token,
        num_active_parameters,
        num_parameters,
        state_bytes,
    )
    from respike.checkpoint import Folder, open_checkpoint
    from respike.conversion.plan import layer_table
    from respike.device import dtype_name
    from respike.models.engine import engine_layers
    from respike.models.spiking import how_it_runs

    source = open_checkpoint(model)
    config = source.config
    groups = config.num_hidden_layers * config.num_key_value_heads
    figures: dict[str, Any] = {
        "model": source.path.resolve().name,
        "kind": "folder" if isinstance(source, Folder) else "gguf",
        "family": config.family,
        "converted": isinstance(source, Folder)
        and source.raw_config.get("model_type") == "respike",
        "parameters": num_parameters(config),
        "active_parameters": num_active_parameters(config),
        "file_bytes": sum(f.stat().st_size for f in source.files),
        "compute_dtype": dtype_name(source.stored_dtype),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_groups": groups,
        "softmax_groups": len(config.softmax_groups()),
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "trained_tokens": config.max_position_embeddings,
        "rope": f"{config.rope.kind}, theta {config.rope.theta:g}",
        "tied_embedding": config.tie_word_embeddings,
        "license": source.license,
        "growth_bytes_per_token": growth_bytes_per_token(config),
        "state_bytes": {str(n): state_bytes(config, n) for n in REPORT_LENGTHS},
        "engine_layers": engine_layers(config),
        "mixers": [{"layers": a, "mixers": b} for a, b in layer_table(config)],
        "spikes": config.spikes
        and {"neuron": config.spikes.neuron, "runs": how_it_runs(config.spikes)},
        "unknown_keys": list(source.unknown_keys) if isinstance(source, Folder) else [],
    }
    if as_json:
        echo_json(figures)
        return
    rope, heads = config.rope, config.num_attention_heads
    shown = [
        ("model", figures["model"]),
        ("kind", figures["kind"] + ", converted by respike" * figures["converted"]),
        ("family", config.family),
        ("parameters", f"{figures['parameters']:,}"),
        ("weight files", human_bytes(figures["file_bytes"])),
        ("computes in", figures["compute_dtype"]),
        ("layers", config.num_hidden_layers),
        ("width", config.hidden_size),
        ("heads a layer", f"{heads}, in {config.num_key_value_heads} KV groups"),
        ("head dim", config.head_dim),
        ("softmax groups", f"{figures['softmax_groups']} of {groups} KV groups"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("trained length", f"{config.max_position_embeddings:,} tokens"),
        ("rotary", f"{rope.kind}, theta {rope.theta:,.0f}"),
        ("output matrix", "the embedding" if config.tie_word_embeddings else "its own"),
        ("licence", figures["license"]),
        ("state growth", f"{figures['growth_bytes_per_token']:,} bytes a token (bf16)"),
    ]
    if figures["active_parameters"] != figures["parameters"]:
        shown.insert(4, ("active a token", f"{figures['active_parameters']:,}"))
    if figures["engine_layers"]["native"] != config.num_hidden_layers:
        how = ", ".join(f"{n} {what}" for what, n in figures["engine_layers"].items() if n)
        shown.append(("engine", f"{how} of {config.num_hidden_layers} layers"))
    if config.spikes:
        shown.append(("spikes", f"{config.spikes.neuron}; {how_it_runs(config.spikes)}"))
    click.echo(pairs(shown))
    click.echo("\n" + table(("layers", "mixers"), layer_table(config)))
    rows = [(f"{n:,}", human_bytes(state_bytes(config, n))) for n in REPORT_LENGTHS]
    click.echo("\n" + table(("tokens", "state (bf16)"), rows))
    if figures["unknown_keys"]:
        click.echo(f"\nconfig.json keys respike does not use: {', '.join(figures['unknown_keys'])}")


@click.command("recipes")
@click.argument("name", required=False)
@json_option
def recipes_command(name: str | None, as_json: bool) -> None:
    """List the built-in recipes, or print the one called NAME."""
    from respike.recipe import builtin_recipes, load_recipe, recipe_text

    if name:
        text = recipe_text(name)
        if as_json:
            echo_json(yaml.safe_load(text))
        else:
            click.echo(text, nl=False)
        return
    recipes = [load_recipe(n) for n in builtin_recipes()]
    if as_json:
        echo_json([r.model_dump(mode="json") for r in recipes])
        return
    for recipe in recipes:
        click.echo(
            f"{recipe.name}"
            + (f"  (measured on {recipe.measured_on})" if recipe.measured_on else "")
        )
        click.echo(click.wrap_text(recipe.about, 78, "  ", "  "))


def _engine() -> str:
    """What runs models on this processor, and why."""
    import torch

    from respike.models.engine import engine_obstacle

    obstacle = engine_obstacle(torch.bfloat16, torch.device("cpu"))
    if obstacle is not None:
        return f"torch ({obstacle})"
    return "native for f32 and bf16 on cpu, torch for other dtypes and devices"


@click.command("doctor")
@json_option
def doctor_command(as_json: bool) -> None:
    """What this machine can run: devices, kernels, and why each other one does not run."""
    import torch

    from respike import __version__
    from respike.device import (
        available_devices,
        build_of_torch,
        compute_dtype,
        set_threads,
        vendor_packages,
    )
    from respike.ops import backends

    plain = {
        "respike": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_build": build_of_torch(),
        "threads": set_threads(None),
        "devices": available_devices(),
        "engine": _engine(),
        "courses_compute_in": compute_dtype(),
        "cpu_features": sorted(k for k, v in backends.cpu_features().items() if v),
        "amx": backends.amx_status(),
        "vendor_packages": vendor_packages(),
    }
    if as_json:
        echo_json({**plain, "kernels": [asdict(c) for c in backends.table()]})
        return
    listed = {k: ", ".join(v) or "none" if isinstance(v, list) else v for k, v in plain.items()}
    click.echo(pairs([(k.replace("_", " "), v) for k, v in listed.items()]))
    rows = [
        (c.op, f"{c.backend} {c.level or ''}".strip(), other, why)
        for c in backends.table()
        for other, why in c.others.items()
    ]
    click.echo("\n" + table(("op", "runs as", "other", "why not, or when"), rows))
