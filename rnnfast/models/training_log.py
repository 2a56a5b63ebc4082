"""A row for every step of a training, in a CSV file and, if wished, for TensorBoard."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnfast.models.atomic import write_atomically
from rnnfast.models.training import Record

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

FILE_NAME = "log.csv"
COLUMNS = (*Record._fields, "seconds")


class TrainingLog:
    """Writes rows as the steps happen; a context manager.

    The CSV file has one line for its header and one for each step. Numbers are written in full,
    so that two trainings were the same if their files are, apart from the last column.

    Args:
        path: the CSV file.
        steps: how many of its steps are kept, for the training goes on after them.
        tensorboard: a folder for TensorBoard, or None.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: there are fewer steps in it, or tensorboard is not installed.
    """

    def __init__(self, path: Path, steps: int = 0, tensorboard: Path | None = None) -> None:
        header = ",".join(COLUMNS) + "\n"
        kept = _first_lines(path, steps) if steps else [header]
        if kept[0] != header:
            raise ValueError(f"{path} is not the log of a training: expected the header {header!r}")
        self._writer: Any = None
        if tensorboard is not None:  # its later steps, of an earlier training, are hidden
            self._writer = summary_writer_class()(tensorboard, purge_step=steps + 1)
        write_atomically(path, "".join(kept).encode())
        self._file = path.open("a", encoding="ascii", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, record: Record, seconds: float) -> None:
        """Add a step; it is in the file when this returns."""
        self._rows.writerow([*record, f"{seconds:.3f}"])
        self._file.flush()
        if self._writer is None:
            return
        scalars = {
            "bits per character/training": record.bits_per_char,
            "bits per character/validation": record.validation_bits_per_char,
            "learning rate": record.learning_rate,
            "gradient norm": record.gradient_norm,
        }
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.step)

    def sync(self) -> None:
        """Wait until the rows are on the disk, as they must be before a checkpoint counts them."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()


def read_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of the CSV file, with NaN where there is no number.

    Raises:
        OSError: the file cannot be read.
    """
    rows = np.genfromtxt(path, delimiter=",", skip_header=1, ndmin=2)
    return dict(zip(COLUMNS, rows.T, strict=True))


def _first_lines(path: Path, steps: int) -> list[str]:
    """The header and the rows of the first steps, of what may end in the middle of a row."""
    with path.open(encoding="ascii", errors="replace", newline="") as file:
        lines = file.readlines()[: steps + 1]
    last = f"{steps},"
    if len(lines) <= steps or not (lines[-1].startswith(last) and lines[-1].endswith("\n")):
        raise ValueError(f"{path} has not all of the {steps} steps that the training has taken")
    return lines


def summary_writer_class() -> Any:
    """What writes for TensorBoard.

    Raises:
        ValueError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        if error.name != "tensorboard":
            raise
        raise ValueError(
            "--tensorboard needs tensorboard: pip install 'rnnfast[tensorboard]'"
        ) from None
    return SummaryWriter
