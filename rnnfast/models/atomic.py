"""Atomic replacement of files."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a crash at any time leaves either the whole old or the whole new one.

    The content is first written to a temporary file in the same folder and flushed to the disk. The
    temporary file is then renamed.

    Raises:
        OSError: the file cannot be written. The old file remains unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name != "posix":  # other systems cannot open a folder
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename must survive a loss of power, too
    finally:
        os.close(folder)
