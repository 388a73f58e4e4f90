"""From a model to a folder that spikes: calibrate, install, measure on other text, write."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from respike.checkpoint import open_checkpoint
from respike.config import SpikeConfig
from respike.conversion import check_out, convert
from respike.conversion.plan import plan_as_it_is
from respike.device import dtype_name
from respike.errors import DataError, UsageError
from respike.evaluation.distance import Reference
from respike.loading import load_decoder, load_tokenizer
from respike.models.decoder import Decoder
from respike.models.spiking import how_it_runs, install_spikes
from respike.spiking.calibrate import Goal, calibrate
from respike.spiking.census import Census
from respike.spiking.energy import energy_estimate
from respike.text import contexts
from respike.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called with (what is done, done, total)."""

RASTERS = ("raster_tokens.png", "raster_steps.png")


@dataclass(frozen=True)
class Measure:
    """On what text to calibrate and to measure, and how.

    Attributes:
        data: Text files; contexts of theirs go to calibration and measuring in turn. None takes
            the two halves of `respike.text.builtin_text`.
        context_tokens: Length of a context.
        calibration_tokens: Tokens to calibrate on.
        held_out_tokens: Other tokens to measure on.
        device: Where to compute.
        dtype: In what; None takes the checkpoint's.
    """

    data: Sequence[str | Path] = ()
    context_tokens: int = 512
    calibration_tokens: int = 2048
    held_out_tokens: int = 4096
    device: str = "cpu"
    dtype: str | None = None


def spike(
    model: str | Path,
    out: str | Path,
    goal: Goal,
    measure: Measure | None = None,
    *,
    rasters: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a spiking copy of ``model`` to the folder ``out``.

    Args:
        model: A folder or GGUF file that does not spike.
        out: Folder to create.
        goal: Which neurons, and how silent.
        measure: On what text.
        rasters: Draw what was fired (needs matplotlib; the rival has no spikes to draw).
        force: Replace ``out`` if respike wrote it and it holds nothing else.
        progress: Called as things get done.

    Returns:
        The ``spikes`` part of the folder's ``report.json``; ``without_spikes`` lists what fails the
        check that every layer listed spikes.

    Raises:
        UsageError: ``out`` exists, the model spikes already, or the goal cannot be.
        DataError: There is too little text.
        CheckpointError: The model cannot be read, or ``out`` not written.
    """
    measure = measure or Measure()
    goal.check()
    source, out = open_checkpoint(model), Path(out)
    if source.config.spikes:
        raise UsageError(f"{model}: spikes already", hint="start from what it was made of")
    check_out(out, source.path, force)
    tell = progress or (lambda *_: None)
    tokenizer = load_tokenizer(source)
    fit, held = _texts(measure, tokenizer)
    decoder = load_decoder(source, device=measure.device, dtype=measure.dtype)
    reference = Reference(decoder, held, lambda i, n: tell("original", i, n))
    config, facts = calibrate(decoder, fit, goal, lambda i, n: tell("probing sites", i, n))
    install_spikes(decoder, config)
    found: dict[str, Any] = {
        "goal": {"silent_frac": goal.silent_frac, "kl_nats": goal.kl_nats, "budget": goal.budget},
        "text": _text_facts(measure, fit, held),
        "calibration": facts,
        **_fired(decoder, config, reference, lambda i, n: tell("spiking", i, n)),
    }

    def finish(folder: Path) -> dict[str, Any]:
        if rasters and goal.neuron != "teal":
            _draw(decoder, held[0], folder)
        return {"spikes": found}

    convert(plan_as_it_is(source, spikes=config), out, force=force, also=finish)
    return found


def recount(
    decoder: Decoder, original: Decoder, tokenizer: Tokenizer, measure: Measure | None = None
) -> dict[str, Any]:
    """What `spike` reports of a folder, of a decoder whose weights or bands have changed since.

    Args:
        decoder: One that spikes, as its folder is loaded.
        original: What its distance is taken to.
        tokenizer: Of both.
        measure: On what text; ``calibration_tokens`` are left out of it.
    """
    measure, config = measure or Measure(), decoder.config.spikes
    assert config is not None
    fit, held = _texts(measure, tokenizer)
    return {
        "text": _text_facts(measure, fit, held),
        **_fired(decoder, config, Reference(original, held)),
    }


def _fired(
    decoder: Decoder,
    config: SpikeConfig,
    reference: Reference,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Everything a decoder's neurons did on the contexts of a reference, and what it cost."""
    census = Census(decoder)
    with census.watching():
        distance = reference.compare(decoder, progress)
    figures = census.figures()
    found: dict[str, Any] = {
        "neuron": config.model_dump(mode="json", exclude={"layers"}),
        "runs": how_it_runs(config),
        "compute_dtype": dtype_name(decoder.embedding.dtype),
        "distance": distance.bucket(0, reference.contexts.shape[1]),
        **figures,
    }
    if "weight_bytes" in figures["total"] and "additions" in figures["total"]:
        found["energy"] = energy_estimate(figures["total"])
    return found


def _texts(measure: Measure, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Contexts to calibrate on, and others to measure on."""
    length = measure.context_tokens
    if not measure.data:
        return (
            contexts(
                (),
                tokenizer,
                context_tokens=length,
                max_tokens=measure.calibration_tokens,
                use="calibrate",
            ),
            contexts((), tokenizer, context_tokens=length, max_tokens=measure.held_out_tokens),
        )
    most = 2 * max(measure.calibration_tokens, measure.held_out_tokens)
    rows = contexts(measure.data, tokenizer, context_tokens=length, max_tokens=max(most, length))
    if len(rows) < 2:
        raise DataError(
            f"{', '.join(map(str, measure.data))}: one context of {length} tokens, and it takes "
            "two: one to calibrate on, one to measure on",
            hint="give more text or a smaller --context-tokens",
        )
    fit, held = rows[::2], rows[1::2]
    return (
        fit[: max(1, measure.calibration_tokens // length)],
        held[: max(1, measure.held_out_tokens // length)],
    )


def _text_facts(measure: Measure, fit: Tensor, held: Tensor) -> dict[str, Any]:
    builtin = f"Python's language reference, {platform.python_version()}"
    return {
        "files": [Path(path).name for path in measure.data] or [builtin],
        "context_tokens": fit.shape[1],
        "calibration_tokens": fit.numel(),
        "held_out_tokens": held.numel(),
    }


def _draw(decoder: Decoder, tokens: Tensor, folder: Path) -> None:
    from respike.spiking import raster

    layer = len(decoder.layers) // 2
    shown = tokens[: raster.TOKENS]
    counts = raster.record(decoder, shown, layer)
    raster.draw_tokens(counts, layer, folder / RASTERS[0])
    raster.draw_steps(counts, layer, len(shown) // 2, folder / RASTERS[1])
