"""Each micro-kernel by itself, on every instruction set and for every dtype.

The checks are in C++, since kernels take pointers: to rows at any address, to rows that end where
accessible memory ends, and to rows whose surroundings must not change. See native/checks.h.
"""

from __future__ import annotations

import ctypes

import native
import pytest
import torch
from cases import DTYPES
from targets import COMPLETE, FROZEN

from rnnfast import backend

PRODUCTS = ["products", "chains", "representations", "gates", "biases", "gathers"]
CHECKS = {
    "product_checks": [*PRODUCTS, "dots", "outer_few", "transposed"],
    "frozen_checks": ["frozen", "frozen_tokens"],
    "row_checks": ["conversions", "halves", "sums", "gathered_gradients"],
    "cell_checks": ["activations", "forward", "backward", "normalization"],
}
"""Loads the functions of tests/native/<name>.cpp."""
INDEX = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""The index of a dtype in a target's tables."""
CASES = [
    (library, check, target)
    for library, checks in CHECKS.items()
    for check in checks
    for target in (FROZEN if library == "frozen_checks" else COMPLETE)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("library", "check", "target"), CASES)
def test_micro_kernels(library: str, check: str, target: str, dtype: torch.dtype) -> None:
    if backend.EXTENSION is None:
        pytest.fail(f"rnnfast._C did not build or load: {backend.IMPORT_ERROR}")
    native.plug_in(target)
    function = getattr(native.load(library), f"check_{check}")
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_char_p
    words = function(backend.EXTENSION.target_address(target), INDEX[dtype])
    assert words.decode() == ""
