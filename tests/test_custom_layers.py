"""Layers of cells that users write: results and gradients, against plain loops in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SHAPES, dtype_name
from custom_layers import (
    CELLS,
    Written,
    as_tuple,
    check_found,
    check_layer,
    double,
    found,
    inputs_of,
    loop,
    loss_of,
)
from native import CAPABILITIES
from targets import running_on
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

DOUBLE = torch.float64
SIZES = [(1, 1, 1, 1), (3, 2, 5, 3), (5, 1, 3, 16), (4, 3, 7, 17), (2, 33, 4, 40)]
SOME = ["slstm", "peephole", "gru", "unchanged"]
cells = pytest.mark.parametrize("name", CELLS)
some_cells = pytest.mark.parametrize("name", SOME)


def as_id(value: object) -> str | None:
    return "x".join(map(str, value)) if isinstance(value, tuple) else dtype_name(value)


@cells
@pytest.mark.parametrize("sizes", SIZES, ids=as_id)
def test_results_and_gradients(name: str, sizes: tuple[int, int, int, int]) -> None:
    check_layer(CELLS[name], sizes)


HALVES = (torch.bfloat16, torch.float16)
CALLS = [
    (name, sizes, dtype)
    for name in CELLS
    for sizes in SHAPES
    for dtype in (DOUBLE, torch.float32, *HALVES)
    # in half types rounding moves values across kinks, or adds up
    if 0 not in sizes and not (dtype in HALVES and (name == "clamped" or sizes[0] > 20))
]


@pytest.mark.full
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("name", "sizes", "dtype"), CALLS, ids=as_id)
def test_more_results_and_gradients(
    name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, recompute: bool
) -> None:
    check_layer(CELLS[name], sizes, dtype, recompute=recompute)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("slstm", torch.float32),
        pytest.param("peephole", torch.float32, marks=pytest.mark.full),
        ("slstm", torch.bfloat16),
        ("ligru", torch.float16),
    ],
    ids=as_id,
)
@pytest.mark.parametrize("sizes", [(3, 2, 5, 3), (4, 3, 7, 17), (2, 33, 4, 40)], ids=as_id)
def test_dtypes(name: str, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    check_layer(CELLS[name], sizes, dtype)


RESET = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]]) > 0
OPTIONS: dict[str, dict[str, Any]] = {
    "no bias": {"bias": False},
    "layers": {"num_layers": 3},
    "directions": {"num_layers": 2, "bidirectional": True, "recompute": True},
    "recompute": {"recompute": True},
    "lengths": {"lengths": [5, 0, 3, 1], "num_layers": 2, "bidirectional": True},
    "reset": {"reset": RESET, "bidirectional": True},
    "both": {"reset": RESET, "lengths": [3, 5, 2, 4], "bidirectional": True, "recompute": True},
}


@some_cells
@pytest.mark.parametrize("option", OPTIONS)
def test_options(name: str, option: str) -> None:
    check_layer(CELLS[name], (5, 4, 3, 17), **OPTIONS[option])


@some_cells
def test_single_sequences(name: str) -> None:
    layer = CELLS[name].layer(3, 5, dtype=DOUBLE, bidirectional=True)
    x, hx = inputs_of(CELLS[name], 4, 1, 3, 5, rows=2)
    output, states = layer(x, hx)
    one = tuple(state[:, 0] for state in as_tuple(hx))
    found_output, found_states = layer(x[:, 0], one if len(one) > 1 else one[0])
    assert found_output.equal(output[:, 0])
    for state, expected in zip(as_tuple(found_states), as_tuple(states), strict=True):
        assert state.equal(expected[:, 0])


@some_cells
def test_batch_first(name: str) -> None:
    layer = CELLS[name].layer(3, 5, dtype=DOUBLE, batch_first=True)
    x, hx = inputs_of(CELLS[name], 4, 2, 3, 5)
    output, states = layer(x.transpose(0, 1), hx)
    expected, finals = loop(CELLS[name], layer, x, as_tuple(hx))
    torch.testing.assert_close(output, expected.transpose(0, 1))
    torch.testing.assert_close(as_tuple(states), finals)


@some_cells
def test_packed_sequences(name: str) -> None:
    lengths = [2, 5, 1, 3]
    layer = CELLS[name].layer(3, 5, dtype=DOUBLE, num_layers=2, bidirectional=True)
    x, hx = inputs_of(CELLS[name], 5, 4, 3, 5, rows=4)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, states = layer(packed, hx)
    expected = loop(CELLS[name], layer, x, as_tuple(hx), lengths)
    inputs = [x, *as_tuple(hx), *layer.parameters()]
    actual = found((pad_packed_sequence(output)[0], states), inputs)
    check_found(
        actual, found(expected, inputs), DOUBLE, [f"input {i}" for i in range(40)][: len(inputs)]
    )


@some_cells
def test_missing_states_are_zeros(name: str) -> None:
    layer = CELLS[name].layer(3, 5, dtype=DOUBLE, num_layers=2)
    x, hx = inputs_of(CELLS[name], 4, 2, 3, 5, rows=2)
    zeros = tuple(torch.zeros_like(state) for state in as_tuple(hx))
    torch.testing.assert_close(
        layer(x), layer(x, zeros if len(zeros) > 1 else zeros[0]), rtol=0, atol=0
    )


@some_cells
def test_inputs_that_are_not_contiguous(name: str) -> None:
    written = CELLS[name]
    layer = written.layer(3, 5, dtype=DOUBLE)
    x, hx = inputs_of(written, 4, 3, 6, 10)
    x = x[..., ::2]
    states = tuple(
        state[..., ::2].transpose(0, 1).contiguous().transpose(0, 1) for state in as_tuple(hx)
    )
    with torch.no_grad():
        layer.weight_hh_l0.set_(layer.weight_hh_l0.t().contiguous().t())
    inputs = [x, *states, *layer.parameters()]
    actual = found(layer(x, states if len(states) > 1 else states[0]), inputs)
    expected = found(loop(written, layer, x, states), inputs)
    check_found(actual, expected, DOUBLE, ["x", *written.state, *dict(layer.named_parameters())])


def test_tokens_are_one_hot_vectors() -> None:
    written = CELLS["slstm"]
    layer = written.layer(7, 5, dtype=DOUBLE, tokens=True)
    tokens = torch.randint(7, (4, 3))
    one_hot = F.one_hot(tokens, 7).double()
    _, hx = inputs_of(written, 4, 3, 7, 5)
    inputs = [*as_tuple(hx), *layer.parameters()]
    expected = found(loop(written, layer, one_hot, as_tuple(hx)), inputs)
    names = [*written.state, *dict(layer.named_parameters())]
    check_found(found(layer(tokens, hx), inputs), expected, DOUBLE, names)


def test_embeddings() -> None:
    layer, embedding = CELLS["peephole"].layer(3, 5, dtype=DOUBLE), nn.Embedding(7, 3, dtype=DOUBLE)
    tokens = torch.randint(7, (4, 3))
    inputs = [embedding.weight, *layer.parameters()]
    expected = found(layer(embedding(tokens)), inputs)
    actual = found(layer(tokens, embedding=embedding), inputs)
    check_found(actual, expected, DOUBLE, ["table", *dict(layer.named_parameters())])


@some_cells
def test_dropout_between_layers(name: str) -> None:
    written = CELLS[name]
    layer = written.layer(3, 5, dtype=DOUBLE, num_layers=2, dropout=0.5)
    first, second = written.layer(3, 5, dtype=DOUBLE), written.layer(5, 5, dtype=DOUBLE)
    state = layer.state_dict()
    first.load_state_dict({k: v for k, v in state.items() if k.endswith("0")})
    second.load_state_dict({k[:-1] + "0": v for k, v in state.items() if k.endswith("1")})
    x, _ = inputs_of(written, 4, 2, 3, 5)
    torch.manual_seed(3)
    output, _ = layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(output, second(F.dropout(first(x)[0], 0.5))[0])
    torch.testing.assert_close(layer.eval()(x)[0], second(first(x)[0])[0])


@cells
def test_no_sequences_and_no_steps(name: str) -> None:
    layer = CELLS[name].layer(3, 5, dtype=DOUBLE)
    output, states = layer(torch.randn(4, 0, 3, dtype=DOUBLE, requires_grad=True))
    assert output.shape == (4, 0, 5)
    assert [state.shape for state in as_tuple(states)] == [(1, 0, 5)] * len(CELLS[name].state)
    loss_of((output, states)).backward()
    assert all(not weight.grad.any() for weight in layer.parameters())
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        layer(torch.randn(0, 2, 3, dtype=DOUBLE))


def test_gradients_of_what_is_not_used_are_zero() -> None:
    layer = CELLS["inputs_alone"].layer(3, 5, dtype=DOUBLE)
    x, h = inputs_of(CELLS["inputs_alone"], 4, 2, 3, 5)
    layer(x, h)[0].sum().backward()
    assert not h.grad.any()
    assert not layer.weight_hh_l0.grad.any()
    assert not layer.bias_hh_l0.grad.any()
    assert layer.weight_ih_l0.grad.all()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("slstm", torch.float32), pytest.param("unchanged", DOUBLE, marks=pytest.mark.full)],
    ids=as_id,
)
def test_instruction_sets(name: str, dtype: torch.dtype, capability: str) -> None:
    with running_on(capability):
        check_layer(CELLS[name], (4, 3, 7, 17), dtype)
        check_layer(CELLS[name], (5, 1, 3, 16), dtype, num_layers=2)


@pytest.mark.full
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=as_id)
def test_half_types_on_instruction_sets(dtype: torch.dtype, capability: str) -> None:
    with running_on(capability):
        check_layer(CELLS["slstm"], (4, 3, 7, 17), dtype)


def gradients(written: Written, layer: nn.Module, x: Tensor, hx: Any) -> list[Tensor]:
    results = layer(x, hx)
    return [
        results[0],
        *as_tuple(results[1]),
        *torch.autograd.grad(loss_of(results), [x, *as_tuple(hx), *layer.parameters()]),
    ]


@some_cells
@pytest.mark.parametrize("sizes", [(12, 1, 30, 260), (20, 24, 16, 40), (3, 2, 3, 5)], ids=as_id)
def test_threads_change_no_bit(name: str, sizes: tuple[int, int, int, int], threads: None) -> None:
    written = CELLS[name]
    layer = written.layer(*sizes[2:], dtype=DOUBLE)
    x, hx = inputs_of(written, *sizes)
    torch.set_num_threads(1)
    expected = gradients(written, layer, x, hx)
    torch.set_num_threads(2)
    for one, other in zip(gradients(written, layer, x, hx), expected, strict=True):
        assert one.equal(other)


@some_cells
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    written = CELLS[name]
    layer = written.layer(6, 17, dtype=DOUBLE)
    x, hx = inputs_of(written, 5, 9, 6, 17)
    output, states = layer(x, hx)
    for rows in (slice(0, 4), slice(4, 9)):
        part = tuple(state[:, rows].contiguous() for state in as_tuple(hx))
        found_output, finals = layer(x[:, rows], part if len(part) > 1 else part[0])
        torch.testing.assert_close(found_output, output[:, rows], rtol=1e-13, atol=1e-14)
        for one, other in zip(as_tuple(finals), as_tuple(states), strict=True):
            torch.testing.assert_close(one, other[:, rows], rtol=1e-13, atol=1e-14)


@some_cells
def test_a_layer_that_is_used_twice(name: str) -> None:
    written = CELLS[name]
    layer = written.layer(5, 5, dtype=DOUBLE)
    x, hx = inputs_of(written, 4, 3, 5, 5)

    def twice(run: Any) -> Any:
        return run(*run(x, hx))

    def plain(x: Tensor, hx: Any) -> Any:
        output, states = loop(written, layer, x, as_tuple(hx))
        return output, states if len(states) > 1 else states[0]

    inputs = [x, *as_tuple(hx), *layer.parameters()]
    expected = found(twice(plain), inputs)
    results = twice(layer)
    names = ["x", *written.state, *dict(layer.named_parameters())]
    kept = torch.autograd.grad(loss_of(results), inputs, retain_graph=True)
    check_found(found(results, inputs), expected, DOUBLE, names)
    assert all(
        one.equal(other)
        for one, other in zip(kept, torch.autograd.grad(loss_of(twice(layer)), inputs), strict=True)
    )


def test_saved_tensor_hooks() -> None:
    written = CELLS["slstm"]
    layer = written.layer(3, 5, dtype=DOUBLE)
    x, hx = inputs_of(written, 4, 3, 3, 5)
    inputs = [x, *as_tuple(hx), *layer.parameters()]
    expected = found(layer(x, hx), inputs)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.numpy(force=True).copy(), torch.from_numpy
    ):
        results = layer(x, hx)
    for one, other in zip(found(results, inputs).grads, expected.grads, strict=True):
        assert one.equal(other)


def test_changed_parameters_are_noticed() -> None:
    layer = CELLS["peephole"].layer(3, 5, dtype=DOUBLE)
    x, hx = inputs_of(CELLS["peephole"], 4, 3, 3, 5)
    results = layer(x, hx)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(results).backward()
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.p_i_l0.add_(1)
    assert not changed(x, hx)[0].equal(layer(x, hx)[0])
    weights = double(dict(changed.named_parameters()))
    expected = loop(CELLS["peephole"], changed, x, as_tuple(hx), parameters=weights)
    torch.testing.assert_close(changed(x, hx), expected)
