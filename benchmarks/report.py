"""Writes what README.md and benchmarks/README.md say in figures: `python -m benchmarks.report`.

Each figure comes from a file in benchmarks/results. A document marks where a part goes by
`<!-- report: NAME -->` and `<!-- end -->`. `--check` changes nothing and fails where a document or
the picture differs from what the results say.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image

from .models import describe_layers
from .plot import STYLES, case_of, format_ratio, markdown, timed_rows
from .steps import CELLS, MODES, Case
from .suite import best_peers, geometric_mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
PICTURE = RESULTS / "summary.png"
MARKED = re.compile(r"(<!-- report: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.S)

# What is in the summary: the results file, and how the machine is called there.
MACHINES = {
    "zen5": "AMD EPYC (Zen 5): AVX-512",
    "zen5-avx2": "the same, limited to AVX2",
    "xeon": "Intel Xeon: AMX",
}
# Machines beside these whose cases are listed.
MORE_MACHINES = {"zen4": "AMD EPYC (Zen 4): AVX-512", "zen4-avx2": "Zen 4, limited to AVX2"}
DRAWN = "zen5"
GROUPS: dict[str, Callable[[Case], bool]] = {
    "one step": lambda case: case.T == 1,
    "B = 1": lambda case: case.T > 1 and case.B == 1,
    "B ≥ 16": lambda case: case.B >= 16,
}
Row = dict[str, Any]


def load(name: str) -> Row:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def source(report: Row) -> str:
    """Where figures come from: hardware, versions, date and command."""
    m = report["machine"]
    line = (
        f"{m['cpu']}, {m['threads']} threads, {m['date'][:10]}, commit {m['commit']}, torch "
        f"{m['torch']}, Python {m['python']}, {m['built_with']['compiler']}"
    )
    return f"{line}: `{report['command']}`" if "command" in report else line


def ratios_of(rows: list[Row], peer: str) -> dict[tuple[str, str, Case], float]:
    """The peer's time over rnnfast's, by mode, cell and case."""
    chosen = best_peers(rows) if peer == "best" else [row for row in rows if row["peer"] == peer]
    return {(row["mode"], row["cell"], case_of(row)): row["ratio_min"] for row in chosen}


def group_mean(ratios: dict[tuple[str, str, Case], float], mode: str, cell: str, group: str) -> str:
    inside = [
        ratio
        for (of_mode, of_cell, case), ratio in ratios.items()
        if (of_mode, of_cell) == (mode, cell) and GROUPS[group](case)
    ]
    return format_ratio(geometric_mean(inside))


def summary() -> str:
    """Geometric means by machine, cell, mode and group: over torch.nn / over the best peer."""
    head = ["", "", *(f"{mode}, {group}" for mode in MODES for group in GROUPS)]
    lines = []
    for name, title in MACHINES.items():
        rows = timed_rows(load(name), "float32")
        peers = ["torch"] + ["best"] * (len({row["peer"] for row in rows}) > 1)
        ratios = [ratios_of(rows, peer) for peer in peers]
        for cell in CELLS:
            cells = [
                " / ".join(group_mean(of_peer, mode, cell, group) for of_peer in ratios)
                for mode in MODES
                for group in GROUPS
            ]
            lines.append([title if cell == next(iter(CELLS)) else "", cell, *cells])
    return table(head, lines)


def least() -> str:
    """The least ratios of all machines, and where those of the drawn one come from."""
    report = load(DRAWN)
    found = []
    for peer, words in (("torch", "torch.nn"), ("best", "the fastest peer")):
        ratios = []
        for name, title in (MACHINES | MORE_MACHINES).items():
            rows = timed_rows(load(name), "float32")
            for (mode, cell, case), ratio in ratios_of(rows, peer).items():
                sizes = str(case).replace(",", ", ")
                ratios.append((ratio, f"{cell} {mode} at T, B, I, H = {sizes}, {title}"))
        slower = sum(ratio < 1 for ratio, _ in ratios)
        worst, where = min(ratios)
        found.append(
            f"slower than {words} in {slower} of {len(ratios)} cases, "
            f"{format_ratio(worst)} at worst ({where})"
        )
    return f"On all machines measured, rnnfast is {'; '.join(found)}.\nZen 5: {source(report)}."


def step() -> str:
    """Time of a single call, from Python to Python."""
    rows = timed_rows(load(DRAWN), "float32")
    found = {
        row["mode"]: row
        for row in rows
        if (row["cell"], row["peer"], case_of(row)) == ("LSTM", "torch", Case(1, 1, 64, 64))
    }
    seconds = [
        f"{1e6 * found[mode][key]:.3g}" for mode in MODES for key in ("rnnfast_min", "peer_min")
    ]
    return (
        "One step of an LSTM with 64 inputs and 64 units takes {} us in rnnfast and {} us in "
        "torch.nn; with the backward, {} and {} us.".format(*seconds)
    )


def machine_tables() -> str:
    """Every case of every machine of the summary."""
    parts = []
    for name, title in (MACHINES | MORE_MACHINES).items():
        report = load(name)
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n{source(report)}")
        if (picture := RESULTS / f"{name}.png").exists():
            parts.append(f"![Time of each peer over time of rnnfast](results/{picture.name})")
        parts.append(markdown(report, "torch", "float32"))
        if limits := [s for s in report["summary"] if "good_of_limit" in s and s["peer"] == "best"]:
            counts = ", ".join(
                f"{s['good_of_limit']} of {s['cases']} in {s['mode']}"
                for s in limits
                if s["cell"] == "all"
            )
            parts.append(f"Cases that reach 85 % of the roofline: {counts}.")
    return "\n\n".join(parts)


def half() -> str:
    """bfloat16 beside torch.nn in bfloat16."""
    rows = []
    for name, title in (MACHINES | MORE_MACHINES).items():
        path = RESULTS / f"{name}-bfloat16.json"
        if not path.exists():
            continue
        for s in json.loads(path.read_text())["summary"]:
            if s["cell"] == "all" and s["peer"] == "torch":
                means = [format_ratio(s[key]) for key in ("ratio_min", "least_ratio_min")]
                rows.append([title, s["mode"], *means, f"{s['cases']}"])
    return table(["", "mode", "geometric mean", "least", "cases"], rows)


def ratio_and_verdict(row: Row) -> str:
    """The ratio, and the verdict over several processes unless it is a win."""
    words = "" if row.get("verdict", "win") == "win" else f" ({row['verdict']})"
    return format_ratio(row["ratio_min"]) + words


def by_threads(report: Row, head: list[str], describe: Callable[[Row], tuple[str, ...]]) -> str:
    """Returns a table with a column for each mode and number of threads, and what it says in all.

    `describe` returns the cells below `head`. The ratios to several peers stand in the order in
    which they were asked for; peers that never run in a mode are left out there.
    """
    rows = report["rows"]
    timed = [row for row in rows if "ratio_min" in row]
    columns = list(dict.fromkeys((row["threads"], row["mode"]) for row in timed))
    columns.sort(key=lambda column: column[0])
    used = {(row["mode"], row["peer"]) for row in timed}
    found: dict[tuple[str, ...], dict[tuple[int, str], list[str]]] = {}
    for row in rows:
        if (row["mode"], row["peer"]) in used:
            entry = ratio_and_verdict(row) if "ratio_min" in row else "-"
            of_case = found.setdefault(describe(row), {})
            of_case.setdefault((row["threads"], row["mode"]), []).append(entry)
    titles = [f"{mode}, {threads} thread{'s'[: threads > 1]}" for threads, mode in columns]
    lines = [
        [*case, *(" / ".join(entries[column]) for column in columns)]
        for case, entries in found.items()
    ]
    said = []
    for s in report["summary"]:
        if s["cell"] == "all" and s["peer"] != "best":
            mean, least = (format_ratio(s[key]) for key in ("ratio_min", "least_ratio_min"))
            line = f"- {s['mode']}, {s['threads']} thread{'s'[: s['threads'] > 1]}, over "
            line += (
                f"{STYLES[s['peer']][0]}: geometric mean {mean}, least {least}, {s['cases']} cases"
            )
            if "verdicts" in s:
                line += ": {win} wins, {level} level, {loss} losses".format(**s["verdicts"])
            said.append(f"{line}.")
    return "\n\n".join([source(report), table([*head, *titles], lines), "\n".join(said)])


def models() -> str:
    def describe(row: Row) -> tuple[str, ...]:
        sizes = str(case_of(row)).replace(",", ", ")
        return f"{row['name']}, {row['part']}", describe_layers(row), sizes

    return by_threads(load("models"), ["model", "module", "T, B, I, H"], describe)


def models_in_short() -> str:
    """Inference over torch.nn / ONNX Runtime and training over torch.nn, with most threads."""
    report = load("models")
    threads = max(row["threads"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["threads"] == threads]
    found: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in rows:
        case = f"{row['name']}, {row['part']}", describe_layers(row)
        entry = ratio_and_verdict(row) if "ratio_min" in row else "-"
        found.setdefault(case, {})[row["mode"], row["peer"]] = entry
    lines = [
        [
            *case,
            f"{entries['inference', 'torch']} / {entries['inference', 'onnxruntime']}",
            entries["training", "torch"],
        ]
        for case, entries in found.items()
    ]
    return f"{table(['model', 'module', *MODES], lines)}\n\n{source(report)}"


def programs() -> str:
    report = load("programs")
    lines = [
        [
            row["program"],
            str(row["threads"]),
            ratio_and_verdict(row),
            f"{row['share']:.0%}" if "share" in row else "",
        ]
        for row in report["rows"]
    ]
    head = ["program", "threads", "torch.nn's time / rnnfast's", "share of cells"]
    return f"{source(report)}\n\n{table(head, lines)}"


def cells(name: str = "cells") -> str:
    def describe(row: Row) -> tuple[str, ...]:
        return row["cell"], "{B}, {I}, {H}".format(**row)

    return by_threads(load(name), ["cell", "B, I, H"], describe)


FROZEN_PEERS = {
    "float32": ("unfrozen", "onnxruntime"),
    "bfloat16": ("unfrozen",),
    "float16": ("unfrozen",),
    "int8": ("unfrozen", "torch_int8", "onnxruntime_int8"),
}
"""The peers of each type of frozen weights that the table shows."""


def frozen(name: str = "frozen") -> str:
    """A table for each number of threads, with a column for each type of weights."""
    report = load(name)
    types = [name for name in FROZEN_PEERS if name in {row["dtype"] for row in report["rows"]}]
    report_peers = {row["peer"] for row in report["rows"]}
    entries = {
        (row["threads"], row["cell"], str(case_of(row)), row["dtype"], row["peer"]): (
            ratio_and_verdict(row) if "ratio_min" in row else "-"
        )
        for row in report["rows"]
    }
    cases = list(dict.fromkeys(key[:3] for key in entries))
    parts = [source(report)]
    for threads in sorted({key[0] for key in cases}):
        lines = [
            [
                *(cell, case.replace(",", ", ")),
                *(
                    " / ".join(
                        entries[threads, cell, case, dtype, peer]
                        for peer in FROZEN_PEERS[dtype]
                        if peer in report_peers
                    )
                    for dtype in types
                ),
            ]
            for of_case, cell, case in cases
            if of_case == threads
        ]
        parts.append(f"{threads} thread{'s'[: threads > 1]}:")
        parts.append(table(["cell", "T, B, I, H", *types], lines))
    said = [
        f"- {s['dtype']}, {s['threads']} thread{'s'[: s['threads'] > 1]}, over "
        f"{STYLES[s['peer']][0]}: geometric mean {format_ratio(s['ratio_min'])}, least "
        f"{format_ratio(s['least_ratio_min'])}, {s['cases']} cases"
        for s in report["summary"]
        if s["cell"] == "all" and s["peer"] in FROZEN_PEERS[s["dtype"]]
    ]
    return "\n\n".join([*parts, "\n".join(f"{line}." for line in said)])


def custom() -> str:
    """Cells that users write: the table by threads, and the times of compiling."""
    if not (RESULTS / "custom.json").exists():
        return "Not measured yet."
    report = load("custom")

    def describe(row: Row) -> tuple[str, ...]:
        return row["cell"], str(case_of(row)).replace(",", ", ")

    lines = [
        [row["cell"], f"{row['first']:.1f}", f"{1e3 * row['cached']:.0f}"]
        for row in report["compiles"]
    ]
    head = ["cell", "first compile, s", "later start, ms"]
    return f"{by_threads(report, ['cell', 'T, B, I, H'], describe)}\n\n{table(head, lines)}"


def rtneural() -> str:
    """Times of a step, and RTNeural's over ours."""
    report = load("rtneural")
    lines = [
        [
            f"{row['I']}, {row['H']}",
            row["weights"],
            f"{row['rnnfast_min_us']:.3f}",
            f"{row['rtneural_min_us']:.3f} ({row['variant']})",
            format_ratio(row["ratio"]),
        ]
        for row in report["rows"]
    ]
    head = ["I, H", "weights", "rnnfast", "RTNeural", "RTNeural's time / rnnfast's"]
    return f"{source(report)}\n\n{table(head, lines)}"


def streams() -> str:
    """Latencies of a step of one stream, and steps a second of many."""
    report = load("streams")
    latencies = [
        [
            row["name"],
            row["weights"],
            *(f"{1e6 * row[part]:.2f}" for part in ("median", "99%", "99.9%")),
        ]
        for row in report["latency"]
    ]
    speeds = [
        [
            row["name"],
            row["weights"],
            str(row["batch"]),
            f"{row['batch'] / row['min']:,.0f}",
            *(format_ratio(row[f"over {peer}"]) for peer in ("Stream.step", "frozen module")),
        ]
        for row in report["throughput"]
    ]
    head = ["one stream", "weights", "median, us", "99 %", "99.9 %"]
    others = ["over Stream.step", "over the module"]
    return "\n\n".join(
        [
            source(report),
            table(head, latencies),
            table(["many streams", "weights", "batch", "steps a second", *others], speeds),
        ]
    )


def odd() -> str:
    def describe(row: Row) -> tuple[str, ...]:
        return row["cell"], str(case_of(row)).replace(",", ", ")

    return by_threads(load("odd-avx2"), ["cell", "T, B, I, H"], describe)


def sequences() -> str:
    report = load("sequences")
    found: dict[tuple[str, str], Row] = {}
    for row in report["rows"]:
        by_kind = found.setdefault((row["case"], row["mode"]), {})
        for kind, ratio in row["ratios"].items():
            by_kind.setdefault(kind, []).append(format_ratio(ratio))
    head = ["T, B, I, H", "mode", "packed", "lengths", "projection (LSTM)", "reset"]
    kinds = ("packed", "lengths", "projection", "reset")
    lines = [
        [case.replace(",", ", "), mode, *(", ".join(by_kind[kind]) for kind in kinds)]
        for (case, mode), by_kind in found.items()
    ]
    return f"{source(report)}\n\n{table(head, lines)}"


def systems() -> str:
    report = load("systems")
    lines = [
        [row["case"], what, format_ratio(ratio)]
        for row in report["rows"]
        for what, ratio in row["ratios"].items()
    ]
    return f"{source(report)}\n\n{table(['case', 'what over what', 'ratio'], lines)}"


def memory() -> str:
    report = load("memory")
    head = ["T, B, H", "rnnfast", "rnnfast, recompute=True", "torch.nn"]
    lines = [
        [
            row["size"].replace(",", ", "),
            *(
                f"{row['mib'][name]:.0f} MiB ({row['mib'][name] / row['mib']['torch']:.2f})"
                for name in ("rnnfast", "rnnfast recompute", "torch")
            ),
        ]
        for row in report["rows"]
    ]
    return f"{source(report)}\n\n{table(head, lines)}"


PARTS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "least": least,
    "step": step,
    "machines": machine_tables,
    "bfloat16": half,
    "models": models,
    "models-in-short": models_in_short,
    "programs": programs,
    "cells": cells,
    "cells-avx2": lambda: cells("cells-avx2"),
    "frozen": frozen,
    "frozen-avx2": lambda: frozen("frozen-avx2"),
    "custom": custom,
    "rtneural": rtneural,
    "streams": streams,
    "odd": odd,
    "sequences": sequences,
    "systems": systems,
    "memory": memory,
}


def filled(text: str) -> str:
    """A document with every marked part as the results have it."""
    return MARKED.sub(lambda m: f"{m[1]}{PARTS[m['name']]()}\n{m[3]}", text)


def relative_times() -> dict[str, dict[tuple[str, str], list[float]]]:
    """Time over torch.nn's, by implementation, mode and cell, for each group."""
    rows = timed_rows(load(DRAWN), "float32")
    torch_over_ours = ratios_of(rows, "torch")
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for peer in ["rnnfast", *(p for p in STYLES if p not in ("torch", "torch_int8"))]:
        peer_over_ours = dict.fromkeys(torch_over_ours, 1.0)
        if peer != "rnnfast":
            peer_over_ours = ratios_of(rows, peer)
        for mode in MODES:
            for cell in CELLS:
                means = []
                for inside in GROUPS.values():
                    keys = [k for k in torch_over_ours if k[:2] == (mode, cell) and inside(k[2])]
                    if keys and all(k in peer_over_ours for k in keys):
                        times = [peer_over_ours[k] / torch_over_ours[k] for k in keys]
                        means.append(geometric_mean(times))
                if len(means) == len(GROUPS):
                    found.setdefault(peer, {})[mode, cell] = means
    return found


def digest() -> str:
    """Tells whether the picture shows the results as they are."""
    return hashlib.sha256(repr(relative_times()).encode()).hexdigest()


def draw() -> None:
    times = relative_times()
    colors = {"rnnfast": "#222222"} | {peer: style[1] for peer, style in STYLES.items()}
    labels = {"rnnfast": "rnnfast"} | {peer: style[0] for peer, style in STYLES.items()}
    figure, panels = plt.subplots(2, 3, figsize=(10, 5), sharey=True, layout="constrained")
    for axes_row, mode in zip(panels, MODES, strict=True):
        for axes, cell in zip(axes_row, CELLS, strict=True):
            here = [peer for peer in times if (mode, cell) in times[peer]]
            width = 0.8 / len(times)
            for peer in here:
                shift = (list(times).index(peer) - (len(times) - 1) / 2) * width
                places = [group + shift for group in range(len(GROUPS))]
                bars = axes.bar(
                    places, times[peer][mode, cell], width, color=colors[peer], label=labels[peer]
                )
                if peer == "rnnfast":
                    axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
            axes.axhline(1, color="#D55E00", linewidth=1.2, label="torch.nn")
            axes.set_xticks(range(len(GROUPS)), GROUPS)
            axes.set_ylim(0, 1.6)
            axes.set_title(f"{cell}, {mode}", fontsize=11, loc="left")
            axes.tick_params(length=0)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        axes_row[0].set_ylabel("time / time of torch.nn")
    m = load(DRAWN)["machine"]
    figure.suptitle(
        f"Lower is better. float32, geometric means, {m['threads']} threads, "
        f"{MACHINES[DRAWN]}, torch {m['torch']} (bars above 1.6 are cut)",
        fontsize=11,
    )
    handles = {
        h.get_label(): h for axes in panels.flat for h in axes.get_legend_handles_labels()[0]
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.savefig(PICTURE, dpi=110, metadata={"Description": digest()})
    plt.close(figure)


def stale() -> list[str]:
    """What differs from the results."""
    found = [path.name for path in DOCUMENTS if filled(path.read_text()) != path.read_text()]
    if not PICTURE.exists() or Image.open(PICTURE).info.get("Description") != digest():
        found.append(PICTURE.name)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only say what is not as it should be")
    if parser.parse_args(argv).check:
        for name in (found := stale()):
            print(f"{name} differs from the results: python -m benchmarks.report", file=sys.stderr)
        return bool(found)
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text()))
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
