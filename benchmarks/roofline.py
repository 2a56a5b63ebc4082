"""Computes how fast a layer could be on this CPU: `python -m benchmarks.roofline --help`.

A layer has phases that follow each other: the projection of the input and the steps of the forward,
and in training the steps of the backward and the products over all steps. The limit of a case is
the sum over its phases of the larger of two times. Both assume that all threads work at the rates
that `calibrate` measures on this machine first:

- Arithmetic: multiply-adds of the products, and gate maths, which is taken to run on the same
  units. (On AMX it may run beside the products, and some units do other operations beside
  multiply-adds; so this part is an estimate.) The forward has x W_ih and h W_hh for every step (a
  zero initial state is multiplied too). Training adds d_gates W_hh (for all steps but the first,
  since the gradient of h0 is not needed), d_gates^T h and d_gates^T x, and with `--input-grad` also
  d_gates W_ih. The rate of bfloat16 is that of AMX if the CPU has it, else that of dot
  instructions, if any. The rate of float32 is that of multiply-adds or, if that is higher, a sixth
  of bfloat16's: a float is the sum of three bfloat16, and six of the nine products affect its last
  bit. float16 has the rate of float32. Gate maths takes a vector instruction for each operation of
  the formulas (see `GATE_OPERATIONS`).
- Traffic: the bytes that must be moved. W_hh is read in every step of the forward, and again in
  every step of the backward; each byte is read by one core only. W_ih, x, y, saved gates (LSTM: 4
  gates and c; GRU: 3 gates and the recurrent candidate term; Elman: nothing but y), grad_y and
  gradients move once for each phase that needs them; gate gradients are left out. Data stay in
  cache from call to call as far as there is room, W_hh first. Each byte costs a read from its
  level: L1 and L2 of all threads together, one L3, or DRAM. A write costs as much as a read.

Packing, waiting and the cost of a call are not included. `synchronised` includes one more cost: if
there are fewer sequences than threads, each step needs a barrier, because it depends on the hidden
units that other threads computed in the last step; or one thread does everything.

RNNFAST_CPU_CAPABILITY holds calibrations back to AVX2 or AVX-512, as it does the kernels.
"""

import argparse
import ctypes
import functools
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rnnfast import _C

from .steps import CELLS, MODES, Case

SOURCE = Path(__file__).with_name("calibration.c")
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
SAVED = {"RNN": 0, "GRU": 4, "LSTM": 5}  # values per unit and step that only the backward reads
# Vector operations per unit and step of the forward and of the backward, in float32. exp takes 15
# (range reduction, a polynomial of 6 coefficients, scaling), sigmoid 27 and tanh 34, with a
# division counted as 8. The LSTM's backward computes tanh(c) again; backwards include the sum of
# the parts of the gradient of h.
GATE_OPERATIONS = {"RNN": (35, 4), "GRU": (93, 17), "LSTM": (156, 55)}
# What the compiler may use where rnnfast uses less than this machine has.
ARCHITECTURES = {"portable": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
PRODUCTS_OF_PARTS = 6  # bfloat16 products that make up one float32 product
ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class CalibrationError(Exception):
    """The machine's speed cannot be measured; the message says why."""


class Level(NamedTuple):
    """A level of the memory hierarchy.

    `capacity` is in bytes and includes the levels above; `bandwidth` is in bytes per second.
    """

    name: str
    capacity: float
    bandwidth: float


class Calibration(NamedTuple):
    """Rates that `threads` threads of this machine reach together."""

    threads: int
    fma: dict[str, float]  # floating-point operations per second, by dtype
    elementwise: float  # operations on floats per second, of which a vector instruction does many
    levels: list[Level]  # the last one holds everything
    barrier: float  # seconds

    def describe(self) -> dict[str, object]:
        """Returns the rates per second, ready for JSON."""
        read = {level.name: level.bandwidth for level in self.levels}
        rates = {"fma": self.fma, "elementwise": self.elementwise, "read": read}
        return {"threads": self.threads, **rates, "barrier": self.barrier}


class Limit(NamedTuple):
    """The least time of a case in seconds, and what takes most of it.

    `bound` is "FMA", "gates" or a level of memory.
    """

    seconds: float
    bound: str
    fma: float
    gates: float
    traffic: float


@functools.cache
def native(capability: str) -> ctypes.CDLL:
    """Compiles calibration.c for one of rnnfast's CPU capabilities, and loads it."""
    compiler = next(filter(shutil.which, [os.environ.get("CC", ""), "cc", "gcc", "clang"]), None)
    if compiler is None:
        raise CalibrationError("no C compiler was found")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/calibration.so"
        architecture = ARCHITECTURES.get(capability, "native")
        if platform.machine() != "x86_64":
            architecture = "native"
        flags = ["-O3", f"-march={architecture}", "-std=gnu11", "-shared", "-fPIC"]
        command = [compiler, *flags, str(SOURCE), "-o", library]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CalibrationError(f"{compiler} cannot compile {SOURCE.name}: {done.stderr}")
        loaded = ctypes.CDLL(library)
    for name in ("fma_float32", "dot_bfloat16", "read_memory", "barriers"):
        getattr(loaded, name).restype = ctypes.c_double
    return loaded


def cache_bytes() -> tuple[int, int, int]:
    """Returns the sizes of one core's L1 data cache and L2, and of one L3."""
    found = {1: 32 << 10, 2: 1 << 20, 3: 16 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()
            found[int((index / "level").read_text())] = int(size.removesuffix("K")) << 10
    return found[1], found[2], found[3]


def calibrate(
    threads: int, seconds: float = 0.003, windows: int = 20, dram_bytes: int | None = None
) -> Calibration:
    """Measures all rates in turn, `windows` times for `seconds` each, and takes the best of each.

    They are measured in turn because the cores of a virtual machine may be two hardware threads of
    one core for a while.
    """
    library = native(_C.get_cpu_capability())
    l1, l2, l3 = cache_bytes()
    dram = dram_bytes or 4 * l3
    # Half of L1 and L2, so that nothing else evicts the buffer. For L3 more than the L2s hold, but
    # not much more: a virtual machine sees the size of the whole L3, and has only a part of it.
    private = {"L1": l1 // 2, "L2": l2 // 2}
    beyond = 2 * threads * l2
    shared = {"L3": max(beyond, min(l3 // 2, 2 * beyond)), "DRAM": dram}
    sizes = private | {name: size // threads for name, size in shared.items()}
    sizes = {name: size // 1024 * 1024 for name, size in sizes.items()}
    stride = max(sizes.values())
    buffer = np.ones(threads * stride + 64, np.uint8)
    first = buffer.ctypes.data + -buffer.ctypes.data % 64

    cores = sorted(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:

        def on_core(k: int, function: Callable[..., float], *args: object) -> float:
            os.sched_setaffinity(0, [cores[k % len(cores)]])  # 0: the calling thread
            return function(*args)

        def together(function: Callable[..., float], *args: Callable[[int], object]) -> float:
            """Returns the work per second of all threads; `args` map a thread to its arguments."""
            span = ctypes.c_double(time.monotonic() + 3e-4), ctypes.c_double(seconds)
            given = [[arg(k) for arg in args] for k in range(threads)]
            calls = [pool.submit(on_core, k, function, *span, *given[k]) for k in range(threads)]
            return sum(call.result() for call in calls)

        def read(name: str) -> float:
            size = ctypes.c_size_t(sizes[name])
            place = [ctypes.c_void_p(first + k * stride) for k in range(threads)]
            # Twice: the first time brings the buffer into its level.
            return max(
                together(library.read_memory, place.__getitem__, lambda k: size) for _ in "12"
            )

        def meet() -> float:
            arrived, count = ctypes.byref(ctypes.c_long(0)), ctypes.c_long(threads)
            return together(library.barriers, lambda k: arrived, lambda k: count) / threads

        measures: dict[str, Callable[[], float]] = {
            "float32": lambda: together(library.fma_float32),
            "bfloat16": lambda: together(library.dot_bfloat16),
            **{name: functools.partial(read, name) for name in sizes},
            "barriers": meet,
        }
        rates = [{name: measure() for name, measure in measures.items()} for _ in range(windows)]
        best = {name: max(rate[name] for rate in rates) for name in measures}
        meetings = statistics.median(rate["barriers"] for rate in rates)
    capacities = threads * l1, threads * l2, max(l3, threads * l2), float("inf")
    vectors, bfloat16 = best["float32"], best["bfloat16"] or best["float32"]
    float32 = max(vectors, bfloat16 / PRODUCTS_OF_PARTS)
    return Calibration(
        threads,
        {"float64": vectors / 2, "float32": float32, "bfloat16": bfloat16, "float16": float32},
        vectors / 2,
        [Level(name, c, best[name]) for name, c in zip(sizes, capacities, strict=True)],
        1 / meetings if threads > 1 else 0.0,
    )


class Phase(NamedTuple):
    """A part of a layer's work that ends before the next one begins."""

    products: float  # floating-point operations: two for each multiply-add
    gates: float  # operations of gate maths
    moved: dict[str, int]  # how many times each of `arrays` is moved


def arrays(cell: str, case: Case, dtype: str) -> dict[str, int]:
    """Returns the bytes of all data, in the order in which they are placed in caches."""
    T, B, I, H = case
    elements = {"w_hh": GATES[cell] * H * H, "w_ih": GATES[cell] * H * I, "x": T * B * I}
    elements |= {"y": T * B * H, "saved": SAVED[cell] * T * B * H}
    elements |= {"grad_w_hh": elements["w_hh"], "grad_w_ih": elements["w_ih"]}
    elements |= {"grad_y": elements["y"], "grad_x": elements["x"]}
    return {name: ELEMENT_BYTES[dtype] * count for name, count in elements.items()}


def phases(cell: str, case: Case, mode: str, input_grad: bool) -> list[Phase]:
    """Returns the phases of one call."""
    T, B, I, H = case
    step, units = 2 * B * GATES[cell] * H, T * B * H
    forward, backward = GATE_OPERATIONS[cell]
    training = mode == "training"
    projection = Phase(T * step * I, 0, {"w_ih": 1, "x": 1})
    steps = Phase(T * step * H, forward * units, {"w_hh": T, "y": 1, "saved": 1 * training})
    if not training:
        return [projection, steps]
    read = {"w_hh": T - 1, "saved": 1, "grad_y": 1, "y": 1 * (cell != "LSTM")}
    back = Phase((T - 1) * step * H, backward * units, read)
    moved = {"x": 1, "y": 1, "grad_w_hh": 1, "grad_w_ih": 1}
    moved |= {"w_ih": 1 * input_grad, "grad_x": 1 * input_grad}
    over_all_steps = Phase(T * step * (H + I * (1 + input_grad)), 0, moved)
    return [projection, steps, back, over_all_steps]


def placed(
    sizes: dict[str, int], moved: set[str], machine: Calibration
) -> dict[str, dict[str, float]]:
    """Returns the seconds to move each array once, by the levels that hold it."""
    seconds: dict[str, dict[str, float]] = {}
    used = 0.0
    for name in (name for name in sizes if name in moved):
        begin, used = used, used + sizes[name]
        seconds[name] = {}
        for level in machine.levels:
            end = min(used, max(begin, level.capacity))
            seconds[name][level.name] = (end - begin) / level.bandwidth
            begin = end
    return seconds


def limit(
    cell: str, case: Case, mode: str, dtype: str, input_grad: bool, machine: Calibration
) -> Limit:
    """Returns the least time of one call, under the assumptions in this module's docstring."""
    work = phases(cell, case, mode, input_grad)
    moved = {name for phase in work for name, times in phase.moved.items() if times > 0}
    once = placed(arrays(cell, case, dtype), moved, machine)
    lanes = 2 if dtype == "float64" else 1  # a vector instruction does half as many
    arithmetic: Counter[str] = Counter()
    traffic: Counter[str] = Counter()
    binding: Counter[str] = Counter()  # the seconds of the slower side of each phase
    for phase in work:
        fma, gates = phase.products / machine.fma[dtype], phase.gates * lanes / machine.elementwise
        moves: Counter[str] = Counter()
        for name, times in phase.moved.items():
            moves.update({level: times * second for level, second in once.get(name, {}).items()})
        of_units = Counter({"FMA": fma, "gates": gates})
        binding.update(max(of_units, moves, key=Counter.total))
        arithmetic.update(of_units)
        traffic.update(moves)
    bound = max(binding, key=binding.__getitem__)
    return Limit(
        binding.total(),
        bound,
        fma=arithmetic["FMA"],
        gates=arithmetic["gates"],
        traffic=traffic.total(),
    )


def synchronised(case: Case, mode: str, one: Limit, together: Limit, machine: Calibration) -> float:
    """Returns the limit with a barrier in each step; `one` is the limit of a single thread."""
    steps = case.T if mode == "inference" else 2 * case.T
    if machine.threads <= case.B:
        return together.seconds
    return min(one.seconds, together.seconds + steps * machine.barrier)


def format_calibration(machine: Calibration) -> str:
    reads = ", ".join(f"{level.name} {level.bandwidth / 1e9:.0f}" for level in machine.levels)
    return (
        f"{machine.threads} thread{'s'[: machine.threads > 1]}: "
        f"float32 {machine.fma['float32'] / 1e9:.0f} GFLOP/s, "
        f"bfloat16 {machine.fma['bfloat16'] / 1e9:.0f}; "
        f"reads in GB/s: {reads}; barrier {machine.barrier * 1e6:.2f} us"
    )


def main(argv: list[str] | None = None) -> None:
    from .compare import DEFAULT_CASES, parse_case

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--case", nargs="+", type=parse_case, metavar="T,B,I,H")
    add("--dtype", choices=ELEMENT_BYTES, default="float32")
    add("--input-grad", action="store_true", help="training also asks for the gradient of x")
    add("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    cases = args.case or [parse_case(case) for case in DEFAULT_CASES.split()]
    one, machine = calibrate(1), calibrate(args.threads)
    print(format_calibration(one), format_calibration(machine), sep="\n")
    print(f"{'limit in us':15}", *(f"{cell + ' ' + mode:>20}" for mode in MODES for cell in CELLS))
    for case in cases:
        limits = [
            limit(cell, case, mode, args.dtype, args.input_grad, machine)
            for mode in MODES
            for cell in CELLS
        ]
        print(f"{case!s:15}", *(f"{x.seconds * 1e6:15.1f} {x.bound:>4}" for x in limits))


if __name__ == "__main__":
    main()
