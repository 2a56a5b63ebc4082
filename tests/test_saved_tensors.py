"""Saved tensors that are changed, freed, or returned differently by hooks before the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast import backend

T, B, I, H = 5, 3, 12, 24

LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "rnn": lambda: rnnfast.RNN(I, H, backend="fused"),
    "gru": lambda: rnnfast.GRU(I, H, backend="fused"),
    "gru-two-ways": lambda: rnnfast.GRU(I, H, bidirectional=True, backend="fused"),
    "lstm": lambda: rnnfast.LSTM(I, H, backend="fused"),
    "lstm-stacked": lambda: rnnfast.LSTM(I, H, num_layers=2, backend="fused"),
    "lstm-projected": lambda: rnnfast.LSTM(I, H, proj_size=8, backend="fused"),
}


@pytest.fixture(params=["short path", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both autograd nodes: that of whole calls, and that of the operators."""
    if request.param == "operators":
        monkeypatch.setattr(backend, "short_path", lambda requested: None)
    return request.param


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return LAYERS[request.param]()


def sample(layer: torch.nn.Module) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(T, B, layer.input_size, requires_grad=True)


def forward(
    layer: torch.nn.Module, x: Tensor, unpack: Callable[[Tensor], Tensor] = lambda t: t
) -> Tensor:
    """Returns a loss; the tensors that the layer saves pass through ``unpack``."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        output, state = layer(x)
    states = state if isinstance(state, tuple) else (state,)
    return output.pow(2).sum() + sum(s.sin().sum() for s in states)


def gradients(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the gradients in `.grad`, and clears them."""
    tensors = [x, *layer.parameters()]
    found = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found)
    return found


def expect_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


# ---- saved-tensor hooks ----


def other_strides(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def gaps(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape, 2), 7, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


def elsewhere(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


@pytest.mark.parametrize("unpack", [other_strides, gaps, elsewhere])
def test_hooks_may_return_other_strides_and_addresses(
    unpack: Callable[[Tensor], Tensor], layer: torch.nn.Module, way: str
) -> None:
    x = sample(layer)
    forward(layer, x).backward()
    expected = gradients(layer, x)
    loss = forward(layer, x, unpack)
    loss.backward()
    expect_equal(gradients(layer, x), expected)


@pytest.mark.parametrize(
    ("unpack", "words"),
    [
        (lambda t: t.half() if t.is_floating_point() else t, "dtype"),
        (lambda t: t.double() if t.is_floating_point() else t, "dtype"),
        (lambda t: t.reshape(-1), "shape"),
        (lambda t: t[:0], "shape"),
        (lambda t: torch.cat([t, t]), "shape"),
    ],
    ids=["half", "double", "flat", "empty", "twice"],
)
def test_hooks_that_return_something_else_are_refused(
    unpack: Callable[[Tensor], Tensor], words: str, layer: torch.nn.Module, way: str
) -> None:
    x = sample(layer)
    loss = forward(layer, x, unpack)
    with pytest.raises(RuntimeError, match=f"rnnfast::.*expected .*{words}"):
        loss.backward()


def test_hooks_that_return_freed_memory_are_refused(layer: torch.nn.Module, way: str) -> None:
    def free(t: Tensor) -> Tensor:
        t = t.clone()
        t.untyped_storage().resize_(0)
        return t

    x = sample(layer)
    loss = forward(layer, x, free)
    with pytest.raises(RuntimeError, match=r"rnnfast::.*storage of .* freed or resized"):
        loss.backward()


@pytest.mark.parametrize("lengths", [[5, 2, 4], [1, 1, 5]], ids=str)
def test_hooks_on_lengths_and_resets(lengths: list[int], layer: torch.nn.Module, way: str) -> None:
    """Lengths and resets are not floating-point; they are saved and checked too."""
    x, reset = sample(layer), torch.rand(T, B) < 0.3

    def loss(unpack: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            output, _ = layer(x, lengths=lengths, reset=reset)
        return output.pow(2).sum()

    loss().backward()
    expected = gradients(layer, x)
    loss(other_strides).backward()
    expect_equal(gradients(layer, x), expected)

    def longer(t: Tensor) -> Tensor:
        return t if t.is_floating_point() else t + 100

    with pytest.raises(RuntimeError, match="expected"):
        loss(longer).backward()


# ---- weights and inputs that change between forward and backward ----


def free_storage(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


def set_data(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def change(t: Tensor) -> None:
        t.data = make(t)

    return change


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "storage freed": free_storage,
    "storage cut": lambda t: t.untyped_storage().resize_(t.untyped_storage().nbytes() - 4),
    "empty": set_data(lambda t: torch.empty(0)),
    "no rows": set_data(lambda t: torch.empty(0, t.shape[-1])),
    "small": set_data(lambda t: torch.zeros(2, 2)),
    "half": set_data(lambda t: t.detach().half()),
    "double": set_data(lambda t: t.detach().double()),
    "transposed": set_data(lambda t: torch.zeros(t.shape[::-1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensors_are_refused(change: str, layer: torch.nn.Module, way: str) -> None:
    """Each tensor of a layer, and x, which a kernel would otherwise read beyond its end."""
    for name in ["x", *(name for name, _ in layer.named_parameters())]:
        x = sample(layer)
        loss = forward(layer, x)
        tensor = x if name == "x" else getattr(layer, name)
        before = tensor.detach().clone()
        CHANGES[change](tensor)
        if tensor.shape == before.shape and change == "transposed":
            tensor.data = before  # tensors that are vectors or square cannot change in this way
            continue
        with pytest.raises(RuntimeError, match="rnnfast::"):
            loss.backward()
        tensor.data = before


def test_errors_name_the_tensor(way: str) -> None:
    layer = LAYERS["lstm"]()
    loss = forward(layer, sample(layer))
    free_storage(layer.weight_hh_l0)
    with pytest.raises(RuntimeError, match=r"storage of w_hh has 0 bytes, .*freed"):
        loss.backward()


def test_storage_that_is_filled_again_elsewhere(layer: torch.nn.Module, way: str) -> None:
    """FSDP2 frees weights and gathers them again around forward and backward."""
    x = sample(layer)
    forward(layer, x).backward()
    expected = gradients(layer, x)
    loss = forward(layer, x)
    kept = [p.detach().clone() for p in layer.parameters()]
    for p in layer.parameters():
        free_storage(p)
    others = [torch.full((4096,), 3.0) for _ in range(20)]  # may take the memory that was freed
    for p, values in zip(layer.parameters(), kept, strict=True):
        p.untyped_storage().resize_(values.untyped_storage().nbytes())
        with torch.no_grad():
            p.data.copy_(values)
    loss.backward()
    expect_equal(gradients(layer, x), expected)
    assert len(others) == 20


@pytest.mark.parametrize("move", [torch.clone, other_strides, gaps, elsewhere])
def test_data_exchanged_for_the_same_values(
    move: Callable[[Tensor], Tensor], layer: torch.nn.Module, way: str
) -> None:
    """ZeRO-3 puts gathered weights into `.data`, with any strides."""
    x = sample(layer)
    forward(layer, x).backward()
    expected = gradients(layer, x)
    loss = forward(layer, x)
    for t in [x, *layer.parameters()]:
        t.data = move(t.detach())
    loss.backward()
    expect_equal(gradients(layer, x), expected)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_new_values_count(name: str, way: str) -> None:
    """As in torch.nn.Linear, the gradient of x uses the present values of the weights."""
    layer = LAYERS[name]()
    x = torch.randn(1, 1, I, requires_grad=True)
    output, _ = layer(x)
    layer.weight_ih_l0.data = torch.randn_like(layer.weight_ih_l0)
    output.sum().backward()
    torch.testing.assert_close(x.grad.view(-1), layer.bias_ih_l0.grad @ layer.weight_ih_l0.detach())


def test_second_derivative_of_freed_weights(layer: torch.nn.Module, way: str) -> None:
    x = sample(layer)
    (grad,) = torch.autograd.grad(forward(layer, x), x, create_graph=True)
    free_storage(layer.weight_hh_l0)
    with pytest.raises(RuntimeError, match="storage of w_hh has been freed"):
        grad.pow(2).sum().backward()


# ---- memory that is gone before the forward ----


def call_layer(kind: type[torch.nn.Module], tensor: str, **options: Any) -> None:
    module = kind(I, H, **options)
    x, h = torch.randn(T, B, I), torch.randn(1, B, H)
    hx = (h, torch.randn(1, B, H)) if kind is rnnfast.LSTM else h
    gone = {"weight": module.weight_hh_l0, "x": x, "state": h}[tensor]
    free_storage(gone)
    module(x, hx)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", [None, "fused", "aten", "reference"])
@pytest.mark.parametrize("tensor", ["weight", "x", "state"])
@pytest.mark.parametrize("kind", [rnnfast.RNN, rnnfast.GRU, rnnfast.LSTM])
def test_forward_refuses_freed_memory(
    kind: type[torch.nn.Module], tensor: str, name: str | None, grad: bool
) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="freed"):
        call_layer(kind, tensor, backend=name)


@pytest.mark.parametrize("tensor", ["weight", "x", "state"])
def test_autocast_refuses_freed_memory(tensor: str) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="freed"):
        call_layer(rnnfast.LSTM, tensor)


@pytest.mark.parametrize("tensor", ["weight", "x", "state"])
@pytest.mark.parametrize("kind", [rnnfast.RNNCell, rnnfast.GRUCell, rnnfast.LSTMCell])
def test_cells_refuse_freed_memory(kind: type[torch.nn.Module], tensor: str) -> None:
    cell = kind(I, H)
    x, h = torch.randn(B, I), torch.randn(B, H)
    free_storage({"weight": cell.weight_ih, "x": x, "state": h}[tensor])
    with pytest.raises(RuntimeError, match="freed"):
        cell(x, (h, torch.randn(B, H)) if kind is rnnfast.LSTMCell else h)


@pytest.mark.parametrize("tensor", ["weight", "data", "state"])
@pytest.mark.parametrize("kind", [rnnfast.RNN, rnnfast.GRU, rnnfast.LSTM])
def test_packed_sequences_refuse_freed_memory(kind: type[torch.nn.Module], tensor: str) -> None:
    layer = kind(I, H)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.randn(T, B, I), torch.tensor([2, 5, 3]), enforce_sorted=False
    )
    h = torch.randn(1, B, H)
    free_storage({"weight": layer.weight_hh_l0, "data": packed.data, "state": h}[tensor])
    with pytest.raises(RuntimeError, match="freed"):
        layer(packed, (h, torch.randn(1, B, H)) if kind is rnnfast.LSTM else h)


@pytest.mark.parametrize("tensor", ["weight", "tokens"])
def test_tokens_refuse_freed_memory(tensor: str) -> None:
    layer, tokens = rnnfast.LSTM(I, H, tokens=True), torch.randint(I, (T, B))
    free_storage({"weight": layer.weight_hh_l0, "tokens": tokens}[tensor])
    with pytest.raises(RuntimeError, match="freed"):
        layer(tokens)


@pytest.mark.parametrize("position", range(5))
def test_operators_refuse_freed_memory(position: int) -> None:
    tensors = [torch.randn(T, B, I), torch.randn(B, H), torch.randn(B, H)]
    tensors += [torch.randn(4 * H, I), torch.randn(4 * H, H)]
    free_storage(tensors[position])
    with pytest.raises(RuntimeError, match="freed"):
        torch.ops.rnnfast.lstm(*tensors, None, None, False, False)


def test_a_view_of_what_is_left() -> None:
    """Memory that holds all elements of a view suffices, wherever the storage ends."""
    layer = rnnfast.GRU(I, H, backend="fused")
    whole = torch.randn(T + 2, B, I)
    x = whole[1 : T + 1]
    expected, _ = layer(x.clone())
    x.untyped_storage().resize_((T + 1) * B * I * 4)
    assert torch.equal(layer(x)[0], expected)
    x.untyped_storage().resize_((T + 1) * B * I * 4 - 1)
    with pytest.raises(RuntimeError, match="freed"):
        layer(x)


def cut(t: Tensor) -> None:
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)


@pytest.mark.parametrize("shrink", [free_storage, cut])
@pytest.mark.parametrize("name", [None, "aten", "reference"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_lengths_and_resets_without_memory(
    shrink: Callable[[Tensor], None], name: str | None, grad: bool
) -> None:
    layer, x = rnnfast.LSTM(I, H, backend=name), torch.randn(T, B, I)
    lengths, reset = torch.tensor([2, 5, 3]), torch.zeros(T, B, dtype=torch.bool)
    shrink(lengths)
    shrink(reset)
    with torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match="storage of the lengths tensor"):
            layer(x, lengths=lengths)
        with pytest.raises(RuntimeError, match="storage of the reset tensor"):
            layer(x, reset=reset)


@pytest.mark.parametrize("shrink", [free_storage, cut])
@pytest.mark.parametrize("field", ["data", "batch_sizes", "sorted_indices", "unsorted_indices"])
def test_packed_fields_without_memory(shrink: Callable[[Tensor], None], field: str) -> None:
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.randn(T, B, I), torch.tensor([2, 5, 3]), enforce_sorted=False
    )
    shrink(getattr(packed, field))
    with pytest.raises(RuntimeError, match=f"storage of the {field} tensor"):
        rnnfast.GRU(I, H)(packed)


@pytest.mark.parametrize("shrink", [free_storage, cut])
def test_embeddings_and_single_inputs_without_memory(shrink: Callable[[Tensor], None]) -> None:
    embedding, layer = torch.nn.Embedding(50, I), rnnfast.LSTM(I, H)
    shrink(embedding.weight)
    with pytest.raises(RuntimeError, match="storage of the embedding tensor"):
        layer(torch.randint(50, (T, B)), embedding=embedding)
    single = torch.randn(T, I)
    shrink(single)
    with pytest.raises(RuntimeError, match="storage of the input tensor"):
        layer(single)
    step = torch.randn(I)
    shrink(step)
    with pytest.raises(RuntimeError, match="storage of the input tensor"):
        rnnfast.GRUCell(I, H)(step)
