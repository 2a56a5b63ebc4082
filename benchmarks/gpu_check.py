"""Runs everything that needs a GPU, in under 10 minutes and without network: `make gpu-check`.

There are three stages, each with a time budget. `probe` measures the costs of the parts of a step.
`verify` compiles in place, compares results, runs the tests marked `cuda` and looks for memory
errors. `bench` compares rnnfast with torch.nn (cuDNN). Each result is a line of JSON, printed and
written to a file at once. At the end all results are written to one JSON file, and a short table is
printed. A part that fails or takes too long does not stop the others.

`--dry-run` runs all stages without a GPU: the probe is only compiled, nothing is built, and the
emulation on the CPU stands in for the CUDA kernels.
"""

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TextIO

import torch

from .gpu_probe import cuda_tool
from .lines import parse

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DRY_RUN_RESULTS = ROOT / "build" / "gpu-check-dry-run"
TOTAL_SECONDS = 570.0
DRY_RUN_SECONDS = 300.0  # limit of each part in a dry run, on a machine that may be slow and busy
END_SECONDS = 5.0  # a part is told to end this long before it is killed
STAGES = ("probe", "verify", "bench")
PASSED, NOT_RUN = "passed", "not run: "


class Part(NamedTuple):
    """A program to run, for up to `at_most` seconds; earlier parts leave it `at_least` seconds."""

    name: str
    stage: str
    at_most: float
    at_least: float
    command: tuple[str, ...]
    ends_itself: bool = False  # whether it takes --seconds
    dry_run: bool = True  # whether it takes --dry-run


PARTS = (
    Part("probe", "probe", 70, 30, ("-m", "benchmarks.gpu_probe")),
    Part(
        "build",
        "verify",
        300,
        60,
        ("setup.py", "-q", "build_ext", "--inplace", "--force"),
        dry_run=False,
    ),
    Part("parity", "verify", 60, 20, ("-m", "benchmarks.gpu_verify"), ends_itself=True),
    Part("tests", "verify", 150, 40, ("-m", "benchmarks.gpu_tests"), ends_itself=True),
    Part("memcheck", "verify", 60, 15, ("-m", "benchmarks.tiny_cuda")),
    Part("racecheck", "verify", 45, 15, ("-m", "benchmarks.tiny_cuda"), dry_run=False),
    Part("bench", "bench", TOTAL_SECONDS, 90, ("-m", "benchmarks.gpu_bench"), ends_itself=True),
)
SANITIZERS = ("memcheck", "racecheck")  # tools of compute-sanitizer
Facts = dict[str, object]


def limit_of(number: int, parts: list[Part], seconds_left: float) -> float:
    """Returns how long a part may take so that every later part still has its `at_least`."""
    kept = sum(part.at_least for part in parts[number + 1 :])
    return max(0.0, min(parts[number].at_most, seconds_left - kept))


class Record:
    """Collects the lines: appends each to one file at once, and writes all to another."""

    def __init__(self, folder: Path, name: str, facts: Facts) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        self.path = folder / f"{name}.json"
        self.facts = facts
        self.checks: dict[str, str] = {}
        self.lines: list[Facts] = []
        self.file: TextIO = (folder / f"{name}.jsonl").open("w")
        self.add(facts)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, facts: Facts) -> None:
        self.lines.append(facts)
        print(json.dumps(facts), file=self.file, flush=True)
        print(json.dumps(facts), flush=True)

    def end(self, part: Part, outcome: str, last_words: list[str]) -> None:
        self.checks[part.name] = outcome
        words = {"output": last_words} if last_words and outcome != PASSED else {}
        self.add({"part": part.name, "outcome": outcome, "at": round(self.seconds(), 1), **words})
        self.write()

    def write(self) -> None:
        content = {**self.facts, "seconds": round(self.seconds(), 1), "checks": self.checks}
        if rows := self.timed_rows():
            content["summary"] = late("suite").summarize(rows)
        self.path.write_text(json.dumps(content | {"lines": self.lines}, indent=1) + "\n")

    def timed_rows(self) -> list[Facts]:
        """Returns the rows of `bench`, with "tf32" as the dtype of those in TF32."""
        return [
            row | ({"dtype": "tf32"} if row["precision"] == "tf32" else {})
            for row in self.lines
            if "ratio_min" in row
        ]

    def table(self) -> str:
        probed = [line for line in self.lines if "probe" in line and "us" in line]
        lines = [
            " ".join(
                f"{key} {value}" for key, value in line.items() if key not in ("part", "probe")
            )
            for line in probed
        ]
        lines = [f"{line['probe']:16} {text}" for line, text in zip(probed, lines, strict=True)]
        if rows := self.timed_rows():
            compare = late("compare")
            lines += [compare.HEADER, *map(compare.format_row, rows)]
        lines += [f"{part:10} {outcome}" for part, outcome in self.checks.items()]
        return "\n".join([*lines, f"took {self.seconds():.0f} s; all numbers: {self.path}"])


def late(name: str) -> ModuleType:
    """Imports a module that needs the extension, which a part of this run builds."""
    return import_module(f"benchmarks.{name}")


def run(
    command: list[str], limit: float, environment: dict[str, str], record: Record, part: Part
) -> None:
    """Runs a part, records its lines as they come, and records how it ended."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    words: list[str] = []
    try:
        for text in process.stdout:
            if facts := parse(text):
                record.add({"part": part.name, **facts})
            else:
                print(text, end="", flush=True)
                words.append(text.rstrip())
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    if stopped.is_set():
        outcome = f"stopped after {limit:.0f} s"
    else:
        outcome = PASSED if code == 0 else f"failed with exit code {code}"
    record.end(part, outcome, words[-30:])


def command_of(part: Part, limit: float, dry_run: bool) -> list[str] | str:
    """Returns the command of a part, or the reason why it is not run."""
    command = [sys.executable, *part.command]
    if part.ends_itself:
        command += ["--seconds", f"{max(1.0, limit - END_SECONDS):.0f}"]
    if dry_run and part.dry_run:
        program = command[command.index("-m") + 1 :]
        return [sys.executable, "-m", "benchmarks.emulated", *program, "--dry-run"]
    if part.name in SANITIZERS:
        # Errors of driver calls are not reported: torch probes for features that a driver may lack.
        options = ["--tool", part.name, "--report-api-errors", "no", "--error-exitcode", "1"]
        tool = cuda_tool("compute-sanitizer")
        if tool is None and not dry_run:
            return "compute-sanitizer was not found"
        command = [tool or "compute-sanitizer", *options, *command]
    return f"a dry run; else: {' '.join(command)}" if dry_run else command


def environment_of(part: Part, dry_run: bool) -> dict[str, str]:
    if dry_run:  # speed does not matter, and other processes may share the machine
        return {"OMP_NUM_THREADS": "1"}
    if part.name == "build":
        major, minor = torch.cuda.get_device_capability()
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
        return {"FORCE_CUDA": "1", "RNNFAST_CPU_TARGETS": "portable", "TORCH_CUDA_ARCH_LIST": archs}
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if part.name in SANITIZERS else {}


def describe(dry_run: bool) -> Facts:
    """Returns the facts that are known before rnnfast is built; `bench` adds the rest."""
    facts: Facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dry_run": dry_run,
    }
    if not dry_run:
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def run_or_not(part: Part, limit: float, dry_run: bool, record: Record) -> None:
    command = command_of(part, limit, dry_run)
    if isinstance(command, str):
        record.end(part, NOT_RUN + command, [])
    elif not record.checks.get("build", PASSED).startswith((PASSED, NOT_RUN)):
        record.end(part, "failed: there is no build", [])
    else:
        print(f"== {part.name}, {limit:.0f} s at most: {' '.join(command)}", flush=True)
        run(command, limit, environment_of(part, dry_run), record, part)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="run only these stages")
    add("--seconds", type=float, default=TOTAL_SECONDS, help="total time (default: %(default)g)")
    add("--results", type=Path, metavar="FOLDER", help="where to write the two result files")
    add("--dry-run", action="store_true", help="run what can run without a GPU")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__} (CUDA {torch.version.cuda}) sees none")
        print("--dry-run goes through all stages without one")
        return 1
    facts = describe(args.dry_run)
    name = "dry-run" if args.dry_run else re.sub(r"\W+", "-", str(facts["gpu"]))
    folder = args.results or (DRY_RUN_RESULTS if args.dry_run else RESULTS)
    record = Record(folder, f"{name}-{str(facts['date'])[:10]}", facts)
    parts = [part for part in PARTS if part.stage in args.stage]
    try:
        for number, part in enumerate(parts):
            limit = limit_of(number, parts, args.seconds - record.seconds())
            limit = DRY_RUN_SECONDS if args.dry_run else limit
            run_or_not(part, limit, args.dry_run, record)
    finally:
        record.write()
        print(record.table())
    fine = all(outcome.startswith((PASSED, NOT_RUN)) for outcome in record.checks.values())
    return 0 if fine else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
