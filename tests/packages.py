"""Tiny packages for the tests: .deb, .whl and .tgz, made here; nothing is downloaded."""

import hashlib
import io
import lzma
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes | str]


def tar_bytes(files: Files, prefix: str = "./") -> bytes:
    """A tar with a folder, a link that leads out of it, and the files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        folder = tarfile.TarInfo(f"{prefix}usr")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo(f"{prefix}usr/link.html")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def make_deb(path: Path, files: Files, member: str = "data.tar.xz") -> Path:
    """What dpkg-deb would write."""
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": lzma.compress(tar_bytes({"control": "Package: x\n\n"})),
        member: lzma.compress(tar_bytes(files)),
    }
    raw = b"!<arch>\n"
    for name, data in parts.items():
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        raw += data + b"\n" * (len(data) % 2)
    path.write_bytes(raw)
    return path


def make_whl(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tgz(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        inner = tarfile.open(fileobj=io.BytesIO(tar_bytes(files, "package/")))  # noqa: SIM115
        for info in inner:
            archive.addfile(info, inner.extractfile(info) if info.isreg() else None)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(path: Path, **changes: Any) -> dict[str, Any]:
    """A source of a manifest for a package made here."""
    registry = {".deb": "debian", ".whl": "pypi", ".tgz": "npm"}[path.suffix]
    return {
        "name": path.stem,
        "registry": registry,
        "package": path.stem,
        "version": "1.0",
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "files": ["*.txt"],
        "reader": "text",
        "licence": "MIT",
        "licence_file": "copyright",
        **changes,
    }
