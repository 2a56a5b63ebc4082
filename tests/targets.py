"""What the kernels run on in tests, and which cases each target has kernels for.

Every instruction set of this CPU, AMX and the CUDA driver emulated (see native.py) and, where there
is one, the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from cases import Case
from native import COMPLETE_EMULATIONS

from rnnfast import backend

COMPLETE = ["the extension"] if backend.EXTENSION is None else backend.EXTENSION.cpu_capabilities()
COMPLETE += COMPLETE_EMULATIONS
"""Those that have kernels for every case."""
PARTIAL = [] if backend.EXTENSION is None else ["cuda_emulation"]
"""Those that have kernels for plain cases, see `Case.is_plain`."""
if PARTIAL and torch.cuda.is_available():
    PARTIAL.append("cuda")
TARGETS = [*COMPLETE, *PARTIAL]


def on(targets: Iterable[str]) -> pytest.MarkDecorator:
    """The test runs on these, by way of the fixture ``device``."""
    return pytest.mark.parametrize("device", [_param(name) for name in targets], indirect=True)


def on_every_target(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """The test runs with every case, each on the targets that have kernels for it."""
    cases = list(cases)
    pairs = [
        _param(target, case)
        for target in TARGETS
        for case in cases
        if case.is_plain or target in COMPLETE
    ]
    return pytest.mark.parametrize(("device", "case"), pairs, indirect=["device"])


def _param(target: str, *case: Case) -> object:
    marks = [pytest.mark.cuda] if target == "cuda" else []
    return pytest.param(target, *case, marks=marks, id="-".join([target, *map(str, case)]))
