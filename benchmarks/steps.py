"""One inference step and one training step of a layer, and the check of their results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CELLS: dict[str, type[nn.RNNBase]] = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
MODES = ("inference", "training")


class Case(NamedTuple):
    """Sizes of one layer: time, batch, input, hidden."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Problem(NamedTuple):
    """A computation: a torch.nn module, its input x (T, B, I) and the mode.

    Training also takes grad_y (T, B, H), the gradient of the output, and computes the gradients of
    the parameters and, with `input_grad`, of x.
    """

    module: nn.RNNBase
    x: Tensor
    grad_y: Tensor
    mode: str
    input_grad: bool = False

    def to(self, dtype: torch.dtype) -> "Problem":
        module = type(self.module)(
            self.module.input_size, self.module.hidden_size, device=self.x.device, dtype=dtype
        )
        module.load_state_dict(self.module.state_dict())
        x, grad_y = self.x.to(dtype), self.grad_y.to(dtype)
        return self._replace(module=module, x=x, grad_y=grad_y)


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
) -> Problem:
    torch.manual_seed(seed)
    T, B, I, H = case
    module = CELLS[cell](I, H, device=device, dtype=dtype)
    x = torch.randn(T, B, I, device=device, dtype=dtype)
    grad_y = torch.randn(T, B, H, device=device, dtype=dtype)
    return Problem(module, x, grad_y, mode, input_grad)


def module_step(module: nn.Module, problem: Problem) -> Step:
    """Returns the step of a module with torch.nn's signature.

    For inference, call it in torch.inference_mode().
    """
    x = problem.x.clone()
    if problem.mode == "inference":
        return Step(lambda: module(x), outputs)
    leaves = dict(module.named_parameters())
    if problem.input_grad:
        leaves["x"] = x.requires_grad_()

    def train() -> Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        y, _ = module(x)
        y.backward(problem.grad_y)
        return y

    def numbers(y: Tensor) -> dict[str, Tensor]:
        return {"y": y.detach(), **{f"grad of {name}": leaf.grad for name, leaf in leaves.items()}}

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
