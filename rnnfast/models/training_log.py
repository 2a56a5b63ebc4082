"""The log of a training: one row per step in a CSV file and, optionally, in TensorBoard."""

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
    """Writes a row after each step; a context manager.

    The CSV file has one header line and one line per step. Numbers are written with all their
    digits. Two trainings computed the same numbers if their files are equal in all columns but the
    last, the time.

    Args:
        path: the CSV file.
        steps: the number of rows to keep from an existing file, when a training is resumed.
        tensorboard: a folder for TensorBoard, or None.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: the existing file has fewer rows than `steps`, or tensorboard is not installed.
    """

    def __init__(self, path: Path, steps: int = 0, tensorboard: Path | None = None) -> None:
        header = ",".join(COLUMNS) + "\n"
        kept = _first_lines(path, steps) if steps else [header]
        if kept[0] != header:
            raise ValueError(f"{path} is not the log of a training: expected the header {header!r}")
        self._writer: Any = None
        if tensorboard is not None:  # purge_step hides the later steps of an earlier training
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
        """Write the row of a step to the file."""
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
        """Flush the rows to the disk, so that a checkpoint never counts rows that may get lost."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()


def read_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read the columns of the CSV file; an empty field becomes NaN.

    Raises:
        OSError: the file cannot be read.
    """
    rows = np.genfromtxt(path, delimiter=",", skip_header=1, ndmin=2)
    return dict(zip(COLUMNS, rows.T, strict=True))


def _first_lines(path: Path, steps: int) -> list[str]:
    """The header and the rows of the first steps; the file may end with an incomplete row."""
    with path.open(encoding="ascii", errors="replace", newline="") as file:
        lines = file.readlines()[: steps + 1]
    last = f"{steps},"
    if len(lines) <= steps or not (lines[-1].startswith(last) and lines[-1].endswith("\n")):
        raise ValueError(f"{path} has not all of the {steps} steps that the training has taken")
    return lines


def summary_writer_class() -> Any:
    """Import torch's class that writes files for TensorBoard.

    Raises:
        ValueError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        if error.name != "tensorboard":
            raise
        raise ValueError("--tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter
