"""Compares rnnfast (backend "fused") with its peers: `python -m benchmarks.compare --help`.

For every mode, cell and case, all implementations get the same weights and input. Their results are
checked against torch.nn in float64, and then they are timed in turn, in this process. A ratio is
the peer's time divided by rnnfast's: above 1, rnnfast is faster. On the CPU each row also has a
limit, the least time that this machine could take, and the limit divided by rnnfast's time. The
limit is computed after a short calibration; see `python -m benchmarks.roofline --help`.
"""

import argparse
import contextlib
import csv
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from . import machine, roofline
from .peers import PEERS, UnsupportedError, build_rnnfast
from .steps import (
    CELLS,
    MODES,
    Case,
    Problem,
    Step,
    disagreement,
    make_problem,
    module_step,
    results,
)
from .timing import time_in_turn

DEFAULT_CASES = (
    "1,1,64,64 1,1,512,512 100,1,64,64 100,1,256,256 100,1,512,512 100,1,1024,1024 "
    "100,16,128,128 100,32,256,256 100,64,512,512 50,64,1024,1024 50,256,512,512 784,32,1,128"
)
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BEST = "best"  # in the summary: the fastest peer of each case, among those in full precision
GOOD_FRACTION = 0.85  # the summary counts cases that reach this fraction of the limit
Row = dict[str, object]


def parse_case(text: str) -> Case:
    try:
        case = Case(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: four integers T,B,I,H are wanted") from None
    if min(case) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: every size must be at least 1")
    return case


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--mode", nargs="+", choices=MODES, default=list(MODES))
    add("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    add("--case", nargs="+", type=parse_case, default=DEFAULT_CASES.split(), metavar="T,B,I,H")
    add("--peers", nargs="+", choices=PEERS, default=["torch"])
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    add("--input-grad", action="store_true", help="training also asks for the gradient of x")
    add(
        "--threads",
        nargs="+",
        type=int,
        default=[torch.get_num_threads()],
        help="CPU threads; several numbers give a table of how times scale",
    )
    add("--min-time", type=float, default=1.0, help="seconds of timing for each implementation")
    add("--repeats", type=int, default=5, help="minimum number of timing rounds")
    add("--time-limit", type=float, default=math.inf, help="start no case after these seconds")
    add("--tolerance", type=float, default=0.0, help="allowed error of rnnfast, see steps.py")
    add("--no-limit", action="store_true", help="skip the calibration and the limits")
    add("--json", type=Path, metavar="FILE", help="write hardware, versions and all numbers")
    add("--csv", type=Path, metavar="FILE", help="write the table")
    args = parser.parse_args(argv)
    args.case = [parse_case(case) if isinstance(case, str) else case for case in args.case]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if len(args.threads) > 1 and "jax" in args.peers:
        parser.error("--peers jax: JAX takes its number of threads once, at its start")
    return args


def build_all(peers: Iterable[str], problem: Problem) -> tuple[dict[str, Step], Row]:
    """Returns the implementations that can run the problem, and for the others the reason why not.

    Both are by name.
    """
    steps = {"rnnfast": build_rnnfast(problem)}
    reasons: Row = {}
    for name in peers:
        try:
            steps[name] = PEERS[name].build(problem)
        except UnsupportedError as reason:
            reasons[name] = str(reason)
        except ImportError as missing:
            reasons[name] = f"not installed: {missing}"
    return steps, reasons


def compare_one(problem: Problem, args: argparse.Namespace) -> Iterator[Row]:
    """Checks all results, then times; yields one row for each peer."""
    inference = problem.mode == "inference"
    no_grad = torch.inference_mode() if inference else contextlib.nullcontext()
    synchronize = torch.cuda.synchronize if problem.x.is_cuda else lambda: None
    with no_grad:
        steps, reasons = build_all(args.peers, problem)
        exact, ours = (
            results(module_step(p.module, p)) for p in (problem.to(torch.float64), problem)
        )
        for name, step in steps.items():
            tolerance = PEERS[name].tolerance if name in PEERS else args.tolerance
            if wrong := disagreement(results(step), ours, exact, tolerance):
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


class Roofline:
    """The limits of cases on this machine, from calibrations on one thread and on all threads."""

    def __init__(self, threads: int) -> None:
        self.one, self.all = roofline.calibrate(1), roofline.calibrate(threads)

    def of(self, cell: str, case: Case, dtype: str, mode: str, input_grad: bool) -> Row:
        one, limit = (
            roofline.limit(cell, case, mode, dtype, input_grad, m) for m in (self.one, self.all)
        )
        synchronised = roofline.synchronised(case, mode, one, limit, self.all)
        return {
            "limit": limit.seconds,
            "limit_bound": limit.bound,
            "limit_fma": limit.fma,
            "limit_traffic": limit.traffic,
            "limit_synchronised": synchronised,
        }


def calibrated(args: argparse.Namespace) -> dict[int, Roofline]:
    """The limits for each number of threads; empty if there are none."""
    if args.no_limit or args.device != "cpu":
        return {}
    try:
        limits = {threads: Roofline(threads) for threads in args.threads}
    except roofline.CalibrationError as error:
        print(f"no limits: {error}", file=sys.stderr)
        return {}
    for roof in limits.values():
        for machine_ in (roof.one, roof.all):
            print(roofline.format_calibration(machine_))
    return limits


def compare(args: argparse.Namespace, limits: dict[int, Roofline]) -> Iterator[Row]:
    """Yields a row for each mode, cell, dtype, case, number of threads and peer."""
    deadline = time.monotonic() + args.time_limit
    for mode, cell, dtype, case, threads in itertools.product(
        args.mode, args.cell, args.dtype, args.case, args.threads
    ):
        torch.set_num_threads(threads)
        where: Row = {"mode": mode, "cell": cell, "dtype": dtype, **case._asdict()}
        where["threads"] = threads
        if time.monotonic() > deadline:
            yield where | {"peer": " ".join(args.peers), "not_timed": "no time was left"}
            continue
        problem = make_problem(cell, case, args.device, DTYPES[dtype], mode, args.input_grad)
        for row in compare_one(problem, args):
            if threads in limits and "not_timed" not in row:
                row |= limits[threads].of(cell, case, dtype, mode, args.input_grad)
                row["of_limit"] = row["limit"] / row["rnnfast_min"]
            yield where | row


def format_row(row: Row) -> str:
    case = "{T},{B},{I},{H}".format(**row)
    where = f"{row['mode']:9} {row['cell']:4} {row['dtype']:8} {case:>15} {row['threads']:>7}  "
    where += f"{row['peer']:12}"
    if "not_timed" in row:
        return f"{where} {row['not_timed']}"
    times = " ".join(f"{row[key] * 1e6:11.1f}" for key in ("rnnfast_min", "peer_min"))
    line = f"{where} {times} {row['ratio_min']:8.2f} {row['ratio_median']:9.2f}"
    if "limit" in row:
        line += f" {row['of_limit']:8.0%} {row['limit_bound']}"
    return line


HEADER = (
    f"{'mode':9} {'cell':4} {'dtype':8} {'T,B,I,H':>15} {'threads':>7}  {'peer':12} "
    f"{'rnnfast us':>11} {'peer us':>11} {'by min':>8} {'by median':>9} {'of limit':>8}"
)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def best_peers(timed: list[Row]) -> list[Row]:
    """Returns, for each case, the row of the fastest peer in full precision, renamed to BEST."""
    best: dict[tuple[object, ...], Row] = {}
    for row in timed:
        columns = ("mode", "cell", "dtype", "threads", *Case._fields)
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
        means = {
            "cases": len(group),
            "ratio_min": geometric_mean(by_min),
            "ratio_median": geometric_mean([row["ratio_median"] for row in group]),
            "least_ratio_min": min(by_min),
        }
        if all("of_limit" in row for row in group):
            means["good_of_limit"] = sum(row["of_limit"] >= GOOD_FRACTION for row in group)
        summary.append(dict(zip(by, key, strict=True)) | means)
    return summary


def format_summary(summary: list[Row]) -> str:
    lines = ["geometric means of peer time / rnnfast time, and the least ratio by min:"]
    for s in summary:
        lines.append(
            f"{s['mode']:9} {s['cell']:4} {s['dtype']:8} {s['threads']} threads {s['cases']:>9} "
            f"cases  {s['peer']:12} "
            f"by min {s['ratio_min']:6.2f}  by median {s['ratio_median']:6.2f}  "
            f"least {s['least_ratio_min']:6.2f}"
        )
    reached = [s for s in summary if s["peer"] == BEST and "good_of_limit" in s]
    if reached:
        lines.append(f"cases in which rnnfast reaches {GOOD_FRACTION:.0%} of the limit:")
    for s in reached:
        counts = f"{s['good_of_limit']} of {s['cases']}"
        lines.append(f"{s['mode']:9} {s['cell']:4} {s['dtype']:8} {s['threads']} threads {counts}")
    return "\n".join(lines)


def format_scaling(rows: list[Row]) -> str:
    """How many times as fast more threads are than the first number of them."""
    times: dict[tuple[object, ...], dict[object, tuple[float, float]]] = {}
    for row in rows:
        if "not_timed" not in row:
            case = (row["mode"], row["cell"], row["dtype"], *(row[size] for size in Case._fields))
            seconds = (row["rnnfast_min"], row["peer_min"])
            times.setdefault((*case, row["peer"]), {})[row["threads"]] = seconds
    lines = ["speed-up by threads, rnnfast / peer:"]
    for (mode, cell, dtype, T, B, I, H, peer), by_threads in times.items():
        first = next(iter(by_threads.values()))
        ratios = (
            f"{threads}: {first[0] / ours:.2f} / {first[1] / theirs:.2f}"
            for threads, (ours, theirs) in by_threads.items()
        )
        lines.append(f"{mode:9} {cell:4} {dtype:8} {T},{B},{I},{H}  {peer}  " + "  ".join(ratios))
    return "\n".join(lines)


def write_json(path: Path, device: str, rows: list[Row], **more: object) -> None:
    """All numbers (times in seconds), with the machine they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine.describe(device), **more, "summary": summarize(rows)}
    path.write_text(json.dumps(content | {"rows": rows}, indent=1) + "\n")


def write_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    limits = calibrated(args)
    print(HEADER)
    rows = []
    for row in compare(args, limits):
        rows.append(row)
        print(format_row(row), flush=True)
    print(format_summary(summarize(rows)))
    if len(args.threads) > 1:
        print(format_scaling(rows))
    if args.json:
        command = "python -m benchmarks.compare " + " ".join(argv or sys.argv[1:])
        more = {"command": command, "input_grad": args.input_grad}
        if limits:
            roofs = [roof for limit in limits.values() for roof in (limit.one, limit.all)]
            more["calibration"] = [roof.describe() for roof in roofs]
        write_json(args.json, args.device, rows, **more)
    if args.csv:
        write_csv(args.csv, rows)
    wrong = [row for row in rows if "disagrees" in str(row.get("not_timed", ""))]
    if wrong:
        print(f"{len(wrong)} of {len(rows)} rows have numbers that disagree", file=sys.stderr)
    timed = any("not_timed" not in row for row in rows)
    if not timed:
        print("nothing was timed", file=sys.stderr)
    return 1 if wrong or not timed else 0


if __name__ == "__main__":
    sys.exit(main())
