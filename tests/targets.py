"""The targets that tests run on, and which cases each target has kernels for.

The targets are every instruction set of this CPU, the emulations of AMX and of the CUDA driver (see
native.py), and the GPU, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import Case
from native import CAPABILITIES, COMPLETE_EMULATIONS, VNNI_EMULATIONS, plug_in

from rnnfast import backend

VNNI = ["avx2_vnni", "avx512_vnni"]
"""The instruction sets whose kernels are those of a lesser one, but for frozen weights of int8."""
COMPLETE = ["the extension"] if backend.EXTENSION is None else [*CAPABILITIES]
COMPLETE = [name for name in COMPLETE if name not in VNNI] + COMPLETE_EMULATIONS
"""The targets with kernels for every case."""
FROZEN = [*(CAPABILITIES or COMPLETE), *COMPLETE_EMULATIONS, *VNNI_EMULATIONS]
"""The targets with kernels for frozen weights."""
EMULATION = "cuda_emulation"
PARTIAL = [] if backend.EXTENSION is None else [EMULATION]
"""The targets with kernels only for plain cases, see `Case.is_plain`."""
if PARTIAL and torch.cuda.is_available():
    PARTIAL.append("cuda")
TARGETS = [*COMPLETE, *PARTIAL]
REPLACED = {
    "avx512_bf16": (torch.bfloat16,),
    "avx512_amx": (torch.bfloat16, torch.float32),
    "amx_emulation": (torch.bfloat16, torch.float32),
}
"""The dtypes for which an instruction set has its own kernels; for others it uses avx512's."""


@contextmanager
def running_on(target: str) -> Iterator[str]:
    """Selects a target's CPU kernels; yields the device for its tensors."""
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
    """Whether the CPU's kernels are the emulated CUDA driver."""
    return backend.EXTENSION is not None and backend.EXTENSION.get_cpu_capability() == EMULATION


def with_kernels(targets: Iterable[str], case: Case, dtype: torch.dtype | None = None) -> list[str]:
    """Returns the targets that have kernels for a case (with ``dtype``: their own kernels)."""
    return [
        name
        for name in targets
        if (case.is_plain or name in COMPLETE)
        and (dtype is None or dtype in REPLACED.get(name, (dtype,)))
    ]


def check_on(targets: Iterable[str], check: Callable[[str], None]) -> None:
    """Runs ``check(device)`` on each target; an error lists the targets on which it failed."""
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
    """Parametrises a test to run on these targets, through the fixture ``device``."""
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
"""Gives a test all CPU targets, or the GPU, to loop over with `check_on`."""


def on_every_target(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Runs a test with every case, each on the targets that have kernels for it."""
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
