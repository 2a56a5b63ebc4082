"""Rounding errors in float32, compared with torch.nn's; both against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from cases import Case

from benchmarks.errors import relative_errors
from rnnfast import _C
from rnnfast.reference import CELLS

SHAPES = [
    (60, 12, 40, 72),
    (20, 8, 300, 700),
    (6, 3, 600, 700),
    (6, 3, 1024, 1024),
    (10, 16, 512, 512),
]
SEEDS = range(6)


@pytest.mark.parametrize(
    ("cell", "shape"),
    [
        pytest.param(cell, shape, marks=[pytest.mark.full] * (shape not in quick))
        for cell, quick in zip(CELLS, (SHAPES[:1], SHAPES[:1], SHAPES[:1], SHAPES[:2]), strict=True)
        for shape in SHAPES
    ],
    ids=str,
)
def test_float32_errors_are_torch_nns(cell: str, shape: tuple[int, int, int, int]) -> None:
    """Errors over several samples are no larger than torch.nn's, in values and gradients.

    In a single sample, the error of a state of few elements may differ by half by chance.
    """
    errors = relative_errors(Case(cell, *shape), torch.float32, SEEDS, list(_C.cpu_capabilities()))
    theirs = errors.pop("torch.nn")
    for name, found in errors.items():
        for ours, torchs in zip(found, theirs, strict=True):
            assert ours < 1.1 * torchs + 1e-8, (name, ours, torchs)
