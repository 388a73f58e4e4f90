"""`respike bench` as one function: the gate, the points, the quality beside them, the report."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from respike.bench.contenders import Contender, Field, Subject, field_of
from respike.bench.gate import check_kernels, check_model, check_peer
from respike.bench.machine import (
    kernel_names,
    l3_bytes,
    processor,
    provenance,
    read_bytes_per_second,
)
from respike.bench.predict import predict
from respike.bench.process import ChildError, run_child
from respike.bench.prompts import Prompts
from respike.bench.report import fitted_rows, ratios, row_of, spread
from respike.bench.results import Results
from respike.bench.session import Report, Session, Settings
from respike.checkpoint import fingerprint, open_checkpoint
from respike.errors import BackendError, UsageError
from respike.loading import load_tokenizer

GATE_TOKENS = 64
COLD_TOKENS = 20
QUALITY_SECONDS = 3600.0


@dataclass(frozen=True)
class Run:
    """How the engines run.

    Attributes:
        dtype: f32, bf16 or f16; None takes the checkpoint's.
        weights: Packed weights; None packs nothing.
        peer_python: Interpreter that has the peers' packages.
        cache_folder: Where requantised and random peers are kept.
        peer_settings: Of a peer with many settings only those whose name has one of these in it;
            empty: all.
    """

    dtype: str | None
    weights: str | None
    peer_python: str
    cache_folder: Path
    peer_settings: tuple[str, ...] = ()

    @property
    def ours(self) -> dict[str, Any]:
        """What our own engine is told."""
        return {"dtype": self.dtype, "weights": self.weights}


def bench(
    subject: Subject,
    peers: Sequence[str],
    settings: Settings,
    run: Run,
    *,
    quality_cap: int | None,
    out: Path | None,
    report: Report,
) -> dict[str, Any]:
    """Measure a model beside its original and peers.

    Args:
        subject: What is measured.
        peers: Of `respike.bench.contenders.PEERS`.
        settings: Lengths, repeats, limits.
        run: How the engines run.
        quality_cap: Longest length at which quality is measured too; None measures none.
        out: Result file; one that exists is gone on with.
        report: Called with (done, in all, what runs).

    Returns:
        Everything that stands in the result file.

    Raises:
        RespikeError: A bad call, a model that is not there, a peer that is not installed, or a
            gate that does not open.
    """
    everyone = field_of(
        subject,
        peers,
        dtype=run.dtype,
        weights=run.weights,
        threads=settings.threads,
        peer_python=run.peer_python,
        cache_folder=run.cache_folder,
    )
    everyone.keep(run.peer_settings)
    results = Results(out, _key(subject, settings, run), _head(settings, everyone))
    tokenizer = load_tokenizer(open_checkpoint(subject.path)) if subject.path else None
    prompts = Prompts(tokenizer, everyone.config)
    results.keep("fingerprints", _fingerprints(everyone))
    report(0, 1, "how long it will take")
    plan = predict(everyone.config, settings.lengths, settings.threads, run.ours, run.cache_folder)
    results.keep("planned", plan)
    with tempfile.TemporaryDirectory(prefix="respike-bench-") as name:
        folder = Path(name)
        results.keep("gate", _gate(everyone, settings, prompts, folder, report))
        session = Session(everyone.contenders, settings, results, prompts, folder)
        session.run(report)
    known = results.find("read_bytes_per_second") or plan["read_bytes_per_second"]
    results.keep("read_bytes_per_second", max(known, read_bytes_per_second(settings.threads)))
    qualities = _qualities(everyone, settings, quality_cap, results, report)
    return _finish(results, everyone, session, qualities)


def _key(subject: Subject, settings: Settings, run: Run) -> dict[str, Any]:
    """What two calls must share to be parts of one."""
    if subject.path is None:
        what = f"{subject.shape} by {subject.recipe}"
    else:
        source = open_checkpoint(subject.path)
        what = fingerprint(source.config, source.files)
    return {
        "model": what,
        "dtype": run.dtype,
        "weights": run.weights,
        "threads": settings.threads,
        "decode_tokens": settings.decode_tokens,
        "processor": processor(),
        "kernels": sorted(set(kernel_names().values())),
    }


def _fingerprints(everyone: Field) -> dict[str, str]:
    """Of the model and its original, where they are on disk."""
    models = {c.group: c.job["model"] for c in everyone.contenders if "model" in c.job}
    opened = {g: open_checkpoint(m["path"]) for g, m in models.items() if "path" in m}
    return {group: fingerprint(source.config, source.files) for group, source in opened.items()}


def _head(settings: Settings, everyone: Field) -> dict[str, Any]:
    head = provenance()
    head["machine"] |= {
        "cores": os.cpu_count(),
        "l3_bytes": l3_bytes(), "threads": settings.threads, "kernels": kernel_names(),
    }  # fmt: skip
    return {**head, "settings": asdict(settings), "notes": everyone.notes}


def _gate(
    everyone: Field, settings: Settings, prompts: Prompts, folder: Path, report: Report
) -> dict[str, Any]:
    """See `respike.bench.gate`; every call, as kernels may have changed since the file began."""
    report(0, 1, "kernels against their definitions")
    found: dict[str, Any] = {"kernels": check_kernels()}
    found["small_model_rms"] = check_model(everyone.config)
    checked = {"transformers", "llama.cpp as is"}
    first: dict[str, Contender] = {}
    for contender in everyone.contenders:
        if contender.group in checked:
            first.setdefault(contender.group, contender)
    if not first:
        return found
    file = prompts.write(folder / "gate", GATE_TOKENS, 0)
    assert everyone.original is not None
    ours = Contender(
        "our engine", "ours", "ours",
        {"model": everyone.original, "threads": settings.threads}, grows=True,
    )  # fmt: skip
    report(0, 1, "our engine on the original weights")
    mine = _logits(ours, settings, file, folder)
    for group, contender in first.items():
        report(0, 1, f"{group} on the original weights")
        found[group] = dict(check_peer(group, mine, _logits(contender, settings, file, folder)))
    return found


def _logits(contender: Contender, settings: Settings, file: Path, folder: Path) -> torch.Tensor:
    target = folder / "logits"
    job = {
        **contender.job, "task": "logits", "tokens_file": str(file), "logits_file": str(target),
    }  # fmt: skip
    try:
        outcome = run_child(
            contender.module, job, python=contender.python, threads=settings.threads
        )
    except ChildError as error:
        raise BackendError(
            f"no speed is printed: {contender.name}: {error}", hint=error.hint
        ) from error
    data = torch.frombuffer(bytearray(target.read_bytes()), dtype=torch.float32)
    return data.view(GATE_TOKENS, outcome.result["vocab_size"])


def _qualities(
    everyone: Field,
    settings: Settings,
    cap: int | None,
    results: Results,
    report: Report,
) -> list[dict[str, Any]] | str:
    """KL and recall at the benched lengths up to the cap, or why there are none."""
    mine = everyone.contenders[0].job["model"]
    if cap is None:
        return "not measured: --no-quality"
    if everyone.tokenizer_path is None:
        return "none: the weights are random"
    if everyone.original is None:
        return "not measured: the original was not found; --original PATH"
    if mine == everyone.original:
        return "none: this is the original"
    found = []
    lengths = [n for n in settings.lengths if n <= cap]
    for done, length in enumerate(lengths):
        report(done, len(lengths), f"quality at {length:,} tokens")
        name = f"quality at {length}"
        if results.find(name) is None:
            job = {
                "task": "quality",
                "model": mine,
                "original": everyone.original,
                "length": length,
                "threads": settings.threads,
            }
            try:
                results.keep(
                    name,
                    run_child(
                        "ours", job, threads=settings.threads, max_seconds=QUALITY_SECONDS
                    ).result,
                )
            except ChildError as error:
                found.append({"length": length, "error": str(error)})
                continue
        found.append(results.find(name))
    return found or f"not measured: every length is above the cap of {cap:,} tokens"


def _finish(
    results: Results,
    everyone: Field,
    session: Session,
    qualities: list[dict[str, Any]] | str,
) -> dict[str, Any]:
    """Rows, fits and ratios, written with the points."""
    read, settings = results.find("read_bytes_per_second"), session.settings
    rows, fitted = [], []
    for length in settings.lengths:
        for contender in everyone.contenders:
            good = [
                p for p in results.points
                if p["contender"] == contender.name and p["length"] == length and "error" not in p
            ]  # fmt: skip
            if good:
                rows.append(row_of(contender, good, settings.decode_tokens, read))
    for contender in everyone.contenders:
        if contender.name not in session.beaten:
            fitted += fitted_rows(contender, rows, settings.lengths, read)
    results.data |= {
        "read_bytes_per_second": read,
        "rows": rows,
        "fitted": fitted,
        "ratios": ratios(rows, fitted),
        "skipped": session.skipped,
        "quality": qualities,
    }
    results.write()
    return results.data


def quoted(data: Mapping[str, Any]) -> list[str]:
    """The contenders to draw: of each group, the best at prefill and at decode where it is longest.

    Args:
        data: From `bench`.
    """
    found: dict[str, None] = {}
    for group in dict.fromkeys(row["group"] for row in data["rows"]):
        mine = [row for row in data["rows"] if row["group"] == group]
        longest = max(row["context_tokens"] for row in mine)
        last = [row for row in mine if row["context_tokens"] == longest]
        for key, choose in (("ttft_seconds", min), ("decode_tokens_per_second", max)):
            pick: Callable[..., Any] = choose
            best = pick(last, key=lambda row, key=key: row[key]["median"])
            found[best["contender"]] = None
    return list(found)


def cold_start(subject: Subject, settings: Settings, run: Run, report: Report) -> dict[str, Any]:
    """From the start of a process to the text of a first token after a short prompt.

    Files are as the system has them, so usually in memory after the first of the repeats.

    Raises:
        ChildError: It failed.
    """
    if subject.path is None:
        raise UsageError("--cold-start: needs a model on disk, and --shape makes its own")
    source = open_checkpoint(subject.path)
    prompts = Prompts(load_tokenizer(source), source.config)
    spec = {"path": str(subject.path), "dtype": run.dtype, "weights": run.weights}
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="respike-bench-") as folder:
        for repeat in range(settings.repeats):
            report(repeat, settings.repeats, "cold start")
            file = prompts.write(Path(folder) / "prompt", COLD_TOKENS, repeat)
            job = {
                "task": "cold", "model": spec, "threads": settings.threads,
                "tokens_file": str(file),
            }  # fmt: skip
            outcome = run_child(
                "ours", job, threads=settings.threads, max_seconds=settings.max_seconds
            )
            begin, steps = outcome.started, {}
            for name, end in outcome.result["marks"].items():
                steps[name], begin = end - begin, end
            runs.append({**steps, "all": begin - outcome.started})
    return {
        "benchmark": "cold-start",
        **provenance(),
        "model": fingerprint(source.config, source.files),
        "prompt_tokens": COLD_TOKENS,
        "n": len(runs),
        "first_all_seconds": runs[0]["all"],
        "seconds": {name: spread([r[name] for r in runs]) for name in runs[0]},
    }
