"""Rounding errors in float32, compared with torch.nn's; both against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import (
    TORCH_CLASS,
    Case,
    cast,
    distance,
    oracle,
    run_backward,
    run_forward,
    sample_grads,
    sample_inputs,
)
from torch import Tensor

from rnnfast import backend
from rnnfast.reference import CELLS

SHAPES = [
    (60, 12, 40, 72),
    (20, 8, 300, 700),
    (6, 3, 600, 700),
    (6, 3, 1024, 1024),
    (10, 16, 512, 512),
]
SEEDS = range(6)


def targets() -> Iterator[str]:
    """Sets the kernels of one instruction set after the other."""
    extension = backend.EXTENSION
    if extension is None:
        pytest.fail(f"rnnfast._C did not build or load: {backend.IMPORT_ERROR}")
    before = extension.get_cpu_capability()
    try:
        for name in extension.cpu_capabilities():
            extension.set_cpu_capability(name)
            yield name
    finally:
        extension.set_cpu_capability(before)


def by_torch(case: Case, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Returns (y, *final states, *gradients of the inputs) of torch.nn."""
    states = CELLS[case.cell].states
    make, options = TORCH_CLASS[case.cell]
    module = make(case.I, case.H, **options)
    for parameter, value in zip(module.parameters(), inputs[1 + states :], strict=True):
        parameter.data.copy_(value)
    leaves = [t.detach().clone().requires_grad_() for t in inputs[: 1 + states]]
    hx = tuple(t.unsqueeze(0) for t in leaves[1:])
    y, finals = module(leaves[0], hx if states > 1 else hx[0])
    outputs = [y, *(t.squeeze(0) for t in (finals if states > 1 else (finals,)))]
    return outputs + list(torch.autograd.grad(outputs, [*leaves, *module.parameters()], grads))


def by_kernels(case: Case, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Returns (y, *final states, *gradients of the inputs) of the operators."""
    forward = run_forward(case, inputs, save=True)
    outputs = forward[: 1 + CELLS[case.cell].states]
    return [*outputs, *run_backward(case, inputs, grads, forward)]


def root_mean_squares(samples: list[list[float]]) -> list[float]:
    """Returns the root mean square over samples, for each result."""
    return [
        (sum(value * value for value in values) / len(values)) ** 0.5
        for values in zip(*samples, strict=True)
    ]


@pytest.mark.parametrize(
    "shape",
    [*SHAPES[:2], *(pytest.param(shape, marks=pytest.mark.full) for shape in SHAPES[2:])],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_float32_errors_are_torch_nns(cell: str, shape: tuple[int, int, int, int]) -> None:
    """Errors over several samples are no larger than torch.nn's, in values and gradients.

    In a single sample, the error of a state of few elements may differ by half by chance.
    """
    case = Case(cell, *shape)
    errors: dict[str, list[list[float]]] = {}
    for seed in SEEDS:
        exact = sample_inputs(case, torch.float32, seed)
        exact_grads = sample_grads(case, torch.float32, 100 + seed)
        expected = oracle(case, exact, exact_grads)
        inputs, grads = (cast(t, torch.float32, "cpu") for t in (exact, exact_grads))
        results = {"torch.nn": by_torch(case, inputs, grads)}
        results |= {name: by_kernels(case, inputs, grads) for name in targets()}
        for name, found in results.items():
            pairs = zip(found, [*expected.outputs, *expected.grads], strict=True)
            errors.setdefault(name, []).append([distance(*pair) for pair in pairs])
    theirs = root_mean_squares(errors.pop("torch.nn"))
    for name, samples in errors.items():
        for ours, torchs in zip(root_mean_squares(samples), theirs, strict=True):
            assert ours < 1.1 * torchs + 1e-8, (name, ours, torchs)
