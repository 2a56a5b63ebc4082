"""The plot of the losses of a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

    Numbers = NDArray[np.float64]


def plot_loss(log: dict[str, Numbers], bigram: float, path: Path) -> None:
    """Plot the training loss, the validation loss, and the loss of the bigram model.

    A thin line shows the loss of each batch, a thick line its moving average, and a horizontal line
    the bigram model. The axis does not cover the highest training losses, which occur in the first
    steps.

    Args:
        log: The columns that `rnnfast.models.training_log.read_log` returns.
        bigram: The loss of the bigram model in bits per character.
        path: The PNG file.

    Raises:
        OSError: The file cannot be written.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    characters, training = log["characters"], log["bits_per_char"]
    smoothed = smooth(training, max(1, len(training) // 40))
    point = "o" if len(training) == 1 else None
    axes.plot(characters, training, color="C0", alpha=0.3, linewidth=0.8, marker=point)
    axes.plot(characters, smoothed, color="C0", linewidth=1.8, label="training, smoothed")
    seen = ~np.isnan(log["validation_bits_per_char"])
    validation = log["validation_bits_per_char"][seen]
    axes.plot(
        characters[seen],
        validation,
        color="C1",
        marker="o",
        markersize=4,
        label=f"held-out (best {validation.min():.2f})",
    )
    axes.axhline(bigram, color="C2", linestyle="--", label=f"bigram, held-out ({bigram:.2f})")
    lowest = min(training.min(), validation.min(), bigram)
    highest = max(np.quantile(training, 0.95), validation.max(), bigram)
    margin = 0.05 * (highest - lowest) or 0.5
    axes.set(
        title="Losses of the training",
        xlabel="characters read",
        ylabel="loss, bits per character",
        xlim=(0, None),
        ylim=(lowest - margin, highest + margin),
    )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def smooth(values: Numbers, width: int) -> Numbers:
    """The moving average over each value, up to `width` values before it and as many after it.

    At the beginning, where losses fall fast, the window is symmetric and therefore shorter. At the
    end there are fewer values after a value than before it.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    before = np.minimum(places, width)
    behind = np.minimum(before, places[::-1])
    return (sums[places + behind + 1] - sums[places - before]) / (before + behind + 1)
