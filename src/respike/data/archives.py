"""Files inside packages (.deb, .whl, .zip, .tgz), read in place: nothing is unpacked or run."""

import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

from respike.errors import DataError, UnsupportedError

MAX_MEMBER_BYTES = 64 << 20
"""Of one file; a larger one is no document."""
MAX_ARCHIVE_BYTES = 4 << 30
"""Of all files read from one package: it is a bomb or a mistake beyond that."""


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every regular file whose name is ``wanted``, in the package's order.

    Names have no ``./`` before them. Links and devices are passed over.

    Raises:
        DataError: No such kind of package, damaged, or more than fits the bounds.
        UnsupportedError: Packed in a way that Python cannot read.
    """
    total = 0
    try:
        with path.open("rb") as file:
            for name, size, read in _entries(path, file):
                if not wanted(name):
                    continue
                total += size
                if size > MAX_MEMBER_BYTES or total > MAX_ARCHIVE_BYTES:
                    raise DataError(f"{path.name}: {name}: {size} bytes are more than fits here")
                yield name, read()
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name}: damaged package: {error}") from None
    except (lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path.name}: damaged package: {error}") from None
    except (RuntimeError, NotImplementedError) as error:  # of zipfile: encrypted, unknown method
        raise UnsupportedError(f"{path.name}: cannot be unpacked: {error}") from None


Entry = tuple[str, int, Callable[[], bytes]]


def _entries(path: Path, file: BufferedIOBase) -> Iterator[Entry]:
    if path.suffix == ".deb":
        yield from _tar(_deb_data(path, file), "r|")
    elif path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir() and (info.external_attr >> 28) in (0, 8):
                    yield info.filename, info.file_size, lambda info=info: _unzip(archive, info)  # type: ignore[misc]
    elif path.suffix == ".tgz" or path.name.endswith((".tar.gz", ".tar.xz")):
        yield from _tar(file, "r|*")
    else:
        raise DataError(f"{path.name}: expected a .deb, .whl, .zip, .tgz, .tar.gz or .tar.xz")


def _unzip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """As many bytes as announced and no more: a header may lie."""
    with archive.open(info) as file:
        return file.read(info.file_size)


def _tar(file: BufferedIOBase, mode: str) -> Iterator[Entry]:
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for info in archive:
            if info.isreg():
                stream = archive.extractfile(info)
                assert stream is not None
                yield info.name.removeprefix("./"), info.size, stream.read


class _Part(io.RawIOBase):
    """The next ``size`` bytes of a file."""

    def __init__(self, file: BufferedIOBase, size: int) -> None:
        self.file, self.left = file, size

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill the buffer as far as the part goes."""
        data = self.file.read(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


def _deb_data(path: Path, file: BufferedIOBase) -> BufferedIOBase:
    """The data.tar of a Debian package, which is an ``ar`` archive (see ``man 5 deb``)."""
    if file.read(8) != b"!<arch>\n":
        raise DataError(f"{path.name}: not a Debian package")
    while header := file.read(60):
        if len(header) < 60 or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            raise DataError(f"{path.name}: damaged package: a header is not one of `ar`")
        name, size = header[:16].decode("ascii", "replace").strip(" /"), int(header[48:58])
        if not name.startswith("data.tar"):
            file.seek(size + size % 2, 1)
            continue
        part = io.BufferedReader(_Part(file, size))
        if name == "data.tar.xz":
            return lzma.open(part)
        if name == "data.tar.gz":
            import gzip

            return gzip.open(part)
        if name == "data.tar":
            return part
        raise UnsupportedError(
            f"{path.name}: its files are in {name}; expected .xz or .gz",
            hint="take the package of Debian rather than of a distribution that uses zstd",
        )
    raise DataError(f"{path.name}: no data.tar in this package")
