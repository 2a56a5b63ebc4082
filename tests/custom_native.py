"""C++ around the headers of cells that users write, and its compilation, for the tests."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

TARGETS = {
    "portable": '#include "cpu/kernels/baseline.h"\n',
    "avx2": """
#include "cpu/kernels/baseline.h"
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx2,fma,f16c")
#define RNNFAST_TARGET avx2
#define RNNFAST_VECTOR_BYTES 32
#define RNNFAST_REGISTERS 16
""",
    "avx512": """
#include "cpu/kernels/baseline.h"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define RNNFAST_TARGET avx512
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_REGISTERS 32
""",
}

# Runs a function on arrays [block][n], one vector of units at a time.
CELLS = """
#include "cpu/kernels/math.h"
@includes@
using namespace rnnfast::cpu::RNNFAST_TARGET;

template <class A, int Blocks>
struct Array {
  Wide<Vec<A>, 1> of[Blocks + 1] = {};
  void read(const A*& from, long i, long n) {
    for (int k = 0; k < Blocks; ++k, from += n) of[k].v[0] = load(from + i);
  }
  void write(A*& to, long i, long n, int count = Blocks) {
    for (int k = 0; k < count; ++k, to += n) store(to + i, of[k].v[0]);
  }
};

template <class Cell, class A>
void forward(long n, const A* in, A* out) {
  constexpr int G = Cell::kGates, C = Cell::kCells;
  for (long i = 0; i < n; i += kLanes<A>) {
    const A* from = in;
    A* to = out;
    Array<A, G> x, h;
    Array<A, 1> h_prev, new_h;
    Array<A, C> c;
    Array<A, Cell::kParameters> p;
    Array<A, Cell::kSaved> saved;
    x.read(from, i, n), h.read(from, i, n), h_prev.read(from, i, n), c.read(from, i, n);
    p.read(from, i, n);
    if (!Cell::kDirect) h_prev.of[0].v[0] += A(__builtin_nan(""));
    Cell::template forward<Math>(x.of, h.of, h_prev.of[0], p.of, c.of, new_h.of[0], saved.of);
    new_h.write(to, i, n), c.write(to, i, n), saved.write(to, i, n);
  }
}

template <class Cell, class A>
void backward(long n, const A* in, A* out) {
  constexpr int C = Cell::kCells, P = Cell::kParameters;
  for (long i = 0; i < n; i += kLanes<A>) {
    const A* from = in;
    A* to = out;
    Array<A, Cell::kSaved> saved;
    Array<A, 1> h_prev, h, d_h, d_h_direct;
    Array<A, C> c_prev, c, d_c;
    Array<A, P> p;
    Array<A, Cell::kGradBlocks + P> d_gates;
    saved.read(from, i, n), h_prev.read(from, i, n), c_prev.read(from, i, n), h.read(from, i, n);
    c.read(from, i, n), p.read(from, i, n), d_h.read(from, i, n), d_c.read(from, i, n);
    if (!Cell::kDirect) h_prev.of[0].v[0] += A(__builtin_nan(""));
    if (!Cell::kReadsH) h.of[0].v[0] += A(__builtin_nan(""));
    Cell::template backward<Math>(saved.of, h.of[0], h_prev.of[0], c.of, c_prev.of, p.of,
                                  d_h.of[0], d_c.of, d_h_direct.of[0], d_gates.of);
    d_h_direct.write(to, i, n), d_c.write(to, i, n), d_gates.write(to, i, n);
  }
}

#define CELL(Cell)                                                                     \\
  extern "C" void Cell##_forward_float(long n, const float* in, float* out) {          \\
    forward<rnnfast::Cell>(n, in, out);                                                \\
  }                                                                                    \\
  extern "C" void Cell##_forward_double(long n, const double* in, double* out) {       \\
    forward<rnnfast::Cell>(n, in, out);                                                \\
  }                                                                                    \\
  extern "C" void Cell##_backward_float(long n, const float* in, float* out) {         \\
    backward<rnnfast::Cell>(n, in, out);                                               \\
  }                                                                                    \\
  extern "C" void Cell##_backward_double(long n, const double* in, double* out) {      \\
    backward<rnnfast::Cell>(n, in, out);                                               \\
  }                                                                                    \\
  extern "C" int Cell##_input_gate(int j) { return rnnfast::Cell::input_gate(j); }
@cells@
"""

FUNCTIONS = """
#include "cpu/kernels/math.h"
using namespace rnnfast::cpu::RNNFAST_TARGET;

#define FUNCTION(name, arguments)                                                      \\
  template <class A>                                                                   \\
  void name##_of(long n, const A* in, A* out) {                                        \\
    for (long i = 0; i < n; i += kLanes<A>) {                                          \\
      const Wide<Vec<A>, 1> a{load(in + i)};                                           \\
      [[maybe_unused]] const Wide<Vec<A>, 1> b{load(in + n + i)};                      \\
      store(out + i, Math::name arguments.v[0]);                                       \\
    }                                                                                  \\
  }                                                                                    \\
  extern "C" void name##_float(long n, const float* in, float* out) { name##_of(n, in, out); } \\
  extern "C" void name##_double(long n, const double* in, double* out) { name##_of(n, in, out); }
@functions@
"""


def targets() -> list[str]:
    """The instruction sets of this machine, the best one last."""
    known = {"AVX512": ["avx2", "avx512"], "AVX2": ["avx2"]}
    return ["portable", *known.get(torch.backends.cpu.get_cpu_capability(), [])]


def compiled(folder: Path, text: str) -> ctypes.CDLL:
    (folder / "source.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fno-math-errno", "-shared"]
    command += ["-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    command += [str(folder / "source.cpp"), "-o", str(folder / "source.so")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(folder / "source.so"))
