"""Vanishing and exploding gradients in recurrent layers.

The derivative of the state h_T with respect to h_t is a product of T - t Jacobians. Its norm
shrinks or grows geometrically with T - t: see Hochreiter, "Untersuchungen zu dynamischen neuronalen
Netzen", diploma thesis, TU München, 1991, and Bengio, Simard, Frasconi, "Learning long-term
dependencies with gradient descent is difficult", IEEE Transactions on Neural Networks 5(2), 1994.

In the LSTM, c' = f * c + i * g carries the gradient along c, and the forget gate f is its only
factor. This is the constant error carousel of Hochreiter, Schmidhuber, Neural Computation 9(8),
1997, where f is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnfast.explain.record import record_gates
from rnnfast.modules import GRU, LSTM, RNN

Norms = dict[str, Tensor]


def gradient_norms(layer: RNN | GRU | LSTM, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Norms:
    """The norms of d loss / d h_t, and for LSTM of d loss / d c_t, by the distance T - t.

    These are total derivatives. The one with respect to c_t covers both paths from c_t to the loss,
    through c_{t+1} and through h_t = o_t * tanh(c_t). The layer runs step by step, and its kernels
    compute the gradients.

    Args:
        layer: A single layer in one direction without projection.
        x: One sequence (T, I). The initial state is zeros.
        loss: A function that maps the last state h_T (H) to a single number.

    Returns:
        The norms (T) for each state: "h", and "c" for LSTM. Element k belongs to h_{T-k}.

    Raises:
        ValueError: The layer has several layers, two directions or a projection, or ``x`` has
            another shape.
    """
    if layer.num_layers > 1 or layer.bidirectional or layer.proj_size:
        raise ValueError(
            f"gradient_norms needs a single layer in one direction without projection, got {layer}"
        )
    if x.dim() != 2 or x.shape[1] != layer.input_size or len(x) == 0:
        shape = tuple(x.shape)
        raise ValueError(f"x: expected shape (T, input_size = {layer.input_size}), got {shape}")

    hiddens, cells = [], []
    with torch.enable_grad(), record_gates(layer) as record:
        h = x.new_zeros(1, layer.hidden_size, requires_grad=True)  # the root of the graph
        c = torch.zeros_like(h)
        for step in x.unsqueeze(1):
            if isinstance(layer, LSTM):
                _, (h, c) = layer(step, (h, c))
                cells.append(c)
            else:
                _, h = layer(step, h)
            hiddens.append(h)
        found = torch.autograd.grad(
            loss(h.squeeze(0)), hiddens + cells, allow_unused=True, materialize_grads=True
        )
    by_h = torch.cat(found[: len(x)])
    norms = {"h": by_h.norm(dim=1).flip(0)}
    if isinstance(layer, LSTM):
        gates = record["l0"]
        h_by_c = gates["output"] * (1 - gates["cell_state"].tanh().square())
        by_c = torch.cat(found[len(x) :]) + by_h * h_by_c
        norms["c"] = by_c.norm(dim=1).flip(0)
    return norms


def compare_gradients(
    length: int = 100,
    *,
    input_size: int = 8,
    hidden_size: int = 32,
    seed: int = 0,
    scale: float = 1.0,
    forget_bias: float = 1.0,
) -> Norms:
    """`gradient_norms` of an untrained Elman layer, GRU and LSTM on the same random sequence.

    The norms show how fast the gradient of each layer vanishes or explodes. The loss is the dot
    product of the last state with a random vector of norm 1, so the gradient with respect to h_T
    has norm 1. Everything is computed in float64, because a gradient may become smaller than the
    smallest float32.

    Args:
        length: T.
        input_size: I.
        hidden_size: H.
        seed: The seed of the weights, the inputs x ~ N(0, 1) and the loss.
        scale: A factor for torch's initial weights, which are uniform within 1 / sqrt(H).
        forget_bias: The bias of the LSTM's forget gates. Gers, Schmidhuber, Cummins, Neural
            Computation 12(10), 2000, start with a positive bias, so that the untrained LSTM
            forgets little.

    Returns:
        The norms (T) by name: "Elman h", "GRU h", "LSTM h", "LSTM c".

    Raises:
        ValueError: A size is not positive.
    """
    if min(length, input_size, hidden_size) < 1:
        sizes = f"length {length}, input_size {input_size}, hidden_size {hidden_size}"
        raise ValueError(f"sizes should be positive, got {sizes}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        x = torch.randn(length, input_size, **options)
        direction = F.normalize(torch.randn(hidden_size, **options), dim=0)
        layers = {
            label: kind(input_size, hidden_size, **options)
            for label, kind in (("Elman", RNN), ("GRU", GRU), ("LSTM", LSTM))
        }
    norms = {}
    for label, layer in layers.items():
        with torch.no_grad():
            for weight in layer.parameters():
                weight.mul_(scale)
            if isinstance(layer, LSTM):
                for name, bias in (("bias_ih_l0", forget_bias), ("bias_hh_l0", 0.0)):
                    layer.get_parameter(name)[hidden_size : 2 * hidden_size] = bias
        for state, values in gradient_norms(layer, x, direction.dot).items():
            norms[f"{label} {state}"] = values
    return norms
