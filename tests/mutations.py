"""Measures how many faults the tests of kernels catch: ``python -m tests.mutations [number ...]``.

It copies the project to a temporary folder and inserts every fault below behind a switch, the
environment variable RNNFAST_FAULT, so that one build has all faults. Then it runs the tests once
without a fault and once with each, until the first failure. ``--tests`` selects other tests than
the short suite's. ``--limit`` is the time limit of a run in seconds; a run that takes longer is
reported as hung, because of a missing barrier or a slow machine.

A fault must change results: a wrong prefetch, or a slower way to the same bits, is none. Faults of
AMX also show on machines with AVX512-BF16, through the emulation of AMX.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/test_microkernels.py", "tests/test_kernels.py", "tests/test_operators.py"]
SWITCH = """\
#pragma once
#include <cstdlib>
namespace rnnfast {
inline int fault_of_environment() {
  const char* number = std::getenv("RNNFAST_FAULT");
  return number ? std::atoi(number) : 0;
}
inline int fault = fault_of_environment();
}  // namespace rnnfast
"""
FIRST = "csrc/cpu/kernels/baseline.h"
"""The file that includes the switch, before an instruction set is selected: it runs on any CPU."""


class Fault(NamedTuple):
    name: str
    file: str
    """The file, in csrc/."""
    text: str
    """A text that occurs once in the file and contains the expression."""
    good: str
    """The expression: its first occurrence in the text is replaced."""
    bad: str
    """The replacement, of the same type."""
    matters: str
    """The calls in which the fault makes a difference."""


FORWARD, BACKWARD = "cpu/drivers/forward.cpp", "cpu/drivers/backward.cpp"
PRODUCTS, CELL_TILE = "cpu/drivers/block_products.cpp", "cpu/kernels/cell_tile.h"
BATCH, HISTORY = "cpu/drivers/batch.h", "cpu/drivers/history.h"
DOTS, CONVERT = "cpu/kernels/dots.h", "cpu/kernels/convert.h"

# fmt: off
FAULTS = [
    Fault("row of a gradient stored beyond its end", CONVERT,
          "store(result + i, value, n - i)", "n - i", "int64_t(kLanes<A>)", "any H"),
    Fault("weights read beyond the last row", DOTS,
          "smaller(first + i, rows - 1)", "smaller(first + i, rows - 1)", "int64_t(first + i)",
          "weights that are not packed, memory that ends"),
    Fault("gates swapped in W_ih of the gradient of x", PRODUCTS,
          "context_.cell.input_gate[k / H] * H + k % H", "context_.cell.input_gate[k / H]",
          "int(k / H)", "GRU"),
    Fault("stale h where a sequence starts at an odd step", FORWARD,
          "if (batch_.is_ragged()) std::memcpy", "batch_.is_ragged()", "false",
          "lengths, reverse"),
    Fault("no barrier between packing rows and multiplying them", PRODUCTS,
          "team.barrier();\n  if (of_x) accumulate", "team.barrier()", "void()",
          "several threads, gradients of weights"),
    Fault("no barrier between steps", FORWARD,
          "first += active.size();\n      team.unit_barrier();", "team.unit_barrier()", "void()",
          "several threads that split units"),
    Fault("reset lost for c before a step", HISTORY,
          "if (batch.resets(t, b)) return zeros_.data;\n    if (batch.is_first(t, b)) return c0_",
          "batch.resets(t, b)", "false", "LSTM, resets, gradients"),
    Fault("gradient of c passes a reset", CELL_TILE,
          "row.cut ? V{} : d_c[k].v[i]", "row.cut", "false", "LSTM, resets"),
    Fault("reset at the end of a shorter sequence", BATCH,
          "border < length(b)", "length(b)", "size_.T", "reverse, padded, resets"),
    Fault("reverse sequences begin at T - 1", BATCH,
          "(reverse_ ? length(b) - 1 : 0)", "length(b) - 1", "size_.T - 1", "reverse, lengths"),
    Fault("gradient of y read as if contiguous", BACKWARD,
          "args_.grad_y_stride_t, args_.grad_y_stride_b", "args_.grad_y_stride_t",
          "args_.size.B * args_.grad_y_stride_b", "gradient of y batch first or expanded"),
    Fault("bias added with every chain of a sum", "cpu/kernels/product.h",
          "begin == 0 && bias", "begin == 0", "true",
          "sums of more than one chain"),
    Fault("chain cut one element short", DOTS,
          "smaller(K, k + kPart)", "k + kPart", "k + kPart - 1",
          "weights that are not packed, sums of more than one chain"),
    Fault("c of a narrow last panel not saved", CELL_TILE,
          "if (row.c_copy) store(", "row.c_copy",
          "(t.units >= lanes ? row.c_copy : nullptr)", "LSTM, H that is no multiple of a vector"),
    Fault("no gradient of h0 for sequences without a step", BACKWARD,
          "finish(0, {last.end, rows_.end})", "last.end", "rows_.end", "lengths of 0"),
    Fault("bf16x3: element 16 of 17 left out", "cpu/kernels/bf16x3.h",
          "K - k > lanes ? load(source + k + lanes, K - k - lanes)", "K - k > lanes",
          "K - k > lanes + 1", "AMX, K % 32 == 17"),
    Fault("row in place of its sequence", BACKWARD,
          "history_.batch.place(b) * size + unit", "history_.batch.place(b)", "b",
          "gradient of c0, lengths"),
    Fault("gates of tokens computed again without b_ih", "cpu/drivers/recompute.cpp",
          "table_.set(args.w_ih, args.b_ih);", "args.b_ih",
          "static_cast<const void*>(nullptr)", "tokens, recompute"),
    Fault("a token's second gradient in place of the sum", PRODUCTS,
          "end - begin, true);", "true", "!block.is_first()", "tokens that come twice"),
    Fault("last word of a projected row not completed", FORWARD,
          "if (unprojected_) complete(unprojected_, b, H)", "unprojected_", "Rows{}",
          "proj_size, bfloat16 pairs, odd H"),
    Fault("odd element of the last pair not cleared", "cpu/kernels/pack.h",
          "k < words<Op>(K) * Op::kPerWord; ++k)", "words<Op>(K) * Op::kPerWord", "K",
          "bfloat16 pairs, odd K"),
    Fault("float16 rounded towards zero", CONVERT,
          "HalfBits(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT))",
          "HalfBits(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT))",
          "HalfBits(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_ZERO))", "float16 on AVX-512"),
    Fault("sigmoid off by up to 8 ulp near 1", "cpu/kernels/math.h",
          "select(x < Wide<V, N>{}, q, 1 - q)", "1 - q",
          "select(e < ElementOf<V>(sizeof(ElementOf<V>) == 4 ? 0x1p-10 : 0), 1 - e, 1 - q)",
          "float, gates near 1"),
    Fault("1 - i in place of 1 - f", "cells/lstm.h",
          "c_prev[0] * f * (1 - f)", "(1 - f)", "(1 - i)", "LSTM, gradients"),
    Fault("widest tile for a narrow last panel", "cpu/drivers/weights.h",
          "last_vectors_(gates > 1 ?", "gates > 1", "true", "Elman, H % (4 vectors)"),
    Fault("three of four rows summed", DOTS,
          "as_constant(count, [&]<int R>() {\n    const S* values", "count",
          "(count == 4 ? 3 : count)", "gradients of weights from four rows"),
    Fault("a slot too few for the gate gradients", BACKWARD,
          "slots_ = recomputes() ? plan.block_steps + 1 : 2 * plan.block_steps",
          "recomputes() ? plan.block_steps + 1 : 2 * plan.block_steps", "plan.block_steps",
          "blocks of one step: 512 sequences or more"),
    Fault("threads' rows by the wrong side of the grid", "cpu/parallel.h",
          "return index_ / unit_shares_;", "index_ / unit_shares_", "index_ % row_shares_",
          "grids of several rows and columns: 4 threads or more"),
    Fault("c of another thread's units", FORWARD,
          "const int64_t begin = panels_.begin * hidden_.units();", "hidden_.units()",
          "hidden_.width()", "LSTM, several threads that split units"),
    Fault("final h of the other parity", FORWARD,
          "args_.reverse ? args_.size.T : batch_.length(b)", "args_.reverse", "true",
          "lengths of another parity than T"),
    Fault("wrong distance between rows read in place", "cpu/drivers/weights.h",
          ".pitch = N_}", "N_", "width_", "one step, gradient of h0 or x, few sequences"),
    Fault("second half of a tile over the first", "cpu/kernels/product.h",
          "static_cast<A*>(out) + first * lanes", "first * lanes", "0 * lanes",
          "AVX2, four sequences or more"),
    Fault("tiles of a wider panel for a narrow one", PRODUCTS,
          "columns.tile_rows(group.end - 1) != columns.tile_rows(p)",
          "columns.tile_rows(group.end - 1) != columns.tile_rows(p)", "false",
          "AVX2, last panel of three vectors"),
    Fault("last chain of a sum read in place alone", "cpu/drivers/weights.h",
          ".add = k > 0", "k > 0", "false", "one step, gradient of h0 or x, long sums"),
    Fault("first gates of a row for every chain read in place", "cpu/drivers/weights.h",
          "at(lhs[first + i], k * word)", "k * word", "0", "one step, gradient of h0 or x"),
]
# fmt: on


def switched(number: int, fault: Fault, source: str) -> str:
    """Returns the source with the fault behind its switch."""
    if source.count(fault.text) != 1 or fault.good not in fault.text:
        raise ValueError(f"fault {number}: not once in {fault.file}: {fault.text}")
    choice = f"(rnnfast::fault == {number} ? ({fault.bad}) : ({fault.good}))"
    return source.replace(fault.text, fault.text.replace(fault.good, choice, 1))


def make_copy(folder: Path) -> None:
    """Copies the project and inserts all faults, none switched on."""
    for name in ("csrc", "rnnfast", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc" / "fault.h").write_text(SWITCH)
    sources: dict[str, str] = {}
    for number, fault in enumerate(FAULTS, 1):
        source = sources.get(fault.file) or (folder / "csrc" / fault.file).read_text()
        sources[fault.file] = switched(number, fault, source)
    sources[FIRST.removeprefix("csrc/")] = (folder / FIRST).read_text()
    for name, source in sources.items():
        (folder / "csrc" / name).write_text(f'#include "fault.h"\n{source}')


def build(folder: Path) -> None:
    environment = os.environ | {"RNNFAST_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def run_tests(folder: Path, number: int, tests: list[str], limit: float) -> tuple[str, float]:
    """Runs the tests; returns the first that fails (or what happened instead) and the seconds."""
    environment = os.environ | {"RNNFAST_FAULT": str(number), "PYTHONPATH": str(folder)}
    environment |= {"RNNFAST_TEST_SEED": "20300101"}  # the same random calls for all faults
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-x", "-v", "--tb=line"]
    command += ["-p", "no:cacheprovider", *tests]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            code = process.wait() and None
        log.seek(0)
        output = log.read()
    seconds = time.monotonic() - begin
    started = re.findall(r"^(\S+\.py::.*?)(?: (?:PASSED|FAILED|SKIPPED|Fatal)\b.*)?$", output, re.M)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+\.py::.*?)(?: - .*)?$", output, re.M)
    if failed:
        return failed[0], seconds
    if code == 0:
        return "nothing", seconds
    last = started[-1].strip() if started else output[-300:]
    return f"{'hung in' if code is None else f'exit {code} in'} {last}", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", type=int, nargs="*", help="faults to run; all if none")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest runs")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each run")
    parser.add_argument("--folder", type=Path, help="a copy that a call before has built, to use")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "csrc").exists():
            make_copy(folder)
            build(folder)
        print("| | fault | caught by | s |\n|---|---|---|---|", flush=True)
        for number in [0, *(options.numbers or range(1, len(FAULTS) + 1))]:
            name = FAULTS[number - 1].name if number else "none"
            caught, seconds = run_tests(folder, number, options.tests, options.limit)
            print(f"| {number} | {name} | {caught} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
