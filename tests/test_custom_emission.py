"""The C++ of cells that users write: it compiles, and computes what the programs do."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from custom_native import CELLS, FUNCTIONS, TARGETS, compiled, targets
from custom_steps import CASES, Case
from torch import Tensor

from rnnfast.custom.emission import Emission, emit
from rnnfast.custom.tracing import trace

KINDS = {torch.float32: ("float", ctypes.c_float), torch.float64: ("double", ctypes.c_double)}
LANES = 16  # a multiple of those of every vector

ONE = ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "abs", "sign", "sin", "cos", "erf")
TWO = ("maximum", "minimum")


@cache
def emitted(name: str) -> Emission:
    case = CASES[name]
    program = trace(case.step, case.gates, case.states, case.parameters)
    return emit(name, program, case.gates, case.states, case.parameters)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cells")
    emissions = [emitted(name) for name in CASES]
    for emission in emissions:
        (folder / f"{emission.struct}.h").write_text(emission.header)
    text = CELLS.replace("@includes@", "\n".join(f'#include "{e.struct}.h"' for e in emissions))
    text = text.replace("@cells@", "\n".join(f"CELL({e.struct})" for e in emissions))
    return compiled(folder, TARGETS[targets()[-1]] + text)


@pytest.fixture(scope="module", params=targets())
def functions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    functions = [f"FUNCTION({name}, (a))" for name in ONE]
    functions += [f"FUNCTION({name}, (a, b))" for name in TWO]
    text = FUNCTIONS.replace("@functions@", "\n".join(functions))
    return compiled(tmp_path_factory.mktemp("functions"), TARGETS[request.param] + text)


@pytest.fixture(params=list(CASES), ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def run(library: ctypes.CDLL, name: str, inputs: list[Tensor], outputs: int) -> list[Tensor]:
    n, dtype = inputs[0].numel(), inputs[0].dtype
    packed = torch.stack(inputs).contiguous()
    result = torch.full((outputs, n), math.nan, dtype=dtype)
    function = getattr(library, f"{name}_{KINDS[dtype][0]}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (packed, result)]
    function(ctypes.c_long(n), *pointers)
    return list(result)


def close(got: Tensor, want: Tensor | None) -> None:
    want = torch.zeros_like(got) if want is None else want
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[got.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_cell_computes_its_programs(cells: ctypes.CDLL, case: Case, dtype: torch.dtype) -> None:
    emission = emitted(case.name)
    facts, (forward, backward, _) = emission.facts, emission.derivative
    n, states = 4 * LANES, facts.cells + 1
    tensors = [torch.randn(n, dtype=dtype) for _ in forward.inputs]
    got = run(cells, f"{emission.struct}_forward", tensors, states + facts.saved)
    results = forward.run(*tensors)
    for one, want in zip(got, results, strict=True):
        close(one, want)

    new, saved = results[:states], results[states:]
    end = 2 * facts.gates + states
    before, parameters = tensors[2 * facts.gates : end], tensors[end:]
    arriving = [torch.randn(n, dtype=dtype) for _ in new]
    arguments = [t.expand(n) for t in (*saved, *before, *new, *parameters, *arriving)]
    count = states + facts.grad_blocks + facts.parameters
    got = run(cells, f"{emission.struct}_backward", arguments, count)
    want = backward.run(*arguments)
    of_states = want[2 * facts.gates : end]
    for k in range(0 if facts.direct else 1, states):
        close(got[k], of_states[k])
    blocks = got[states:]
    for j in range(facts.gates):
        close(blocks[j], want[emission.input_gate[j]])
        of_h = blocks[facts.grad_blocks - facts.gates + j]
        close(of_h, want[facts.gates + j])
        assert getattr(cells, f"{emission.struct}_input_gate")(j) == emission.input_gate[j]
    for one, gradient in zip(blocks[facts.grad_blocks :], want[end:], strict=True):
        close(one, gradient)


def test_facts(case: Case) -> None:
    facts = emitted(case.name).facts
    assert (facts.gates, facts.cells, facts.parameters) == (
        *(case.gates, len(case.states) - 1, len(case.parameters)),
    )
    assert case.saved is None or facts.saved <= case.saved
    assert case.direct is None or facts.direct is case.direct
    assert case.reads_h is None or facts.reads_h is case.reads_h
    assert case.gates <= facts.grad_blocks <= 2 * case.gates


def test_gradient_blocks_are_shared_as_far_as_possible() -> None:
    assert emitted("lstm").facts.grad_blocks == 4
    assert (emitted("gru").facts.grad_blocks, emitted("gru").input_gate) == (4, (2, 0, 1))
    assert emitted("feedforward").facts.grad_blocks == 4  # no gate of h is used


def test_header_reads_like_a_handwritten_one() -> None:
    emission = emitted("lstm")
    assert emission.struct == "LstmCell"  # rnnfast::Lstm is there already
    assert emitted("ligru_like").struct == "LigruLike"
    for text in (
        "//     c = f * state.c + i * g\n",
        "    const V i = M::sigmoid(from_x[0] + from_h[0]);\n",
        "    const V c_new = M::fma(f, c_prev, i * g);\n",
        "    h = o * M::tanh(c_new);\n",
        "M::one_minus_square(g);\n",
    ):
        assert text in emission.header


@pytest.mark.parametrize("name", ["ReLU gate", "2 cells", "émile", "int", ""])
def test_names_become_identifiers(name: str) -> None:
    case = CASES["elman_tanh"]
    emission = emit(name, trace(case.step, 1, ("h",)), 1, ("h",))
    assert re.fullmatch(r"[A-Z][A-Za-z0-9]*", emission.struct)
    assert re.search(r'kName = "[a-z][a-z0-9_]*";', emission.header)


def test_variables_are_safe_in_cpp() -> None:
    def step(x, h, state):
        double = x[0] + h[0]
        saved = double * double
        σ = torch.sigmoid(saved)  # noqa: PLC2401, RUF100
        M = σ * saved + double
        return M * M * σ, M - σ

    header = emit("odd", trace(step, 1, ("h", "c")), 1, ("h", "c")).header
    assert "const V double_ =" in header
    assert "const V m =" in header
    assert header.split("#pragma once")[1].isascii()


def everywhere(dtype: torch.dtype) -> Tensor:
    """Numbers of every size, and the special ones."""
    info = torch.finfo(dtype)
    exponents = torch.linspace(math.log2(info.smallest_normal) - 20, math.log2(info.max), 40001)
    size = (exponents.double() - 1e-3).exp2().to(dtype)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1, -1, info.max, -info.max]
    parts = [size, -size, torch.linspace(-2, 2, 40001, dtype=dtype)]
    parts += [torch.linspace(-760, 760, 40001, dtype=dtype), torch.tensor(special, dtype=dtype)]
    numbers = torch.cat(parts)
    return torch.cat([numbers, numbers[: -len(numbers) % LANES]])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("name", ONE + TWO)
def test_errors_of_math(functions: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    a = everywhere(dtype)
    b = a.roll(7)
    function: Callable[..., Tensor] = getattr(torch, name)
    arguments = (a, b) if name in TWO else (a,)
    got = run(functions, name, [a, b], 1)[0].double()
    exact = function(*(argument.double() for argument in arguments))
    want = exact.to(dtype).double()
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    info = torch.finfo(dtype)
    size = exact[finite].abs().clamp(info.smallest_normal, info.max)
    ulp = info.eps * (size.frexp().exponent - 1).double().exp2()
    assert ((got[finite] - exact[finite]).abs() / ulp).max() <= 4
