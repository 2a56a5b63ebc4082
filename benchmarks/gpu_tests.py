"""Runs the tests marked `cuda`; prints a line of JSON per test function and per failure."""

import argparse
import sys
import time
from pathlib import Path

import pytest

from .lines import emit

TESTS = Path(__file__).resolve().parents[1] / "tests"
FILES = ("test_cuda.py", "test_kernels.py", "test_operators.py", "test_gates.py")
DRY_RUN_FILES, DRY_RUN_TESTS = ("test_gates.py",), "cuda_emulation"


class Reporter:
    """A pytest plugin that replaces the terminal reporter."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.function, self.started = "", time.monotonic()
        self.counts: dict[str, int] = {}
        self.total: dict[str, int] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.count("errors")
            emit(collecting=report.nodeid, error=report.longreprtext[-2000:])

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        function = item.nodeid.split("[")[0]
        if function != self.function:
            self.flush()
            self.function, self.started = function, time.monotonic()
        if time.monotonic() > self.deadline:
            item.session.shouldstop = "the time is over"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.count("failed")
            emit(test=report.nodeid, failed=report.longreprtext[-2000:])
        elif report.skipped or report.when == "call":
            self.count(report.outcome)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.flush()
        left = session.testscollected - sum(self.total.get(key, 0) for key in ("passed", "skipped"))
        emit(tests=self.total, not_run=max(0, left - self.total.get("failed", 0)))

    def count(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        self.total[outcome] = self.total.get(outcome, 0) + 1

    def flush(self) -> None:
        if self.function and self.counts:
            taken = round(time.monotonic() - self.started, 2)
            emit(function=self.function, **self.counts, seconds=taken)
        self.counts = {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no test after these")
    parser.add_argument("--dry-run", action="store_true", help="run a few, on the emulation")
    parser.add_argument("--files", nargs="+", type=Path, help="default: those with `cuda` tests")
    args = parser.parse_args(argv)
    files = args.files or [TESTS / name for name in (DRY_RUN_FILES if args.dry_run else FILES)]
    reporter = Reporter(time.monotonic() + args.seconds)
    command = ["-p", "no:terminal", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["-k", DRY_RUN_TESTS] if args.dry_run else ["-m", "cuda and not full"]
    code = pytest.main([*command, *map(str, files)], plugins=[reporter])
    return 0 if code == pytest.ExitCode.OK and reporter.total.get("passed") else 1


if __name__ == "__main__":
    sys.exit(main())
