"""Who is measured: the model, its original, and peers at each of their settings."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from respike.account import num_parameters, state_bytes
from respike.bench.process import ChildError, run_child
from respike.bench.rwkv7 import write_rwkv7
from respike.bench.shapes import random_checkpoint, shape_config
from respike.checkpoint import GgufCheckpoint, file_sha256, open_checkpoint, read_json
from respike.config import ModelConfig
from respike.errors import BackendError, CheckpointError, RespikeError, UsageError, did_you_mean
from respike.recipe import Recipe, load_recipe

PEERS = ("original", "transformers", "llama.cpp", "rwkv7")
PACKAGES = {"transformers": "transformers accelerate", "llama.cpp": "llama-cpp-python"}
MODULES = {
    "transformers": "peer_transformers",
    "llama.cpp": "peer_llama_cpp",
    "rwkv7": "peer_llama_cpp",
}
CACHES = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "f32": 4.0}
"""Cache types of llama.cpp, and their bytes a number."""
PEER_WEIGHTS = ("as is", "q8_0", "q4_0")
"""Weights a GGUF peer runs: the file's own, and the file rounded again, for equal bits."""


@dataclass(frozen=True)
class Subject:
    """What is to be measured: a model on disk, or a shape with random weights.

    Attributes:
        path: The model; None if it is a shape.
        shape: A name of `respike.bench.shapes.SHAPES`.
        recipe: What converts the shape.
        original: What a converted folder was made from; None looks for it where its report says.
    """

    path: Path | None = None
    shape: str | None = None
    recipe: str = "constant"
    original: Path | None = None


@dataclass(frozen=True)
class Contender:
    """One thing that is timed.

    Attributes:
        name: Unique, for people.
        group: Settings of one peer on the same weights share it; the best of them is quoted.
        module: What runs it, for `run_child`.
        job: Its job but for the prompt.
        grows: Its cache grows, so its time to a first token is quadratic.
        cache_bytes: Of a sequence of so many tokens; None takes what it reports.
        looked_up_frac: Share of its weights that a step looks up instead of reading.
        python: The interpreter.
    """

    name: str
    group: str
    module: str
    job: Mapping[str, Any]
    grows: bool
    cache_bytes: Callable[[int], float] | None = None
    looked_up_frac: float = 0.0
    python: str = sys.executable


@dataclass
class Field:
    """Everyone who takes part, and what the gate and the quality need to know."""

    config: ModelConfig
    contenders: list[Contender] = field(default_factory=list)
    original: dict[str, Any] | None = None
    """Job's ``model`` of the original, if there is one."""
    tokenizer_path: Path | None = None
    notes: list[str] = field(default_factory=list)

    def keep(self, settings: Sequence[str]) -> None:
        """Leave out the settings of peers whose names have none of these in them; none: keep all.

        Raises:
            UsageError: One of them is in no name.
        """
        named = [c for c in self.contenders if c.group.startswith("llama.cpp")]
        for text in settings:
            if not any(text in c.name for c in named):
                raise UsageError(
                    f"--peer-setting {text!r}: no peer has it",
                    hint="; ".join(c.name for c in named) or "--vs llama.cpp has settings",
                )
        if settings:
            self.contenders = [
                c for c in self.contenders if c not in named or any(t in c.name for t in settings)
            ]
            self.notes.append(f"of peers' settings only those with {' or '.join(settings)}")


def check_peers(names: Sequence[str], subject: Subject) -> None:
    """Refuse what can be refused at once.

    Raises:
        UsageError: An unknown peer, or one that needs a model on disk.
    """
    for name in names:
        if name not in PEERS:
            raise UsageError(
                f"--vs {name}: not one of {', '.join(PEERS)}", hint=did_you_mean(name, PEERS)
            )
        if subject.shape is not None and name in PACKAGES:
            raise UsageError(f"--vs {name}: needs weights on disk, and --shape has none")


def field_of(
    subject: Subject,
    names: Sequence[str],
    *,
    dtype: str | None,
    weights: str | None,
    threads: int,
    peer_python: str,
    cache_folder: Path,
    peer_weights: Sequence[str] = PEER_WEIGHTS,
) -> Field:
    """Everyone who takes part.

    Args:
        subject: What is measured.
        names: Of `PEERS`.
        dtype: Our compute dtype; None takes the checkpoint's.
        weights: Our packed weights; None packs nothing.
        threads: Of everyone.
        peer_python: Interpreter that has the peers' packages.
        cache_folder: Where requantised and random peers are kept.
        peer_weights: What llama.cpp has its weights in: as is, or a key of its FILE_TYPES.

    Raises:
        UsageError: The call cannot mean anything, e.g. an original of an original.
        BackendError: A peer's package is not installed.
        CheckpointError: The model or its original is not to be found.
    """
    check_peers(names, subject)
    ours = {"dtype": dtype, "weights": weights}
    common = {"threads": threads}
    found, original_path, original_config = _subject(subject, names, ours, common)
    wanted = [name for name in names if name != "original"]
    for name in wanted:
        _check_installed(name, peer_python, original_path)
    if "transformers" in wanted:
        assert original_path is not None
        job = {"path": str(original_path), "dtype": "bfloat16", **common}
        found.contenders.append(
            Contender(
                "transformers bf16 sdpa", "transformers", MODULES["transformers"], job, True,
                lambda n: state_bytes(original_config, n), _looked_up(original_config), peer_python,
            )
        )  # fmt: skip
    if "llama.cpp" in wanted:
        assert original_path is not None
        found.contenders += _llama_cpp(
            original_path,
            original_config,
            common,
            peer_python,
            cache_folder,
            found.notes,
            peer_weights,
        )
    if "rwkv7" in wanted:
        found.contenders.append(_rwkv7(original_config, common, peer_python, cache_folder))
    return found


def _subject(
    subject: Subject, names: Sequence[str], ours: Mapping[str, Any], common: Mapping[str, Any]
) -> tuple[Field, Path | None, ModelConfig]:
    """The model and its original: the field so far, where the original is, and its config."""
    if subject.shape is not None:
        source, recipe = shape_config(subject.shape), load_recipe(subject.recipe)
        config = random_checkpoint(source, recipe).config
        mine: dict[str, Any] = {"shape": subject.shape, "recipe": _plain(recipe), **ours}
        theirs = mine | {"recipe": _plain(load_recipe("identity"))}
        found = Field(config, notes=["random weights: speed only"])
        name = f"{subject.shape} {recipe.name}"
        original_path = None
    else:
        assert subject.path is not None
        checkpoint = open_checkpoint(subject.path)
        config, name = checkpoint.config, subject.path.resolve().name
        mine = {"path": str(subject.path), **ours}
        original_path = find_original(subject, needed=bool(names))
        source = config if original_path is None else open_checkpoint(original_path).config
        theirs = mine | {"path": str(original_path)}
        found = Field(config, tokenizer_path=subject.path)
    itself = original_path is not None and subject.path == original_path
    if itself and "original" in names:
        raise UsageError(
            f"--vs original: {subject.path} is an original itself", hint="give a converted folder"
        )
    if subject.shape is None and original_path is not None:
        found.original = theirs
    found.contenders.append(_ours(name, "ours", mine, common, config))
    if "original" in names:
        found.contenders.append(_ours("original", "original", theirs, common, source))
    return found, original_path, source


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _ours(
    name: str, group: str, model: Mapping[str, Any], common: Mapping[str, Any], config: ModelConfig
) -> Contender:
    job = {"model": dict(model), **common}
    return Contender(name, group, "ours", job, bool(config.softmax_groups()))


def _looked_up(config: ModelConfig) -> float:
    """Share of the parameters in an embedding that is no output matrix."""
    if config.tie_word_embeddings:
        return 0.0
    return config.vocab_size * config.hidden_size / num_parameters(config)


def find_original(subject: Subject, *, needed: bool) -> Path | None:
    """What a converted folder was made from, found by its name and proved by its hash.

    Raises:
        CheckpointError: It is needed and not to be found, or is not the one.
    """
    assert subject.path is not None
    receipt = subject.path / "report.json"
    if not receipt.is_file():
        return subject.original or subject.path
    report = read_json(receipt)
    hashes, name = report.get("source_sha256", {}), str(report.get("source", {}).get("name", ""))
    if subject.original is not None:
        if not _is_original(subject.original, hashes):
            raise CheckpointError(
                f"--original {subject.original}: not what {subject.path} was converted from "
                f"({name}): no file has its SHA-256"
            )
        return subject.original
    above = list(subject.path.resolve().parents)[:2]
    for place in (*above, *(p / "models" for p in above), Path(), Path("models")):
        if name and (place / name).exists() and _is_original(place / name, hashes):
            return place / name
    if not needed:
        return None
    raise CheckpointError(
        f"{subject.path} was converted from {name or 'a model'}, which is neither beside it nor in "
        "models/",
        hint="say where it is: --original PATH",
    )


def _is_original(path: Path, hashes: Mapping[str, str]) -> bool:
    try:
        files = open_checkpoint(path).files
    except RespikeError:
        return False
    return {file_sha256(file) for file in files} == set(hashes.values())


def _check_installed(name: str, python: str, path: Path | None) -> None:
    try:
        run_child(MODULES[name], {"task": "version", "path": str(path)}, python=python)
    except ChildError as error:
        package = PACKAGES.get(name, PACKAGES["llama.cpp"])
        raise BackendError(
            f"--vs {name}: {package} does not run in {python}: {error}",
            hint=f"run `{python} -m pip install {package}`, or name another --peer-python",
        ) from error


def _llama_cpp(
    path: Path,
    config: ModelConfig,
    common: Mapping[str, Any],
    python: str,
    cache_folder: Path,
    notes: list[str],
    weights: Sequence[str],
) -> list[Contender]:
    """Every cache type, with and without flash attention, on each kind of weights."""
    if not isinstance(open_checkpoint(path), GgufCheckpoint):
        raise UsageError(f"--vs llama.cpp: needs an original that is a .gguf file, {path} is not")
    found = []
    for kind in weights:
        file = path
        if kind != "as is":
            file = _requantised(path, kind, common, python, cache_folder)
        for flash in (True, False):
            for cache, size in CACHES.items():
                if cache == "q8_0" and not flash:
                    continue
                job = {"path": str(file), "flash": flash, "cache": cache, **common}
                setting = f"flash {'on' if flash else 'off'}, {cache} cache"
                found.append(
                    Contender(
                        f"llama.cpp {kind}, {setting}", f"llama.cpp {kind}", MODULES["llama.cpp"],
                        job, True, _cache_of(config, size), _looked_up(config), python,
                    )
                )  # fmt: skip
    notes.append("llama.cpp takes a q8_0 cache with flash attention only")
    return found


def _cache_of(config: ModelConfig, size: float) -> Callable[[int], float]:
    return lambda n: state_bytes(config, n, 1) * size


def _requantised(
    path: Path, kind: str, common: Mapping[str, Any], python: str, cache_folder: Path
) -> Path:
    out = cache_folder / f"{path.stem}-{file_sha256(path)[:12]}-{kind}.gguf"
    if not out.exists():
        cache_folder.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(f".{os.getpid()}.partial")
        job = {"task": "quantize", "path": str(path), "out": str(partial), "kind": kind, **common}
        try:
            run_child(MODULES["llama.cpp"], job, python=python)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    return out


def _rwkv7(
    config: ModelConfig, common: Mapping[str, Any], python: str, cache_folder: Path
) -> Contender:
    out = cache_folder / f"rwkv7-{config.hidden_size}x{config.num_hidden_layers}-q8_0.gguf"
    if not out.exists():
        cache_folder.mkdir(parents=True, exist_ok=True)
        write_rwkv7(out, config)
    job = {"path": str(out), "flash": False, "cache": "f16", **common}
    looked_up = _looked_up(config.model_copy(update={"tie_word_embeddings": False}))
    name = "rwkv7 in llama.cpp, random q8_0"
    return Contender(name, "rwkv7", MODULES["rwkv7"], job, False, None, looked_up, python)
