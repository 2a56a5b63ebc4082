"""The modules, cells and layers alike, used with other features of PyTorch.

The oracle is torch.nn, or the reference backend with the same weights.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from cases import distance
from test_modules import LAYERS, pair, random_state, tensors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import functional

DTYPE = torch.float64
Weights = dict[str, Tensor]

modes = pytest.mark.parametrize("mode", LAYERS)
suffixes = pytest.mark.parametrize("suffix", ["", "Cell"])


def sample(suffix: str, dtype: torch.dtype = DTYPE) -> Tensor:
    """Returns an input of a layer or cell: 5 steps or one, 2 sequences."""
    return torch.randn((2, 3) if suffix else (5, 2, 3), dtype=dtype)


def state(mode: str, suffix: str, dtype: torch.dtype = DTYPE) -> Any:
    return random_state(mode, *((2, 4) if suffix else (1, 2, 4)), dtype=dtype)


def loss_of(results: Any) -> Tensor:
    return torch.stack([result.double().sin().sum() for result in tensors(results)]).sum()


def reference(mode: str, suffix: str, x: Tensor, weights: list[Tensor], hx: Any = None) -> Any:
    """Returns the module's results with the backend ``reference`` and these weights."""
    kind, own = LAYERS[mode]
    if suffix:
        call = getattr(functional, f"{kind.lower()}_cell")
        return call(x, hx, *weights, **own, backend="reference")
    return getattr(functional, kind.lower())(x, hx, weights, **own, backend="reference")


def weight_names(module: nn.Module, suffix: str) -> list[str]:
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    return names if suffix else [f"{name}_l0" for name in names]


def loss_with(module: nn.Module, x: Tensor) -> Callable[[Weights], Tensor]:
    return lambda weights: loss_of(torch.func.functional_call(module, weights, (x,)))


@suffixes
@modes
def test_ensembles(mode: str, suffix: str) -> None:
    options = {} if suffix else {"num_layers": 2, "bidirectional": True, "batch_first": True}
    models = [pair(mode, suffix, **options)[1] for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(models)
    x = sample(suffix)
    base = copy.deepcopy(models[0]).to("meta")

    def call(weights: Weights, buffers: Weights, x: Tensor) -> Any:
        return torch.func.functional_call(base, (weights, buffers), (x,))

    actual = torch.func.vmap(call, in_dims=(0, 0, None))(weights, buffers, x)
    for i, model in enumerate(models):
        torch.testing.assert_close([t[i] for t in tensors(actual)], tensors(model(x)))


@modes
def test_per_sample_gradients_of_cells(mode: str) -> None:
    _, ours = pair(mode, "Cell")
    weights, x = dict(ours.named_parameters()), sample("Cell")
    gradient = torch.func.grad(lambda weights, x: loss_with(ours, x)(weights))
    actual = torch.func.vmap(gradient, in_dims=(None, 0))(weights, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(loss_of(ours(x[i])), list(weights.values()))
        torch.testing.assert_close([actual[name][i] for name in weights], list(expected))


@suffixes
@modes
def test_derivatives_by_the_weights(mode: str, suffix: str) -> None:
    """jacrev, jacfwd and hessian against double backward and the gradients of single results."""
    _, ours = pair(mode, suffix)
    weights, x = dict(ours.named_parameters()), sample(suffix)
    name = weight_names(ours, suffix)[1]
    weight = weights[name]

    def call(value: Tensor) -> Tensor:
        return tensors(torch.func.functional_call(ours, {name: value}, (x,)))[0]

    y = call(weight)
    rows = [torch.autograd.grad(v, weight, retain_graph=True)[0] for v in y.flatten()]
    jacobian = torch.stack(rows).view(*y.shape, *weight.shape)
    torch.testing.assert_close(torch.func.jacrev(call)(weight), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(call)(weight), jacobian)

    (gradient,) = torch.autograd.grad(y.sin().sum(), weight, create_graph=True)
    rows = [torch.autograd.grad(v, weight, retain_graph=True)[0] for v in gradient.flatten()]
    hessian = torch.stack(rows).view(*weight.shape, *weight.shape)
    actual = torch.func.hessian(lambda value: call(value).sin().sum())(weight)
    torch.testing.assert_close(actual, hessian)


@pytest.mark.parametrize("use_reentrant", [False, True])
@suffixes
@modes
def test_checkpoint(mode: str, suffix: str, use_reentrant: bool) -> None:
    options = {} if suffix else {"num_layers": 2, "bidirectional": True, "dropout": 0.5}
    _, ours = pair(mode, suffix, **options)
    x = sample(suffix).requires_grad_()
    leaves, found = [x, *ours.parameters()], []

    def plain(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(ours(x)))  # the reentrant kind does not see nested results

    for call in (plain, lambda x: checkpoint(plain, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        loss_of(call(x)).backward()
        found.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@suffixes
@modes
def test_inference_mode(mode: str, suffix: str) -> None:
    _, ours = pair(mode, suffix)
    x, hx = sample(suffix), state(mode, suffix)
    expected = tensors(ours(x, hx))
    with torch.inference_mode():
        actual = tensors(ours(x, hx))
        assert all(result.is_inference() for result in actual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        x, born = x.clone(), copy.deepcopy(ours)
    assert all(weight.is_inference() for weight in [x, *born.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(tensors(born(x, hx)), expected, rtol=0, atol=0)


@suffixes
@modes
def test_training_under_autocast(mode: str, suffix: str) -> None:
    """float32 parameters get float32 gradients, as accurate as bfloat16 inputs allow."""
    exact, ours = pair(mode, suffix, dtype=torch.float32)
    x, hx = sample(suffix, torch.float32), state(mode, suffix, torch.float32)
    expected = tensors(exact(x, hx))
    loss_of(expected).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = tensors(ours(x, hx))
    assert {result.dtype for result in results} == {torch.bfloat16}
    loss_of(results).backward()
    eps = torch.finfo(torch.bfloat16).eps
    for actual, value in zip(results, expected, strict=True):
        assert distance(actual, value.double()) < 2 * eps
    for name, parameter in ours.named_parameters():
        assert parameter.grad.dtype is torch.float32
        assert distance(parameter.grad, exact.get_parameter(name).grad.double()) < 2 * eps


@pytest.mark.parametrize("backend", [None, "reference", "aten"])
@suffixes
@modes
def test_gradients_of_any_subset(mode: str, suffix: str, backend: str | None) -> None:
    """Each leaf alone, each pair, and all but each: the same gradients, and no others."""
    _, ours = pair(mode, suffix, backend=backend)
    leaves = [sample(suffix), *tensors(state(mode, suffix)), *ours.parameters()]

    def gradients(wanted: tuple[int, ...]) -> list[Tensor | None]:
        for i, leaf in enumerate(leaves):
            leaf.grad = None
            leaf.requires_grad_(i in wanted)
        hx = tuple(leaves[1:-4]) if mode == "LSTM" else leaves[1]
        loss_of(ours(leaves[0], hx)).backward()
        return [leaf.grad for leaf in leaves]

    everything = tuple(range(len(leaves)))
    full = gradients(everything)
    for size in (1, 2, len(leaves) - 1):
        for wanted in combinations(everything, size):
            for i, actual in enumerate(gradients(wanted)):
                assert (actual is None) == (i not in wanted)
                if actual is not None:
                    torch.testing.assert_close(actual, full[i])


def prune_by_magnitude(module: nn.Module, name: str) -> None:
    prune.l1_unstructured(module, name, amount=0.5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "apply",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        prune_by_magnitude,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral", "prune"],
)
@suffixes
@modes
def test_weights_made_of_others(
    mode: str, suffix: str, apply: Callable[[nn.Module, str], Any]
) -> None:
    """Normalised, orthogonal or pruned weights: results, and gradients of their parameters."""
    _, ours = pair(mode, suffix)
    names = weight_names(ours, suffix)
    apply(ours, names[1])
    ours.eval()  # in training, spectral norms advance whenever the weight is read
    x = sample(suffix)
    results = tensors(ours(x))
    weights = [getattr(ours, name) for name in names]
    assert not isinstance(weights[1], nn.Parameter)
    expected = tensors(reference(mode, suffix, x, weights))
    torch.testing.assert_close(results, expected)
    leaves = list(ours.parameters())
    actual = torch.autograd.grad(loss_of(results), leaves, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(loss_of(expected), leaves))


@suffixes
@modes
def test_functional_call_differentiates_by_its_weights(mode: str, suffix: str) -> None:
    _, ours = pair(mode, suffix)
    x, source = sample(suffix), torch.randn((), dtype=DTYPE, requires_grad=True)
    weights = {name: value.detach() * source for name, value in ours.named_parameters()}
    actual = loss_of(torch.func.functional_call(ours, weights, (x,)))
    expected = loss_of(reference(mode, suffix, x, list(weights.values())))
    leaves = [source, *weights.values()]
    gradients = torch.autograd.grad(actual, leaves, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves))


@suffixes
@modes
def test_copies_start_equal_and_part(mode: str, suffix: str) -> None:
    _, ours = pair(mode, suffix)
    x = sample(suffix)
    before = tensors(ours(x))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(tensors(other(x)), before, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        torch.testing.assert_close(tensors(ours(x)), before, rtol=0, atol=0)
        assert not any(result.any() for result in tensors(other(x)))


@suffixes
@modes
def test_torch_loads_the_state_of_ours(mode: str, suffix: str) -> None:
    theirs, ours = pair(mode, suffix)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = sample(suffix)
    torch.testing.assert_close(tensors(theirs(x)), tensors(ours(x)))


OPTIONS: list[dict[str, Any]] = [
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True, "dropout": 0.25, "num_layers": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@modes
def test_all_weights_and_extra_repr(mode: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(mode, **options)
    torch.testing.assert_close(ours.all_weights, theirs.all_weights, rtol=0, atol=0)
    ids = [id(weight) for weights in ours.all_weights for weight in weights]
    assert ids == [id(parameter) for parameter in ours.parameters()]
    assert ours.extra_repr() == theirs.extra_repr()
    x = torch.randn(5, 2, 3, dtype=DTYPE)
    before = tensors(ours.eval()(x))
    ours.flatten_parameters()
    torch.testing.assert_close(tensors(ours(x)), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
@modes
def test_extra_repr_of_cells(mode: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(mode, "Cell", **options)
    assert ours.extra_repr() == theirs.extra_repr()


@suffixes
@modes
def test_from_the_meta_device(mode: str, suffix: str) -> None:
    kind, own = LAYERS[mode]
    ours = getattr(rnnfast, kind + suffix)(3, 4, **own, device="meta", dtype=DTYPE)
    x = sample(suffix)
    shapes = [result.shape for result in tensors(ours(x.to("meta")))]
    ours.to_empty(device="cpu")
    theirs = pair(mode, suffix)[0]
    ours.load_state_dict(theirs.state_dict())
    results = tensors(ours(x))
    torch.testing.assert_close(results, tensors(theirs(x)))
    assert [result.shape for result in results] == shapes

    again = getattr(rnnfast, kind + suffix)(3, 4, **own, device="meta", dtype=DTYPE)
    again.load_state_dict(theirs.state_dict(), assign=True)
    torch.testing.assert_close(tensors(again(x)), results, rtol=0, atol=0)


CONVERSIONS: dict[str, tuple[torch.dtype, Callable[[nn.Module], nn.Module]]] = {
    "double": (torch.float64, lambda module: module.double()),
    "half": (torch.float16, lambda module: module.half()),
    "bfloat16": (torch.bfloat16, lambda module: module.bfloat16()),
    "to": (torch.float16, lambda module: module.to(torch.float16)),
}


@pytest.mark.parametrize("name", CONVERSIONS)
@suffixes
@modes
def test_conversions(mode: str, suffix: str, name: str) -> None:
    """A module that has run in one dtype is converted, and runs and trains in another."""
    dtype, convert = CONVERSIONS[name]
    exact, ours = pair(mode, suffix, dtype=torch.float32)
    ours(sample(suffix, torch.float32))
    assert convert(ours) is ours
    exact.double().load_state_dict(ours.state_dict())
    x, hx = sample(suffix, dtype), state(mode, suffix, dtype)
    wide = tuple(h.double() for h in hx) if mode == "LSTM" else hx.double()
    results, expected = tensors(ours(x, hx)), tensors(exact(x.double(), wide))
    for result, value in zip(results, expected, strict=True):
        assert result.dtype is dtype
        assert distance(result, value) < 2 * torch.finfo(dtype).eps
    loss_of(results).backward()
    loss_of(expected).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad.dtype is dtype
        gradient = exact.get_parameter(name).grad
        assert distance(parameter.grad, gradient) < 4 * torch.finfo(dtype).eps
