"""One inference step and one training step of a layer, and whether their numbers are right."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .peers import Run

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
    """A torch.nn module with its input x (T, B, I) and the loss's gradient grad_y (T, B, H)."""

    module: nn.RNNBase
    x: Tensor
    grad_y: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        module = type(self.module)(
            self.module.input_size, self.module.hidden_size, device=self.x.device, dtype=dtype
        )
        module.load_state_dict(self.module.state_dict())
        return Problem(module, self.x.to(dtype), self.grad_y.to(dtype))


def make_problem(cell: str, case: Case, device: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    T, B, I, H = case
    module = CELLS[cell](I, H, device=device, dtype=dtype)
    x = torch.randn(T, B, I, device=device, dtype=dtype)
    return Problem(module, x, torch.randn(T, B, H, device=device, dtype=dtype))


def make_step(run: Run, problem: Problem, mode: str, input_grad: bool) -> Callable[[], object]:
    """A function of no arguments that does one step. Inference wants torch.inference_mode()."""
    x = problem.x.clone().requires_grad_(mode == "training" and input_grad)
    if mode == "inference":
        return lambda: run(x)
    if not isinstance(run, nn.Module):
        raise TypeError("only an nn.Module can be trained")
    leaves = dict(run.named_parameters())
    if input_grad:
        leaves["x"] = x

    def train() -> tuple[Tensor, dict[str, Tensor]]:
        for leaf in leaves.values():
            leaf.grad = None
        y, _ = run(x)
        y.backward(problem.grad_y)
        return y, leaves

    return train


def results(step: Callable[[], object], mode: str) -> dict[str, Tensor]:
    """Every number that one step gives, by name."""
    y, rest = step()
    if mode == "inference":
        state = rest if isinstance(rest, tuple) else (rest,)
        return {"y": y, **{f"state {k}": value for k, value in enumerate(state)}}
    return {"y": y.detach(), **{f"grad of {name}": leaf.grad for name, leaf in rest.items()}}


def disagreement(
    got: dict[str, Tensor], ours: dict[str, Tensor], exact: dict[str, Tensor]
) -> str | None:
    """What is wrong with `got`, or None.

    Its error against `exact` (torch.nn in float64) may be 4 times that of torch.nn in the same
    dtype, plus 16 units of rounding of the largest element.
    """
    for name, want in exact.items():
        if name not in got or got[name] is None or got[name].shape != want.shape:
            return f"{name} is missing or has the wrong shape"
        error = (got[name].double() - want).abs().max().item()
        torch_error = (ours[name].double() - want).abs().max().item()
        rounding = torch.finfo(ours[name].dtype).eps * want.abs().max().item()
        if not error <= 4 * torch_error + 16 * rounding:
            return f"{name} is off by {error:.2g} (torch.nn: {torch_error:.2g})"
    return None
