"""Files that are written whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

from respike.errors import DataError


def replace_text(path: Path, text: str) -> None:
    """A whole file, in place of an older one if there is one.

    Raises:
        DataError: It cannot be written; what was there is there still.
    """
    staging = path.with_name(f".{path.name}.partial")
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
