"""The folder that a command writes to."""

from __future__ import annotations

import tempfile
from pathlib import Path


def prepare_folder(folder: Path, *names: str) -> None:
    """Make the folder, and find out whether files of these names can be written there.

    Raises:
        OSError: they cannot, which would else come to light at the end of the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder; a file is to be written there")
