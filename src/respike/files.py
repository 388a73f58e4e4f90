"""Files and folders that are written whole or not at all, and their names in a line of text."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from respike.errors import DataError


def replace_text(path: Path, text: str) -> None:
    """A whole file, in place of an older one if there is one.

    Raises:
        DataError: It cannot be written; what was there is there still.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    except OSError as error:
        with suppress(OSError):
            staging.unlink()
        raise DataError(
            f"{path}: cannot be written: {error.strerror}",
            hint="make room there, or choose another place; the same command goes on",
        ) from error


def put_in_place(new: Path, out: Path, old: Path) -> None:
    """Make the folder ``new`` into ``out``; what was there goes when that is done, and not before.

    Args:
        new: On the same disk.
        out: An older folder, or nothing.
        old: Where the older one stands meanwhile; it is back in its place if this fails.

    Raises:
        OSError: It cannot be done.
    """
    try:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def named(paths: Sequence[str | Path]) -> str:
    """The files for a line of text: the first of many stands for all."""
    more = f" and {len(paths) - 1:,} more" if len(paths) > 3 else ""
    return ", ".join(map(str, paths[:1] if more else paths)) + more
