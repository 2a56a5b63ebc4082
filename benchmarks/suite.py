"""What the comparisons of rnnfast with its peers share: options, measurement, processes, summary.

A program (`benchmarks.compare`, `benchmarks.models`, `benchmarks.cells`, `benchmarks.frozen`,
`benchmarks.custom`) says which problems it measures, as items. For each item all implementations
get the same weights and input. Their results are checked against torch.nn, or a loop in PyTorch, in
float64, and then they are timed in turn, in one process. A ratio is the peer's time divided by
rnnfast's: above 1, rnnfast is faster.

With `--processes N` all of it is repeated in N new processes. A new process has other addresses in
memory and meets another moment of the machine, so ratios differ more between processes than within
one. A case is a win if rnnfast is faster in every process, a loss if the peer is, and else level.
"""

import argparse
import contextlib
import csv
import itertools
import json
import math
import multiprocessing
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import machine
from .peers import PEERS, Builder, UnsupportedError, build_rnnfast
from .steps import Case, Problem, Step, disagreement, module_step, results
from .timing import time_in_turn

BEST = "best"  # in the summary: the fastest peer of each case, among those in full precision
GOOD_FRACTION = 0.85  # the summary counts cases that reach this fraction of the limit
VERDICTS = ("win", "level", "loss")
Row = dict[str, Any]


class Item(NamedTuple):
    """Something to measure."""

    where: Row
    """The columns that identify its rows."""
    make: Callable[[], Problem]
    build: Builder = build_rnnfast
    """How rnnfast is built, with which peers are compared."""
    tolerance: float | None = None
    """The allowed error of rnnfast, see steps.py; None for the option of the command."""


Items = Callable[[argparse.Namespace], Iterator[Item]]


def add_options(
    parser: argparse.ArgumentParser, modes: Iterable[str], peers: list[str], processes: int
) -> None:
    """Adds the options of every program, with some of their defaults."""
    add = parser.add_argument
    add("--mode", nargs="+", choices=[*modes], default=[*modes])
    add("--peers", nargs="+", choices=PEERS, default=peers)
    add("--input-grad", action="store_true", help="training also asks for the gradient of x")
    add("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="CPU threads")
    add("--min-time", type=float, default=1.0, help="seconds of timing for each implementation")
    add("--repeats", type=int, default=5, help="minimum number of timing rounds")
    add("--time-limit", type=float, default=math.inf, help="start no case after these seconds")
    add("--tolerance", type=float, default=0.0, help="allowed error of rnnfast, see steps.py")
    add(
        "--processes",
        type=int,
        default=processes,
        help="repeat everything in so many new processes, one after the other, and print "
        "how far the ratios spread (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write hardware, versions and all numbers")
    add("--csv", type=Path, metavar="FILE", help="write the table")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.processes < 1:
        parser.error("--processes: at least one is needed")
    if len(args.threads) > 1 and "jax" in args.peers:
        parser.error("--peers jax: JAX takes its number of threads once, at its start")


def build_all(
    peers: Iterable[str], problem: Problem, build: Builder
) -> tuple[dict[str, Step], Row]:
    """Returns the implementations that can run the problem, and for the others the reason why not.

    Both are by name.
    """
    steps = {"rnnfast": build(problem)}
    reasons: Row = {}
    for name in peers:
        try:
            steps[name] = PEERS[name].build(problem)
        except UnsupportedError as reason:
            reasons[name] = str(reason)
        except ImportError as missing:
            reasons[name] = f"not installed: {missing}"
    return steps, reasons


def compare_one(
    problem: Problem,
    args: argparse.Namespace,
    build: Builder = build_rnnfast,
    tolerance: float | None = None,
) -> Iterator[Row]:
    """Checks all results, then times; yields one row for each peer."""
    own_tolerance = args.tolerance if tolerance is None else tolerance
    inference = problem.mode == "inference"
    no_grad = torch.inference_mode() if inference else contextlib.nullcontext()
    synchronize = torch.cuda.synchronize if problem.x.is_cuda else lambda: None
    with no_grad:
        steps, reasons = build_all(args.peers, problem, build)
        exact, ours = (
            results(module_step(p.module, p)) for p in (problem.to(torch.float64), problem)
        )
        for name, step in steps.items():
            allowed = PEERS[name].tolerance if name in PEERS else own_tolerance
            if wrong := disagreement(results(step), ours, exact, allowed):
                reasons[name] = f"disagrees: {wrong}"
        agreeing = {name: step.run for name, step in steps.items() if name not in reasons}
        timings = {}
        if "rnnfast" in agreeing and len(agreeing) > 1:
            timings = time_in_turn(agreeing, synchronize, args.min_time, args.repeats)
    for peer in args.peers:
        row: Row = {"peer": peer, "lower_precision": PEERS[peer].tolerance > 0}
        if peer in timings:
            fast, other = timings["rnnfast"], timings[peer]
            row |= {f"rnnfast_{key}": value for key, value in fast._asdict().items()}
            row |= {f"peer_{key}": value for key, value in other._asdict().items()}
            row["ratio_min"] = other.min / fast.min
            row["ratio_median"] = other.median / fast.median
        else:
            names = ("rnnfast", peer) if "rnnfast" in reasons else (peer,)
            row["not_timed"] = "; ".join(f"{n} {reasons[n]}" for n in names if n in reasons)
        yield row


def measured(items: Items, args: argparse.Namespace) -> Iterator[Row]:
    """Yields a row for each item, number of threads and peer, measured in this process."""
    deadline = time.monotonic() + args.time_limit
    for item, threads in itertools.product(items(args), args.threads):
        where = item.where | {"threads": threads}
        if time.monotonic() > deadline:
            yield from (where | {"peer": p, "not_timed": "no time was left"} for p in args.peers)
            continue
        torch.set_num_threads(threads)
        for row in compare_one(item.make(), args, item.build, item.tolerance):
            yield where | row


def measured_and_shown(
    items: Items, show: Callable[[Row], str], args: argparse.Namespace
) -> list[Row]:
    """What each of several processes does. The lines show the progress."""
    rows = []
    for row in measured(items, args):
        rows.append(row)
        print(show(row), flush=True)
    return rows


def rows_of(items: Items, show: Callable[[Row], str], args: argparse.Namespace) -> Iterator[Row]:
    """Yields the rows of all items; with several processes, one row for those of all processes.

    `items` and `show` must be functions of a module, since they are sent to the processes.
    """
    if args.processes == 1:
        yield from measured(items, args)
        return
    runs = []
    for k in range(args.processes):
        print(f"process {k + 1} of {args.processes}", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            runs.append(pool.submit(measured_and_shown, items, show, args).result())
    print(f"all {args.processes} processes", flush=True)
    yield from merged(runs)


def merged(runs: list[list[Row]]) -> Iterator[Row]:
    """Yields a row for each case: medians over the processes, all ratios, and the verdict."""
    for rows in zip(*runs, strict=True):
        failed = [row for row in rows if "not_timed" in row]
        if failed:
            yield failed[0]
            continue
        medians = {
            key: statistics.median(row[key] for row in rows)
            for key in rows[0]
            if key.endswith(("_min", "_median"))
        }
        ratios = [row["ratio_min"] for row in rows]
        yield rows[0] | medians | {"ratios": ratios, "verdict": verdict(ratios)}


def verdict(ratios: list[float]) -> str:
    """Returns one of `VERDICTS` for the ratios of several processes."""
    if min(ratios) > 1:
        return "win"
    return "loss" if max(ratios) < 1 else "level"


NUMBERS = f"{'rnnfast us':>11} {'peer us':>11} {'by min':>8} {'by median':>9}"


def format_numbers(row: Row) -> str:
    """Returns the columns of `NUMBERS`, or why there are none, and the spread over processes."""
    if "not_timed" in row:
        return str(row["not_timed"])
    times = " ".join(f"{row[key] * 1e6:11.1f}" for key in ("rnnfast_min", "peer_min"))
    line = f"{times} {row['ratio_min']:8.2f} {row['ratio_median']:9.2f}"
    if "ratios" in row:
        least, most = min(row["ratios"]), max(row["ratios"])
        spread = (most - least) / row["ratio_min"]
        line += f"  {least:.2f} to {most:.2f}, spread {spread:4.0%}  {row['verdict']}"
    return line


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def best_peers(timed: list[Row]) -> list[Row]:
    """Returns, for each case, the row of the fastest peer in full precision, renamed to BEST."""
    best: dict[tuple[object, ...], Row] = {}
    for row in timed:
        columns = ("mode", "name", "cell", "dtype", "threads", *Case._fields)
        case = tuple(row.get(column) for column in columns)
        full = not row.get("lower_precision")
        if full and (case not in best or row["ratio_min"] < best[case]["ratio_min"]):
            best[case] = row
    return [row | {"peer": BEST} for row in best.values()]


def summarize(rows: list[Row]) -> list[Row]:
    """Geometric means of the ratios, by peer, mode, dtype and cell (and all cells together)."""
    by = ("peer", "mode", "dtype", "threads", "cell")
    groups: dict[tuple[object, ...], list[Row]] = {}
    timed = [row for row in rows if "not_timed" not in row]
    timed += best_peers(timed)
    for row in timed + [row | {"cell": "all"} for row in timed]:
        groups.setdefault(tuple(row[column] for column in by), []).append(row)
    summary = []
    for key, group in groups.items():
        by_min = [row["ratio_min"] for row in group]
        means: Row = {
            "cases": len(group),
            "ratio_min": geometric_mean(by_min),
            "ratio_median": geometric_mean([row["ratio_median"] for row in group]),
            "least_ratio_min": min(by_min),
        }
        if all("of_limit" in row for row in group):
            means["good_of_limit"] = sum(row["of_limit"] >= GOOD_FRACTION for row in group)
        if all("verdict" in row for row in group):
            counts = Counter(row["verdict"] for row in group)
            means["verdicts"] = {each: counts[each] for each in VERDICTS}
        summary.append(dict(zip(by, key, strict=True)) | means)
    return summary


def format_summary(summary: list[Row]) -> str:
    lines = ["geometric means of peer time / rnnfast time, and the least ratio by min:"]
    for s in summary:
        line = (
            f"{s['mode']:9} {s['cell']:8} {s['dtype']:8} {s['threads']} threads {s['cases']:>9} "
            f"cases  {s['peer']:12} "
            f"by min {s['ratio_min']:6.2f}  by median {s['ratio_median']:6.2f}  "
            f"least {s['least_ratio_min']:6.2f}"
        )
        if "verdicts" in s:
            line += "  " + ", ".join(f"{name} {n}" for name, n in s["verdicts"].items())
        lines.append(line)
    reached = [s for s in summary if s["peer"] == BEST and "good_of_limit" in s]
    if reached:
        lines.append(f"cases in which rnnfast reaches {GOOD_FRACTION:.0%} of the limit:")
    for s in reached:
        counts = f"{s['good_of_limit']} of {s['cases']}"
        lines.append(f"{s['mode']:9} {s['cell']:8} {s['dtype']:8} {s['threads']} threads {counts}")
    return "\n".join(lines)


def write_json(path: Path, facts: Row, rows: list[Row]) -> None:
    """All numbers (times in seconds), with the machine they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = facts | {"summary": summarize(rows), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def finish(
    program: str,
    rows: list[Row],
    args: argparse.Namespace,
    argv: list[str] | None,
    **more: object,
) -> int:
    """Prints the summary, writes the files, and returns the exit status."""
    print(format_summary(summarize(rows)))
    if args.json:
        where = machine.describe(getattr(args, "device", "cpu")) | {"threads": max(args.threads)}
        command = f"python -m {program} " + shlex.join(sys.argv[1:] if argv is None else argv)
        facts: Row = {"machine": where, "command": command, "input_grad": args.input_grad}
        write_json(args.json, facts | {"processes": args.processes} | more, rows)
    if args.csv:
        write_csv(args.csv, rows)
    wrong = [row for row in rows if "disagrees" in str(row.get("not_timed", ""))]
    if wrong:
        print(f"{len(wrong)} of {len(rows)} rows have numbers that disagree", file=sys.stderr)
    timed = any("not_timed" not in row for row in rows)
    if not timed:
        print("nothing was timed", file=sys.stderr)
    return 1 if wrong or not timed else 0


def run(
    program: str,
    items: Items,
    header: str,
    show: Callable[[Row], str],
    args: argparse.Namespace,
    argv: list[str] | None,
) -> int:
    """The main function of a program that has nothing to add to this module."""
    print(header)
    rows = []
    for row in rows_of(items, show, args):
        rows.append(row)
        print(show(row), flush=True)
    return finish(program, rows, args, argv)
