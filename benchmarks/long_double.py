"""Every cell and its gradients in NumPy's long double: the oracle for errors in float64.

torch has no type beyond float64. The formulas are those of rnnfast/reference.py; here each cell has
its backward, too, because NumPy does not differentiate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.longdouble]]
States = tuple[Array, ...]


def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


class Elman:
    """`step` takes W_ih x + b_ih and W_hh h + b_hh and the states, and returns the next states.

    `backward` takes the same, the next states and their gradients. It returns the gradients of the
    two sums, and those of the states other than what passes through W_hh.
    """

    states = 1

    def __init__(self, relu: bool) -> None:
        self.relu = relu

    def step(self, gates_x: Array, gates_h: Array, h: Array) -> States:
        a = gates_x + gates_h
        return (np.maximum(a, 0) if self.relu else np.tanh(a),)

    def backward(
        self, gates_x: Array, gates_h: Array, states: States, following: States, grads: States
    ) -> tuple[Array, Array, States]:
        (h,) = following
        d_gates = grads[0] * ((h > 0) if self.relu else 1 - h * h)
        return d_gates, d_gates, (np.zeros_like(h),)


class GRU:
    """See `Elman`."""

    states = 1

    def gates(self, gates_x: Array, gates_h: Array) -> tuple[Array, Array, Array, Array]:
        x_r, x_z, x_n = np.split(gates_x, 3, -1)
        h_r, h_z, h_n = np.split(gates_h, 3, -1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        return r, z, np.tanh(x_n + r * h_n), h_n

    def step(self, gates_x: Array, gates_h: Array, h: Array) -> States:
        _, z, n, _ = self.gates(gates_x, gates_h)
        return ((1 - z) * n + z * h,)

    def backward(
        self, gates_x: Array, gates_h: Array, states: States, following: States, grads: States
    ) -> tuple[Array, Array, States]:
        r, z, n, h_n = self.gates(gates_x, gates_h)
        (d_h,) = grads
        d_n = d_h * (1 - z) * (1 - n * n)
        d_z = d_h * (states[0] - n) * z * (1 - z)
        d_r = d_n * h_n * r * (1 - r)
        d_x, d_gates_h = np.concatenate([d_r, d_z, d_n], -1), [d_r, d_z, d_n * r]
        return d_x, np.concatenate(d_gates_h, -1), (d_h * z,)


class LSTM:
    """See `Elman`."""

    states = 2

    def gates(self, gates_x: Array, gates_h: Array) -> tuple[Array, Array, Array, Array]:
        i, f, g, o = np.split(gates_x + gates_h, 4, -1)
        return sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)

    def step(self, gates_x: Array, gates_h: Array, h: Array, c: Array) -> States:
        i, f, g, o = self.gates(gates_x, gates_h)
        c = f * c + i * g
        return o * np.tanh(c), c

    def backward(
        self, gates_x: Array, gates_h: Array, states: States, following: States, grads: States
    ) -> tuple[Array, Array, States]:
        i, f, g, o = self.gates(gates_x, gates_h)
        c, next_c = states[1], np.tanh(following[1])
        d_h, d_c = grads
        d_c = d_c + d_h * o * (1 - next_c * next_c)
        parts = [d_c * g * i * (1 - i), d_c * c * f * (1 - f), d_c * i * (1 - g * g)]
        d_gates = np.concatenate([*parts, d_h * next_c * o * (1 - o)], -1)
        return d_gates, d_gates, (np.zeros_like(d_h), d_c * f)


CELLS = {
    "elman_tanh": Elman(relu=False),
    "elman_relu": Elman(relu=True),
    "gru": GRU(),
    "lstm": LSTM(),
}


def oracle(name: str, inputs: list[Array], grads: list[Array]) -> list[Array]:
    """Runs a layer and its backward.

    Args:
        name: A key of `CELLS`.
        inputs: x (T, B, I), the states (B, H), w_ih, w_hh, b_ih and b_hh.
        grads: The gradients of y (T, B, H) and of the final states.

    Returns:
        y, the final states, and the gradients of the inputs.
    """
    cell = CELLS[name]
    x, first = inputs[0], tuple(inputs[1 : 1 + cell.states])
    w_ih, w_hh, b_ih, b_hh = inputs[1 + cell.states :]
    gates_x, gates_h, states = x @ w_ih.T + b_ih, [], [first]
    for t in range(len(x)):
        gates_h.append(states[t][0] @ w_hh.T + b_hh)
        states.append(cell.step(gates_x[t], gates_h[t], *states[t]))
    d_gates_x, d_gates_h, d_states = (
        np.empty_like(gates_x),
        np.empty_like(gates_x),
        tuple(grads[1:]),
    )
    for t in reversed(range(len(x))):
        given = (d_states[0] + grads[0][t], *d_states[1:])
        d_gates_x[t], d_gates_h[t], passed = cell.backward(
            gates_x[t], gates_h[t], states[t], states[t + 1], given
        )
        d_states = (passed[0] + d_gates_h[t] @ w_hh, *passed[1:])
    rows_x, rows_h = (d.reshape(-1, d.shape[-1]) for d in (d_gates_x, d_gates_h))
    before = np.stack([state[0] for state in states[:-1]]).reshape(len(rows_h), -1)
    d_weights = [rows_x.T @ x.reshape(len(rows_x), -1), rows_h.T @ before]
    y = np.stack([state[0] for state in states[1:]])
    d_x = d_gates_x @ w_ih
    return [y, *states[-1], d_x, *d_states, *d_weights, rows_x.sum(0), rows_h.sum(0)]
