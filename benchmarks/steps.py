"""One inference step and one training step of a module, and the check of their results."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CELLS: dict[str, type[nn.RNNBase]] = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
SINGLE_STEPS: dict[str, type[nn.RNNCellBase]] = {
    "RNNCell": nn.RNNCell,
    "GRUCell": nn.GRUCell,
    "LSTMCell": nn.LSTMCell,
}
MODES = ("inference", "training")


class Case(NamedTuple):
    """Sizes of a module and its input: time, batch, input, hidden."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Problem(NamedTuple):
    """A computation: a module of torch.nn, its input x (T, B, I) and the mode.

    The module is a layer or a stack of layers, which starts from zeros, or a cell. A cell is called
    T times, each time with the state of the call before; `state` is its first state, h or h and c,
    each (B, H).

    Training also takes grad_y, the gradient of the output, and computes the gradients of the
    parameters and, with `input_grad`, of x. The output is y (T, B, *), or the last h of a cell.
    """

    module: nn.RNNBase | nn.RNNCellBase
    x: Tensor
    grad_y: Tensor
    mode: str
    input_grad: bool = False
    state: tuple[Tensor, ...] = ()

    def to(self, dtype: torch.dtype) -> "Problem":
        return self._replace(
            module=copy.deepcopy(self.module).to(dtype),
            x=self.x.to(dtype),
            grad_y=self.grad_y.to(dtype),
            state=tuple(value.to(dtype) for value in self.state),
        )


class Step(NamedTuple):
    """One implementation of a problem. `run` is what is timed."""

    run: Callable[[], Any]
    numbers: Callable[[Any], dict[str, Tensor]]  # converts the result of `run` to tensors by name


def make_problem(
    cell: str,
    case: Case,
    device: str,
    dtype: torch.dtype,
    mode: str,
    input_grad: bool = False,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Makes a problem with random weights and values.

    `cell` is a key of `CELLS` or `SINGLE_STEPS`; `options` are more arguments of its class in
    torch.nn, such as num_layers.
    """
    torch.manual_seed(seed)
    T, B, I, H = case

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    if cell in SINGLE_STEPS:
        single = SINGLE_STEPS[cell](I, H, device=device, dtype=dtype, **options)
        state = tuple(normal(B, H) for _ in range(2 if cell == "LSTMCell" else 1))
        return Problem(single, normal(T, B, I), normal(B, H), mode, input_grad, state)
    module = CELLS[cell](I, H, device=device, dtype=dtype, **options)
    width = (module.proj_size or H) * (2 if module.bidirectional else 1)
    return Problem(module, normal(T, B, I), normal(T, B, width), mode, input_grad)


def module_step(module: nn.Module, problem: Problem) -> Step:
    """Returns the step of a module with the signature of the problem's.

    For inference, call it in torch.inference_mode().
    """
    x = problem.x.clone()
    inputs = [x]
    if problem.state:
        inputs = [x_t.detach() for x_t in x]
        first = problem.state if len(problem.state) > 1 else problem.state[0]

    def run_layer() -> tuple[Tensor, Any]:
        return module(x)

    def run_cell() -> tuple[Tensor, Any]:
        state = first
        for x_t in inputs:
            state = module(x_t, state)
        return (state[0] if isinstance(state, tuple) else state), state

    forward = run_cell if problem.state else run_layer
    if problem.mode == "inference":
        return Step(forward, outputs)
    parameters = dict(module.named_parameters())
    leaves = [*parameters.values()]
    if problem.input_grad:
        leaves += [value.requires_grad_() for value in inputs]

    def train() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y, _ = forward()
        y.backward(problem.grad_y)
        return y

    def numbers(y: Tensor) -> dict[str, Tensor]:
        found = {"y": y.detach(), **{f"grad of {n}": p.grad for n, p in parameters.items()}}
        if problem.input_grad:
            found["grad of x"] = torch.cat([value.grad for value in inputs]).view_as(x)
        return found

    return Step(train, numbers)


def outputs(result: tuple[Tensor, Any]) -> dict[str, Tensor]:
    """Returns the tensors of (y, h) or (y, (h, c)) by name."""
    y, state = result
    state = state if isinstance(state, tuple) else (state,)
    return {"y": y, **{f"state {k}": value for k, value in enumerate(state)}}


def results(step: Step) -> dict[str, Tensor]:
    return step.numbers(step.run())


def disagreement(
    got: dict[str, Tensor],
    ours: dict[str, Tensor],
    exact: dict[str, Tensor],
    tolerance: float = 0.0,
) -> str | None:
    """Returns a description of the first wrong tensor in `got`, or None.

    The error of `got` against `exact` (torch.nn in float64) may be 4 times that of `ours` (torch.nn
    in the same dtype), plus 16 eps and `tolerance` relative to the largest element.
    """
    for name, want in exact.items():
        if name not in got or got[name] is None or got[name].shape != want.shape:
            return f"{name} is missing or has the wrong shape"
        error = (got[name].double() - want).abs().max().item()
        torch_error = (ours[name].double() - want).abs().max().item()
        relative = tolerance + 16 * torch.finfo(ours[name].dtype).eps
        if not error <= 4 * torch_error + relative * want.abs().max().item():
            return f"{name} is off by {error:.2g} (torch.nn: {torch_error:.2g})"
    return None
