"""Which backend a call uses, on devices that this machine need not have."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rnnfast
from rnnfast import backend, sequences
from rnnfast.sequences import Extras, Options

NO_EXTRAS = Extras()


def like(device: str, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """The attributes of a tensor that `choose` reads."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates an extension built with CUDA, with no backend forced."""
    monkeypatch.setattr(backend, "_FUSED_DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(backend, "_ENVIRONMENT", "auto")
    monkeypatch.setattr(backend, "_warned", set())


@pytest.fixture
def cpu_build(cuda_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates an extension built without CUDA."""
    monkeypatch.setattr(backend, "EXTENSION", SimpleNamespace())
    monkeypatch.setattr(backend, "_FUSED_DEVICES", frozenset({"cpu"}))


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("dtype", sorted(backend.FUSED_DTYPES, key=str), ids=str)
def test_auto_takes_torchs_kernels_on_cuda(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # this is a choice, not a fall-back, so no warning
        for requested in (None, "auto"):
            assert backend.choose(requested, like("cuda", dtype)) == "aten"
            assert backend.choose(requested, like("cpu", dtype)) == "fused"


@pytest.mark.usefixtures("cuda_build")
def test_forced_backends_run_on_cuda() -> None:
    for name in ("fused", "aten", "reference"):
        assert backend.choose(name, like("cuda")) == name
        with rnnfast.use_backend(name):
            assert backend.choose(None, like("cuda")) == name


@pytest.mark.usefixtures("cuda_build")
def test_auto_takes_the_fused_kernels_where_torch_has_none() -> None:
    assert backend.choose(None, like("cuda"), beyond_torch=True) == "fused"


@pytest.mark.usefixtures("cuda_build")
def test_auto_keeps_graphs_whole_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert backend.choose(None, like("cuda")) == "fused"


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("requested", [None, "fused"])
def test_transforms_run_the_reference_on_cuda(
    requested: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "transforms_active", lambda: True)
    assert backend.choose(requested, like("cuda")) == "reference"


LENGTHS, EMPTY = torch.tensor([2, 3]), torch.tensor([2, 0])
RESET = torch.zeros(3, 2, dtype=torch.bool)
ON_CUDA = {  # what a call uses: the backend that runs
    "nothing": (NO_EXTRAS, False, "aten"),
    "proj_size": (NO_EXTRAS, True, "aten"),
    "lengths": (Extras(LENGTHS), False, "aten"),
    "lengths of 0": (Extras(EMPTY), False, "reference"),
    "reset": (Extras(reset=RESET), False, "reference"),
    "cells": (Extras(return_cells=True), False, "fused"),
    "cells, proj_size": (Extras(return_cells=True), True, "reference"),
    "cells, lengths": (Extras(LENGTHS, return_cells=True), False, "reference"),
    "cells, reset": (Extras(reset=RESET, return_cells=True), False, "reference"),
}


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize(("extras", "projects", "runs"), ON_CUDA.values(), ids=ON_CUDA)
def test_what_runs_on_cuda(extras: Extras, projects: bool, runs: str) -> None:
    x = SimpleNamespace(**vars(like("cuda")), dim=lambda: 3)
    assert sequences._choose_sequence(x, x, None, extras, projects) == runs


@pytest.mark.usefixtures("cpu_build")
def test_auto_without_cuda_kernels_warns_only_where_they_would_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose(None, like("cuda")) == "aten"
    with pytest.warns(UserWarning, match=r"no fused kernels run, as .* built without CUDA"):
        assert backend.choose(None, like("cuda"), beyond_torch=True) == "aten"
    with pytest.raises(RuntimeError, match=r"built without CUDA.*FORCE_CUDA=1"):
        backend.choose("fused", like("cuda"))


@pytest.mark.usefixtures("cuda_build")
def test_doctor_says_why_torchs_kernels_run_on_cuda() -> None:
    report = rnnfast.doctor()
    assert all(f"{cell:<13}fused     aten" in report for cell in rnnfast.reference.CELLS)
    assert "cuda: the fused kernels are built, but no measurement" in report
    with rnnfast.use_backend("fused"):
        assert all(f"{cell:<13}fused     fused" in rnnfast.doctor() for cell in ("lstm", "gru"))


def in_force() -> str:
    return backend.in_force(None)


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is forced by the environment; what a test leaves set is undone."""
    monkeypatch.setattr(backend, "_ENVIRONMENT", "auto")
    yield
    rnnfast.use_backend(None)


@pytest.mark.usefixtures("default")
def test_use_backend_counts_for_one_thread() -> None:
    """Two threads at once, each inside its own block."""
    both_inside = threading.Barrier(2, timeout=60)
    seen: dict[str, list[str]] = {}

    def work(name: str) -> None:
        found = seen[name] = [in_force()]
        with rnnfast.use_backend(name):
            both_inside.wait()
            found.append(in_force())
            both_inside.wait()
        found.append(in_force())

    with rnnfast.use_backend("fused"):
        threads = [threading.Thread(target=work, args=[name]) for name in ("aten", "reference")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert in_force() == "fused"
    assert seen == {name: ["auto", name, "auto"] for name in ("aten", "reference")}


@pytest.mark.usefixtures("default")
def test_a_plain_call_of_use_backend_counts_from_then_on() -> None:
    rnnfast.use_backend("aten")
    assert in_force() == "aten"
    with rnnfast.use_backend("reference"):
        rnnfast.use_backend("fused")
        assert in_force() == "fused"
    assert in_force() == "aten"
    rnnfast.use_backend(None)
    assert in_force() == "auto"


@pytest.mark.usefixtures("default")
def test_use_backend_may_be_entered_again() -> None:
    forced = rnnfast.use_backend("aten")
    for _ in range(2):
        with forced:
            assert in_force() == "aten"
        assert in_force() == "auto"


@pytest.mark.usefixtures("default")
def test_use_backend_as_a_decorator() -> None:
    @rnnfast.use_backend("reference")
    def inner(depth: int) -> list[str]:
        return [in_force(), *(inner(depth - 1) if depth else [])]

    assert in_force() == "auto"
    assert inner(2) == ["reference"] * 3
    assert in_force() == "auto"
    assert inner.__name__ == "inner"


def test_use_backend_does_not_decorate_what_runs_in_parts() -> None:
    def generator() -> Iterator[str]:
        yield in_force()

    async def coroutine() -> str:
        return in_force()

    for function in (generator, coroutine, SimpleNamespace):
        with pytest.raises(TypeError, match="in one go"):
            rnnfast.use_backend("reference")(function)
    assert in_force() == "auto"


def test_use_backend_refuses_other_names() -> None:
    before = in_force()
    with pytest.raises(ValueError, match="should be one of auto, fused, aten, reference"):
        rnnfast.use_backend("fast")
    assert in_force() == before


class Graphs:
    """A backend of torch.compile that notes what runs the layer in each graph."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets = " ".join(str(node.target) for node in graph.graph.nodes)
        self.seen.append("fused" if "rnnfast" in targets else "reference")
        return graph.forward


@pytest.mark.usefixtures("default")
@torch.no_grad()
def test_graphs_are_compiled_for_the_backend_in_force() -> None:
    torch._dynamo.reset()
    layer, x, graphs = rnnfast.GRU(3, 4), torch.randn(2, 1, 3), Graphs()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    expected = layer(x)[0]
    for name in (None, "reference", None):
        with rnnfast.use_backend(name):
            torch.testing.assert_close(compiled(x)[0], expected)
    assert graphs.seen == ["fused", "reference"]
    rnnfast.use_backend("reference")
    compiled(x)
    thread = threading.Thread(target=torch.no_grad()(compiled), args=[x])  # on the default
    thread.start()
    thread.join()
    assert graphs.seen == ["fused", "reference"]


@pytest.mark.usefixtures("default")
@torch.no_grad()
def test_use_backend_in_a_graph() -> None:
    torch._dynamo.reset()
    layer, x, graphs = rnnfast.GRU(3, 4), torch.randn(2, 1, 3), Graphs()

    def run(x: torch.Tensor) -> torch.Tensor:
        with rnnfast.use_backend("reference"):
            return layer(x)[0]

    compiled = torch.compile(run, fullgraph=True, backend=graphs)
    torch.testing.assert_close(compiled(x), run(x))
    assert graphs.seen == ["reference"]
    assert in_force() == "auto"


def test_cudnn_keeps_what_a_backward_in_eval_mode_needs() -> None:
    """A backward in eval mode works on CUDA, unlike torch.nn's: nothing is dropped there."""
    evaluating = Options(num_layers=2, dropout=0.5, training=False)
    training = evaluating._replace(training=True)
    assert sequences._for_cudnn(evaluating) == training._replace(dropout=0.0)
    assert sequences._for_cudnn(training) == training
    x, weight = torch.zeros(1, 1, 1), torch.zeros(1, requires_grad=True)
    assert sequences._wants_gradient(x, None, [weight])
    assert sequences._wants_gradient(x, (weight,), [x])
    assert not sequences._wants_gradient(x, (x,), [x])
    with torch.no_grad():
        assert not sequences._wants_gradient(x, None, [weight])
