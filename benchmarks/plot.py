"""Plots a comparison, or prints it as a table: `python -m benchmarks.plot RESULTS.json --png FILE`.

The plot has one panel for each mode and cell, and one dot for each case and peer. The x axis (log
scale) is the peer's minimum time divided by rnnfast's; rnnfast is slower in the grey area.
`--markdown` prints a table with two ratios: to `--peer`, and to the fastest of all peers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

mpl.use("Agg")
from matplotlib import pyplot as plt

from .steps import CELLS, MODES, Case
from .suite import best_peers

Row = dict[str, Any]
# The colours of Okabe and Ito, which are safe for colour-blind readers, and a marker for each peer.
STYLES = {
    "torch": ("torch.nn", "#D55E00", "o"),
    "onnxruntime": ("ONNX Runtime", "#0072B2", "s"),
    "openvino": ("OpenVINO", "#CC79A7", "^"),
    "jax": ("JAX scan, jit", "#009E73", "D"),
    "torch_int8": ("torch int8 (lower precision)", "#999999", "x"),
    "onnxruntime_int8": ("ONNX Runtime int8 (lower precision)", "#56B4E9", "x"),
    "unfrozen": ("rnnfast, not frozen", "#000000", "o"),
    "loop": ("a loop in PyTorch", "#D55E00", "o"),
    "compiled": ("the loop under torch.compile", "#F0E442", "s"),
    "builtin": ("rnnfast's own layer or cell", "#000000", "o"),
}


def case_of(row: Row) -> Case:
    return Case(*(row[size] for size in Case._fields))


def timed_rows(report: Row, dtype: str) -> list[Row]:
    """Those with the most threads."""
    timed = [row for row in report["rows"] if "ratio_min" in row and row["dtype"] == dtype]
    most = max((row.get("threads", 0) for row in timed), default=0)
    return [row for row in timed if row.get("threads", 0) == most]


def draw_panel(axes: Axes, rows: list[Row], cases: list[Case]) -> None:
    axes.axvline(1, color="black", linewidth=1)
    axes.axvspan(1e-3, 1, color="black", alpha=0.07, linewidth=0)
    for peer, (label, color, marker) in STYLES.items():
        of_peer = [row for row in rows if row["peer"] == peer]
        axes.scatter(
            [row["ratio_min"] for row in of_peer],
            [cases.index(case_of(row)) for row in of_peer],
            s=34,
            label=label,
            color=color,
            marker=marker,
            linewidth=1.2 if marker == "x" else 0.5,
            edgecolor=None if marker == "x" else "white",
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_yticks(range(len(cases)), [str(case).replace(",", ", ") for case in cases])
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def draw(report: Row, path: Path, dtype: str) -> None:
    rows = timed_rows(report, dtype)
    cases = list(dict.fromkeys(map(case_of, rows)))
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    cells = [cell for cell in CELLS if any(row["cell"] == cell for row in rows)]
    height = 1.5 + len(modes) * (0.9 + 0.24 * len(cases))
    figure, panels = plt.subplots(
        len(modes),
        len(cells),
        figsize=(1.4 + 3.2 * len(cells), height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for mode, line in zip(modes, panels, strict=True):
        for cell, axes in zip(cells, line, strict=True):
            here = [row for row in rows if (row["mode"], row["cell"]) == (mode, cell)]
            draw_panel(axes, here, cases)
            axes.set_title(f"{cell}, {mode}", fontsize=11, loc="left")
        line[0].set_ylabel("T, B, I, H")
    ratios = [row["ratio_min"] for row in rows]
    panels[0, 0].set_xlim(min(0.8, *ratios) / 1.15, max(2, *ratios) * 1.15)
    low, high = panels[0, 0].get_xlim()
    steps = (1, 2, 5) if high / low < 60 else (1, 3) if high / low < 1000 else (1,)
    ticks = [step * 10.0**power for power in range(-2, 4) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    panels[0, 0].set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    panels[0, 0].set_xticks([], minor=True)
    machine = report["machine"]
    figure.suptitle(
        f"Time of each peer / time of rnnfast, {dtype} (grey: rnnfast is slower)\n"
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}",
        fontsize=12,
    )
    present = {row["peer"] for row in rows}
    legend = {
        handle.get_label(): handle
        for handle in panels[0, 0].collections
        if handle.get_label() in {STYLES[peer][0] for peer in present & set(STYLES)}
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def format_ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def markdown(report: Row, peer: str, dtype: str) -> str:
    """Returns a table, cases by cells and modes: ratio to `peer` / ratio to the fastest peer."""
    rows = timed_rows(report, dtype)
    columns = list(dict.fromkeys((row["mode"], row["cell"]) for row in rows))
    found: dict[tuple[object, ...], list[str]] = {}
    for row in [row for row in rows if row["peer"] == peer] + best_peers(rows):
        key = (case_of(row), row["mode"], row["cell"])
        found.setdefault(key, []).append(format_ratio(row["ratio_min"]))
    lines = ["| T, B, I, H | " + " | ".join(f"{cell} {mode}" for mode, cell in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for case in dict.fromkeys(map(case_of, rows)):
        cells = [" / ".join(found.get((case, *column), ["-"])) for column in columns]
        lines.append("| " + " | ".join([str(case).replace(",", ", "), *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("results", type=Path, help="what benchmarks.compare --json wrote")
    add("--png", type=Path, metavar="FILE", help="draw the plot")
    add("--markdown", action="store_true", help="print the table")
    add("--peer", default="torch", help="the peer of the table's first numbers")
    add("--dtype", default="float32")
    args = parser.parse_args(argv)
    report = json.loads(args.results.read_text())
    if not timed_rows(report, args.dtype):
        parser.error(f"{args.results}: nothing was timed in {args.dtype}")
    if args.png:
        draw(report, args.png, args.dtype)
    if args.markdown:
        print(markdown(report, args.peer, args.dtype))


if __name__ == "__main__":
    main()
