"""Carry out a plan: weights shard by shard into a hidden folder, then one rename."""

import glob
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from respike import __version__
from respike.checkpoint import file_sha256, fingerprint
from respike.checkpoint.folder import INDEX
from respike.conversion.calibrate import calibrate, fit_summary, with_recall
from respike.conversion.card import model_card
from respike.conversion.initial import initial_tensor
from respike.conversion.measure import attention_sizes, measured_norms
from respike.conversion.plan import Plan
from respike.conversion.shards import SHARD_BYTES, write_json, write_shards
from respike.device import get_dtype
from respike.errors import CheckpointError, UsageError
from respike.files import put_in_place
from respike.loading import Progress, fast_decoder, load_tokenizer
from respike.recipe import dump_recipe
from respike.text import calibration_contexts, contexts

MEASURED_TOKENS = 512
"""Of text, on which the sizes of attention outputs are measured."""

RECEIPT = {"config.json", "recipe.yaml", "report.json"}
"""What tells a converted folder from any other."""

WRITTEN = RECEIPT | {"README.md", INDEX, "tokenizer.json", "tokenizer_config.json"}
WRITTEN |= {"raster_tokens.png", "raster_steps.png"}
WRITTEN |= {"healing.yaml", "healing.jsonl", "healing.png"}
"""Every name a converted folder may hold besides its weight files."""

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

ABANDONED_SECONDS = 3600
"""A staging folder whose process is gone and that has not changed for so long is removed."""


def convert(
    plan: Plan,
    out: str | Path,
    *,
    force: bool = False,
    data: Sequence[str | Path] = (),
    shard_bytes: int = SHARD_BYTES,
    healed: Mapping[str, Tensor] = MappingProxyType({}),
    also: Callable[[Path], dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the converted model: weights, config, tokenizer, resolved recipe, report, card.

    The same plan and text give the same bytes. An interrupted conversion leaves nothing behind;
    what a killed one left, a later one of the same name removes or, if it was ``out``, brings back.

    Args:
        plan: From `respike.plan`.
        out: Folder to create.
        force: Replace ``out`` if it is a converted folder and holds nothing else.
        data: Text files to calibrate far memories or to measure attention on, if the plan's recipe
            does. None takes what comes with Python.
        shard_bytes: Largest weight file.
        healed: Tensors that take the place of the source's, by name.
        also: Called with the folder before it gets its name; what it returns joins the report.
        progress: Called with (tensors done, tensors).

    Returns:
        The report, as written to ``report.json``.

    Raises:
        UsageError: ``out`` exists and ``force`` was not given; there is too little text; or there
            is text and nothing to calibrate.
        DataError: The text cannot be read.
        CheckpointError: The source turned out to be unreadable, or the disk full.
    """
    out = Path(os.path.realpath(out)) if os.path.islink(out) else Path(out)
    check_out(out, plan.source.path, force)
    tokenizer = load_tokenizer(plan.source)  # before anything is measured or written
    fitted, fit_report = _measured(plan, data, progress)
    made = {**fitted, **healed}
    with staged(out) as folder:
        files = write_shards(
            folder,
            {t.name: t.shape for t in plan.tensors if t.action != "drop"},
            lambda name: _tensor(plan, name, made),
            get_dtype(plan.recipe.weights),
            shard_bytes,
            progress,
        )
        config = plan.config.model_dump(mode="json")
        write_json(folder / "config.json", config)
        tokenizer.save(folder)
        hashes = {file.name: file_sha256(file) for file in plan.source.files}
        report = {
            "respike": __version__,
            "fingerprint": fingerprint(plan.config, files),
            "source_sha256": hashes,
            **plan.summary(),
            **fit_report,
            **(also(folder) if also else {}),
        }
        notes = {"made by": f"respike {__version__}"}
        notes |= {f"source {name}": f"sha256 {digest}" for name, digest in hashes.items()}
        (folder / "recipe.yaml").write_text(dump_recipe(plan.recipe, notes), encoding="utf-8")
        write_json(folder / "report.json", report)
        (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    return report


def check_out(out: Path, source: Path, force: bool) -> None:
    """Refuse to write a folder over a model's source or anything that is not ours.

    Args:
        out: Folder to be written.
        source: What it is made of.
        force: Replace ``out`` if respike wrote it and it holds nothing else.

    Raises:
        UsageError: It may not be written.
    """
    real, places = Path(os.path.realpath(out)), {"the source": source}
    with suppress(FileNotFoundError):  # the folder one is in may have been removed
        places["the folder you are in"] = Path.cwd()
    for what, place in places.items():
        place = Path(os.path.realpath(place))
        if real == place or real in place.parents:
            raise UsageError(f"{out}: is or holds {what}; choose another folder")
    if os.path.islink(real):
        raise UsageError(f"{out}: is a link that leads in a circle; choose another folder")
    try:
        _bring_back(out)
        if not out.exists():
            return
        foreign = _foreign(out)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None
    if not force:
        raise UsageError(
            f"{out}: already exists", hint="choose another folder, or add --force to replace it"
        )
    if foreign:
        raise UsageError(f"{out}: {foreign}, so --force will not replace it")


def _foreign(out: Path) -> str | None:
    """Why ``out`` is not a folder that `convert` wrote, or None; an empty one is fair game."""
    if not out.is_dir():
        return "is not a folder"
    names = {p.name for p in out.iterdir()}
    if names and not names >= RECEIPT:
        return "was not written by respike"
    others = sorted(n for n in names - WRITTEN if not WEIGHTS.fullmatch(n))
    return f"also holds {others[0]!r}" if others else None


def _bring_back(out: Path) -> None:
    """What killed processes left beside ``out``: the model one was replacing, unfinished ones."""
    for kind in ("old", "partial"):
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.{kind}"):
            process = left.name.split(".")[-2]
            if not process.isdigit() or _runs(int(process)):
                continue
            if kind == "old" and not out.exists():
                left.rename(out)
            elif time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # else it is somebody else's
    return True


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden sibling of ``out`` that becomes ``out`` if the block succeeds, else vanishes."""
    staging = out.parent / f".{out.name}.{os.getpid()}.partial"
    old = staging.with_suffix(".old")
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        staging.mkdir(parents=True)
        yield staging
        put_in_place(staging, out, old)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{out}: cannot be written: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # not empty: it holds the model
            for folder in missing:
                folder.rmdir()


def _measured(
    plan: Plan, data: Sequence[str | Path], progress: Progress | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that come of running the original on text, by name, and what the report says."""
    if data and not (plan.calibrates or plan.measures):
        raise UsageError(f"recipe {plan.recipe.name!r} calibrates nothing, so it needs no text")
    made, facts = _calibrated(plan, data, progress) if plan.calibrates else ({}, {})
    if plan.measures:
        length = min(MEASURED_TOKENS, plan.source.config.max_position_embeddings)
        tokenizer = load_tokenizer(plan.source)
        text = contexts(data, tokenizer, context_tokens=length, max_tokens=length, use="calibrate")
        sizes, heads = attention_sizes(plan.source, text[0])
        made |= measured_norms(plan.recipe, plan.config, sizes, heads)
        found = {"text_tokens": length, "rms": sizes, "heads_rms": heads}
        facts |= {"attention_sizes": found}
    # Memories that the source has already are copied, as the plan says.
    return {name: tensor for name, tensor in made.items() if name in plan.new}, facts


def _calibrated(
    plan: Plan, data: Sequence[str | Path], progress: Progress | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fitted tensors by name, and what the report says of them."""
    tokenizer = load_tokenizer(plan.source)
    text = calibration_contexts(
        data,
        tokenizer,
        max_tokens=plan.recipe.far.calibration_tokens,
        trained_tokens=plan.config.max_position_embeddings,
    )
    if len(text) < 2:
        raise UsageError(
            f"calibration needs two contexts of {text.shape[1]} tokens of text, got {len(text)}",
            hint="give more text",
        )
    rows, special = plan.source.config.vocab_size, set(tokenizer.special_ids)
    if int(text.max()) >= rows:
        raise CheckpointError(
            f"{plan.source.path}: its tokenizer has {tokenizer.vocab_size:,} tokens, its embedding "
            f"{rows:,} rows, and the text holds token {int(text.max()):,}",
            hint="give text without the tokens that were added, or the model's own tokenizer",
        )
    tokens = [t for t in range(min(tokenizer.vocab_size, rows)) if t not in special]
    searched, checked = with_recall(text, tokens)
    half_life = plan.recipe.far.half_life_tokens
    original = fast_decoder(plan.source)
    fitted, heads = calibrate(original, plan.config, searched, checked, half_life, progress)
    facts = {
        "text": [Path(path).name for path in data] or ["Python's language reference"],
        "text_tokens": text.numel(),
        "text_sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest(),
        "recall_tokens": searched.numel() + checked.numel() - text.numel(),
    }
    return fitted, {"calibration": facts | fit_summary(heads)}


def _tensor(plan: Plan, name: str, fitted: Mapping[str, Tensor]) -> Tensor:
    if name in fitted:
        return fitted[name].cpu()
    made = plan.origins.get(name)
    if made is not None:
        return made.make(plan.source.read(made.name), plan.config.head_dim)
    if name not in plan.new:
        return plan.source.read(name)
    return initial_tensor(name, plan.new[name], plan.config, plan.recipe)
