"""What the kernels run on in tests, and which cases each target has kernels for.

Every instruction set of this CPU, AMX and the CUDA driver emulated (see native.py) and, where there
is one, the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import Case
from native import COMPLETE_EMULATIONS, plug_in

from rnnfast import backend

COMPLETE = ["the extension"] if backend.EXTENSION is None else backend.EXTENSION.cpu_capabilities()
COMPLETE += COMPLETE_EMULATIONS
"""Those that have kernels for every case."""
EMULATION = "cuda_emulation"
PARTIAL = [] if backend.EXTENSION is None else [EMULATION]
"""Those that have kernels for plain cases, see `Case.is_plain`."""
if PARTIAL and torch.cuda.is_available():
    PARTIAL.append("cuda")
TARGETS = [*COMPLETE, *PARTIAL]
REPLACED = {
    "avx512_bf16": (torch.bfloat16,),
    "avx512_amx": (torch.bfloat16, torch.float32),
    "amx_emulation": (torch.bfloat16, torch.float32),
}
"""The types for which an instruction set has kernels of its own; else it has those of avx512."""


@contextmanager
def running_on(target: str) -> Iterator[str]:
    """The device of tensors for a target, with the CPU's kernels set to it."""
    extension = backend.EXTENSION
    if extension is None:
        pytest.fail(f"rnnfast._C did not build or load: {backend.IMPORT_ERROR}")
    if target == "cuda":
        yield "cuda"
        return
    plug_in(target)
    before = extension.get_cpu_capability()
    extension.set_cpu_capability(target)
    try:
        yield "cpu"
    finally:
        extension.set_cpu_capability(before)


def is_emulated() -> bool:
    """Whether the CPU's kernels are set to the emulated CUDA driver."""
    return backend.EXTENSION is not None and backend.EXTENSION.get_cpu_capability() == EMULATION


def with_kernels(targets: Iterable[str], case: Case, dtype: torch.dtype | None = None) -> list[str]:
    """Those of the targets that have kernels for a case, and with ``dtype`` ones of their own."""
    return [
        name
        for name in targets
        if (case.is_plain or name in COMPLETE)
        and (dtype is None or dtype in REPLACED.get(name, (dtype,)))
    ]


def check_on(targets: Iterable[str], check: Callable[[str], None]) -> None:
    """``check(device)`` on each target; an error says on which ones it failed."""
    errors = {}
    for name in targets:
        with running_on(name) as device:
            try:
                check(device)
            except Exception as error:
                errors[name] = error
    if errors:
        words = [f"on {name}: {type(error).__name__}: {error}" for name, error in errors.items()]
        raise AssertionError("\n".join(words)) from next(iter(errors.values()))


def on(targets: Iterable[str]) -> pytest.MarkDecorator:
    """The test runs on these, by way of the fixture ``device``."""
    return pytest.mark.parametrize("device", [_param(name) for name in targets], indirect=True)


GROUPS = {"cpu": [name for name in TARGETS if name != "cuda"], "cuda": ["cuda"]}
together = pytest.mark.parametrize(
    "targets",
    [
        pytest.param(names, marks=[pytest.mark.cuda] if group == "cuda" else [], id=group)
        for group, names in GROUPS.items()
        if group == "cpu" or "cuda" in TARGETS
    ],
)
"""The test gets the targets, to loop over them with `check_on`: all of the CPU's, or the GPU."""


def on_every_target(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """The test runs with every case, each on the targets that have kernels for it."""
    pairs = [
        _param(target, case)
        for case in cases
        for target in TARGETS
        if case.is_plain or target in COMPLETE
    ]
    return pytest.mark.parametrize(("device", "case"), pairs, indirect=["device"])


def _param(target: str, *case: Case) -> object:
    marks = [pytest.mark.cuda] if target == "cuda" else []
    return pytest.param(target, *case, marks=marks, id="-".join([target, *map(str, case)]))
