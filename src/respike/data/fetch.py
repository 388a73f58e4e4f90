"""Packages from Debian, PyPI and npm by their ordinary clients, checked against a pinned hash."""

import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from respike.checkpoint import file_sha256
from respike.errors import BackendError, DataError

Registry = Literal["debian", "pypi", "npm"]
MIRROR = "http://deb.debian.org/debian"
"""Where Debian packages come from without apt-get, unless RESPIKE_DEBIAN_MIRROR says otherwise. The
hash is pinned, so the way they come need not be trusted."""
SUFFIXES: dict[Registry, str] = {"debian": ".deb", "pypi": ".whl", "npm": ".tgz"}


@dataclass(frozen=True)
class Package:
    """One file of a registry.

    Attributes:
        registry: Whose client downloads it.
        name: As the registry knows it.
        version: Exactly.
        sha256: Of the archive.
        path: Debian: path under the mirror, for machines without apt-get, or where apt no longer
            lists this version.
    """

    registry: Registry
    name: str
    version: str
    sha256: str
    path: str = ""

    @property
    def file_name(self) -> str:
        """A name for the archive in a folder of many."""
        plain = self.name.replace("/", "-").lstrip("@")
        version = self.version.replace(":", "%3a")
        return f"{plain}_{version}_{self.sha256[:12]}{SUFFIXES[self.registry]}"


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in ``folder``, downloaded unless it is there; the hash is right.

    Raises:
        DataError: It cannot be downloaded, or is not the file that was pinned.
        BackendError: The client that is needed is not installed.
    """
    file = folder / package.file_name
    if file.exists() and file_sha256(file) == package.sha256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as name:
        got = _download(package, Path(name))
        digest = file_sha256(got)
        if digest != package.sha256:
            raise DataError(
                f"{package.name} {package.version}: sha256 {digest}, expected {package.sha256}"
            )
        got.replace(file)
    return file


def _download(package: Package, folder: Path) -> Path:
    exact = {"debian": "=", "pypi": "==", "npm": "@"}[package.registry]
    wanted = f"{package.name}{exact}{package.version}"
    if package.registry == "debian":
        if shutil.which("apt-get"):
            reason = _run(["apt-get", "download", "-q", wanted], folder)
        else:
            reason = "there is no apt-get"
        if reason and package.path:
            return _from_mirror(package, folder)
    elif package.registry == "pypi":
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", "."]
        reason = _run([sys.executable, "-m", "pip", "download", *options, wanted], folder)
    else:
        if not shutil.which("npm"):
            raise BackendError(f"{package.name}: npm is needed to download it, and not installed")
        reason = _run(["npm", "pack", "--silent", "--ignore-scripts", wanted], folder)
    files = list(folder.glob(f"*{SUFFIXES[package.registry]}"))
    if reason or len(files) != 1:
        raise DataError(
            f"{wanted}: cannot be downloaded: {reason or f'{len(files)} files came'}",
            hint="is this version still there? a newer one needs a new hash in the manifest",
        )
    return files[0]


def _run(command: list[str], folder: Path) -> str:
    """What the client says is wrong, in one line; empty if all is well."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    return words[-1].strip()[:200]


def _from_mirror(package: Package, folder: Path) -> Path:
    url = f"{os.environ.get('RESPIKE_DEBIAN_MIRROR', MIRROR).rstrip('/')}/{package.path}"
    file = folder / "package.deb"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, file.open("wb") as out:
            shutil.copyfileobj(answer, out)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DataError(f"{url}: cannot be downloaded: {error}") from None
    return file
