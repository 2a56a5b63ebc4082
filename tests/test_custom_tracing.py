"""Steps that users write become programs: the same results, the same gradients, clear errors."""

from __future__ import annotations

import inspect
import math
import pickle
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from custom_steps import CASES, Case
from torch import Tensor
from torch._subclasses import FakeTensorMode

from rnnfast.custom.derivative import PRIMITIVES, derive
from rnnfast.custom.emission import emit
from rnnfast.custom.program import Builder, Program, Ref
from rnnfast.custom.tracing import CellError, trace

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = torch.ones(3)
LEARNABLE = torch.nn.Parameter(torch.ones(()))


@pytest.fixture(params=list(CASES), ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def traced(case: Case) -> Program:
    return trace(case.step, case.gates, case.states, case.parameters)


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    count = 2 * case.gates + len(case.states) + len(case.parameters)
    return [torch.randn(4, 5, dtype=dtype) for _ in range(count)]


def called(case: Case, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the user's function itself returns."""
    end = 2 * case.gates + len(case.states)
    state = namedtuple("State", case.states)(*tensors[2 * case.gates : end])
    arguments = [tensors[: case.gates], tensors[case.gates : 2 * case.gates], state]
    if case.parameters:
        arguments.append(namedtuple("Parameters", case.parameters)(*tensors[end:]))
    result = case.step(*arguments)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_program_gives_the_results_of_the_function(case: Case, dtype: torch.dtype) -> None:
    tensors = inputs(case, dtype)
    # torch.where(condition, 0.25, 0.5) of two numbers is float32 in the function
    same = {"equal_nan": True, "check_dtype": dtype is not torch.bfloat16}
    torch.testing.assert_close(traced(case).run(*tensors), called(case, *tensors), **same)


def test_derivative_is_autograd_of_the_function(case: Case) -> None:
    program, tensors = traced(case), inputs(case)
    derivative = derive(program, case.gates, case.states, case.parameters)
    for part in (derivative.forward, derivative.backward):
        assert {operation.operator for operation in part.operations} <= PRIMITIVES
    gates, states = case.gates, len(case.states)
    new_and_saved = derivative.forward.run(*tensors)
    new, saved = new_and_saved[:states], new_and_saved[states:]
    assert len(saved) == derivative.saved
    assert case.saved is None or derivative.saved <= case.saved
    torch.testing.assert_close(new, called(case, *tensors), equal_nan=True)

    gradients = [torch.randn(4, 5, dtype=torch.float64) for _ in new]
    before = tensors[2 * gates : 2 * gates + states]
    parameters = tensors[2 * gates + states :]
    found = derivative.backward.run(*saved, *before, *new, *parameters, *gradients)
    for tensor in tensors:
        tensor.requires_grad_()
    outputs = [(o, g) for o, g in zip(called(case, *tensors), gradients, strict=True)]
    outputs = [(o, g) for o, g in outputs if o.requires_grad]
    expected: tuple[Tensor | None, ...] = (None,) * len(tensors)
    if outputs:
        news, arriving = zip(*outputs, strict=True)
        expected = torch.autograd.grad(news, tensors, arriving, allow_unused=True)
    for got, want, tensor in zip(found, expected, tensors, strict=True):
        zero = torch.zeros_like(tensor)
        got, want = zero if got is None else got, zero if want is None else want
        torch.testing.assert_close(got.expand(4, 5), want)


def test_program_is_plain_data(case: Case) -> None:
    program = traced(case)
    again = pickle.loads(pickle.dumps(program))
    assert again == program
    assert hash(again) == hash(program)
    assert traced(case).source("step") == program.source("step")


def test_source_is_a_step_with_the_same_program(case: Case) -> None:
    program = traced(case)
    scope = {"torch": torch, "F": F}
    exec(program.source("step"), scope)
    again = trace(scope["step"], case.gates, case.states, case.parameters)
    tensors = inputs(case)
    torch.testing.assert_close(again.run(*tensors), program.run(*tensors), equal_nan=True)


def test_source_has_the_names_of_the_function() -> None:
    lines = inspect.getsource(CASES["lstm"].step).splitlines()
    assert traced(CASES["lstm"]).source("lstm").splitlines() == lines


MODES = {
    "inference": torch.inference_mode,
    "no gradient": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "fake tensors": FakeTensorMode,
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(torch.zeros_like, torch.ones_like),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_torch_make_no_difference(case: Case, mode: str) -> None:
    arguments = (case.gates, case.states, case.parameters)
    expected = derive(traced(case), *arguments)
    with MODES[mode]():
        assert derive(traced(case), *arguments) == expected


def test_programs_differ_in_the_sign_of_zero() -> None:
    programs = [
        trace(lambda x, h, state, zero=zero: x[0] / zero, 1, ("h",)) for zero in (0.0, -0.0)
    ]
    assert programs[0] != programs[1]
    one = torch.ones(1)
    assert [program.run(one, one, one) for program in programs] == [(math.inf,), (-math.inf,)]


def test_transforms_of_torch() -> None:
    case = CASES["slstm"]
    program = traced(case)
    tensors = [tensor[:1, :1].clone().requires_grad_() for tensor in inputs(case)]
    assert torch.autograd.gradgradcheck(program.run, tensors)
    assert torch.autograd.gradcheck(program.run, tensors, check_forward_ad=True)
    mapped = torch.func.vmap(program.run)(*tensors)
    torch.testing.assert_close(mapped, program.run(*tensors))
    compiled = torch.compile(program.run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), program.run(*tensors))


TEXTS = """
from custom_steps import CASES
from rnnfast.custom.emission import emit
from rnnfast.custom.tracing import trace
for case in CASES.values():
    program = trace(case.step, case.gates, case.states, case.parameters)
    print(emit(case.name, program, case.gates, case.states, case.parameters))
"""


def test_texts_are_the_same_in_every_process() -> None:
    texts = "".join(
        f"{emit(c.name, traced(c), c.gates, c.states, c.parameters)}\n" for c in CASES.values()
    )
    path = f"{ROOT}:{ROOT / 'tests'}"
    environment = {"PYTHONPATH": path, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", TEXTS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == texts


def test_simplifications() -> None:
    builder = Builder(("a", "b"), simplify=True)
    a, b, add = Ref(0), Ref(1), builder.add
    assert add("neg", add("neg", a)) == a
    assert add("mul", a, 1.0) == add("add", a, 0.0) == add("sub", a, -0.0) == a
    assert add("where", add("gt", a, 0.0), b, b) == b
    assert add("mul", a, b) == add("mul", b, a)
    assert add("add", add("neg", a), b) == add("sub", b, a)
    assert add("add", a, -0.5) != add("add", a, 0.5)
    assert builder.build([add("mul", a, a)]).operations[-1].operator == "mul"
    assert len(builder.build([add("mul", a, a)]).operations) == 1  # the others are dead


def branching(x, h, state):
    if x[0] > 0:  # here
        return x[0]
    return h[0]


def in_place(x, h, state):
    z = x[0] * 2
    z += h[0]  # here
    return z


def writing_input(x, h, state):
    state.h.mul_(2)  # here
    return x[0]


def helper(a):
    return a.sum()  # here


def calling_helper(x, h, state):
    return helper(x[0])


def without_gradient(x, h, state):
    with torch.no_grad():
        return x[0] * 2  # here


def returning_nothing(x, h, state):
    x[0] * 2
    return None  # here


def three_arguments(x, h, state):  # here
    return parameters.p  # noqa: F821


STEPS = {
    "branch": (branching, "use torch.where"),
    "item": (lambda x, h, state: x[0] * state.h[0].item(), "indexes or iterates"),  # here
    "float": (lambda x, h, state: x[0] * float(h[0]), "Python number"),  # here
    "reduction": (lambda x, h, state: x[0] - x[0].mean(), "mean, which a cell cannot"),  # here
    "helper": (calling_helper, "calls sum"),
    "in place": (in_place, "in place"),
    "input": (writing_input, "in place"),
    "random": (lambda x, h, state: x[0] + torch.rand(()), "random numbers"),  # here
    "random like": (lambda x, h, state: torch.randn_like(x[0]), "random numbers"),  # here
    "dropout": (lambda x, h, state: F.dropout(x[0], 0.5), "random numbers"),  # here
    "gates": (lambda x, h, state: x[2], r"x\[2\] is beyond the gates. The cell has 2"),  # here
    "unpacking": (lambda x, h, state: [a for a, b in [x[:1]]], "not enough values"),  # here
    "chunk": (lambda x, h, state: x[0].chunk(2)[0], "split"),  # here
    "cat": (lambda x, h, state: torch.cat([x[0], h[0]]), "calls cat"),  # here
    "matmul": (lambda x, h, state: x[0] @ h[0], "calls mm"),  # here
    "size": (lambda x, h, state: x[0] / x[0].shape[1], "size of a tensor"),  # here
    "outside": (lambda x, h, state: x[0] * OUTSIDE, r"size \(3,\).*parameter of the cell"),  # here
    "learnable": (lambda x, h, state: x[0] * LEARNABLE, "requires a gradient"),  # here
    "no gradient": (without_gradient, "turns gradients off"),
    "nothing": (returning_nothing, "returned a NoneType as the state h"),
    "too many": (lambda x, h, state: (x[0], h[0]), "returned 2 tensors, .* 1 state: h"),  # here
    "mask": (lambda x, h, state: x[0] > 0, "returned booleans"),  # here
    "integer": (lambda x, h, state: x[0].int(), "converts a tensor to torch.int32"),  # here
    "wrong shape": (lambda x, h, state: torch.tensor(0.5), "size of x"),  # here
    "exponent": (lambda x, h, state: x[0] ** 0.3, "pow with the exponent 0.3"),  # here
    "power": (lambda x, h, state: x[0] ** h[0], "pow with a tensor"),  # here
    "state": (lambda x, h, state: state.c, "The states are h"),  # here
    "condition": (lambda x, h, state: torch.where(x[0], h[0], 0), "not a comparison"),  # here
    "rounding": (lambda x, h, state: torch.div(x[0], 2, rounding_mode="floor"), "rounding"),  # here
    "operator": (lambda x, h, state: torch.floor(x[0]), "floor, .* one of these: "),  # here
    "signature": (lambda x, h: x[0], r"called with \(x, h, state\)"),  # here
    "parameters": (three_arguments, "called with .x, h, state, parameters."),
}


@pytest.mark.parametrize("name", STEPS)
def test_error_names_the_line(name: str) -> None:
    step, message = STEPS[name]
    parameters = ("p",) if name == "parameters" else ()
    with pytest.raises(CellError, match=message) as caught:
        trace(step, 2, ("h",), parameters)
    place = re.search(r'File "(.*)", line (\d+), in .*\n    (.*)', str(caught.value))
    assert place is not None, caught.value
    assert place[1] == __file__
    assert place[3].endswith("# here"), caught.value
    assert isinstance(caught.value, ValueError)
