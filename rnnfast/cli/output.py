"""The input and output files of the commands."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rnnfast.models.processes import Processes, is_first_process
from rnnfast.text import TextError

_UNFINISHED, _FINISHED = "unfinished", ".finished"


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Add the name of an option to errors about its value."""
    try:
        yield
    except TextError as error:
        raise TextError(f"{option}: {error}") from error
    except OSError as error:
        if error.strerror is None:
            raise type(error)(f"{option}: {error}") from error
        raise type(error)(f"{option} {error.filename}: {error.strerror}") from error


def prepare_folder(folder: Path, *names: str) -> None:
    """Make a folder, and check early that files of these names can be written there.

    Raises:
        OSError: the files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    refuse_folders(folder, *names)


def refuse_folders(folder: Path, *names: str) -> None:
    """Raise IsADirectoryError if a folder has the name of a file that will be written."""
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder; a file is to be written there")


class Results:
    """The files of a training in a folder; older files stay until the new ones are complete.

    If the folder has no older files, the new ones are written to it directly. Otherwise they are
    written to its subfolder "unfinished", and `finish` moves them over the older files. `finish`
    first renames the subfolder. If the process ends while it moves the files, the next training
    completes the work.

    Args:
        folder: the folder of all files.
        names: the names of the files.

    Attributes:
        work: the folder to which the new files are written.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.names = folder, names
        self._staging = folder / _UNFINISHED
        self.work = folder

    @property
    def remains(self) -> str:
        """The end of a message about an unfinished training in "unfinished", or an empty string.

        It starts with a semicolon.
        """
        if self.work == self.folder:
            return ""
        return (
            f"; its model so far is in {self.work}, and rnnfast train --resume --out {self.folder} "
            f"goes on with it; delete {self.work} to return to the older training"
        )

    def resume(self, state: str) -> None:
        """Continue a training: work in "unfinished" if it has the file `state`."""
        if is_first_process():
            self._complete()
        if (self._staging / state).is_file():
            self.work = self._staging

    def check(self, overwrite: bool, remedy: str) -> None:
        """Check that a new training may use the folder.

        Raises:
            IsADirectoryError: a folder has the name of a file.
            FileExistsError: there are older files and `overwrite` is false. The message ends with
                the `remedy`.
        """
        refuse_folders(self.folder, *self.names)
        with naming("--out"):
            there = [name for name in (*self.names, _UNFINISHED) if (self.folder / name).exists()]
        if there and not overwrite:
            raise FileExistsError(f"--out {self.folder} has {', '.join(there)} already; {remedy}")
        if there or (self.folder / _FINISHED).is_dir():
            self.work = self._staging

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            OSError: the files cannot be written there.
        """
        with naming("--out"):
            prepare_folder(self.folder, *self.names)

    def begin(self, processes: Processes) -> None:
        """Prepare `work` for a new training; all processes must call this together."""
        if processes.is_first and self.work != self.folder:
            self._complete()
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir()
        processes.wait()

    def finish(self) -> None:
        """Replace the older files by the new ones."""
        if self.work != self.folder:
            os.rename(self._staging, self.folder / _FINISHED)
            self._complete()
            self.work = self.folder

    def _complete(self) -> None:
        finished = self.folder / _FINISHED
        if not finished.is_dir():
            return
        for path in sorted(finished.iterdir()):
            if (self.folder / path.name).is_dir():
                shutil.rmtree(self.folder / path.name)
            os.replace(path, self.folder / path.name)
        finished.rmdir()
