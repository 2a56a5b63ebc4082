"""Where a command reads from and writes to."""

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
    """Put the name of an option before what goes wrong with its value, in an error of one line."""
    try:
        yield
    except TextError as error:
        raise TextError(f"{option}: {error}") from error
    except OSError as error:
        if error.strerror is None:
            raise type(error)(f"{option}: {error}") from error
        raise type(error)(f"{option} {error.filename}: {error.strerror}") from error


def prepare_folder(folder: Path, *names: str) -> None:
    """Make the folder, and find out whether files of these names can be written there.

    Raises:
        OSError: they cannot, which would else come to light at the end of the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    refuse_folders(folder, *names)


def refuse_folders(folder: Path, *names: str) -> None:
    """Raises IsADirectoryError where a folder has the name of a file that is to be written."""
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder; a file is to be written there")


class Results:
    """The files of a training in a folder, where older ones stay until the new ones are whole.

    The new files are written to the folder itself if it has no older ones, else to a folder
    "unfinished" in it; `finish` then lets all of them take the place of the older ones. It first
    gives that folder another name, so that the end of the process in the course of it loses
    nothing: the next training completes it.

    Args:
        folder: for all files.
        names: of the files.

    Attributes:
        work: where the new files are written.

    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.names = folder, names
        self._staging = folder / _UNFINISHED
        self.work = folder

    @property
    def remains(self) -> str:
        """What to know of a training whose files do not take the place of older ones; or nothing.

        This is the end of a message, with its semicolon.
        """
        if self.work == self.folder:
            return ""
        return (
            f"; its model so far is in {self.work}, and rnnfast train --resume --out {self.folder} "
            f"goes on with it; delete {self.work} to return to the older training"
        )

    def resume(self, state: str) -> None:
        """Go on in the folder that has the latest file of this name."""
        if is_first_process():
            self._complete()
        if (self._staging / state).is_file():
            self.work = self._staging

    def check(self, overwrite: bool, remedy: str) -> None:
        """Find out whether a new training may begin here.

        Raises:
            IsADirectoryError: a folder has the name of a file.
            FileExistsError: there are older files, and it must not `overwrite` them; the message
                ends with the `remedy`.
        """
        refuse_folders(self.folder, *self.names)
        with naming("--out"):
            there = [name for name in (*self.names, _UNFINISHED) if (self.folder / name).exists()]
        if there and not overwrite:
            raise FileExistsError(f"--out {self.folder} has {', '.join(there)} already; {remedy}")
        if there or (self.folder / _FINISHED).is_dir():
            self.work = self._staging

    def prepare(self) -> None:
        """Make the folder, once there is something to write.

        Raises:
            OSError: the files cannot be written there.
        """
        with naming("--out"):
            prepare_folder(self.folder, *self.names)

    def begin(self, processes: Processes) -> None:
        """Make room for the files of a new training; all processes must call this."""
        if processes.is_first and self.work != self.folder:
            self._complete()
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir()
        processes.wait()

    def finish(self) -> None:
        """Let the new files take the place of the older ones."""
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
