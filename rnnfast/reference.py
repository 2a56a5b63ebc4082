"""Every cell in plain PyTorch: the specification, the fallback and the oracle of the tests.

Nothing here is fast. It is differentiable to any order and works under ``vmap``, ``torch.func``
and forward-mode AD, because it uses only out-of-place torch operations.

Sizes: T time, B batch, I input, H hidden, P of a projected h, G gate blocks of a cell. Weights have
torch.nn's layout and gate order: ``w_ih`` (G*H, I), ``w_hh`` (G*H, H), ``b_ih`` and ``b_hh`` (G*H).

To add a cell, write its step function and its row in `CELLS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

States = tuple[Tensor, ...]


class Cell(NamedTuple):
    """One row of the table of cells."""

    name: str
    """The name of the operator ``rnnfast::<name>``."""
    gates: int
    """G, the number of H-sized blocks in the weights."""
    states: int
    """How many tensors of states pass from step to step: 1 for (h), 2 for (h, c)."""
    saved: int
    """K, the number of H-sized blocks the fused forward keeps for its backward."""
    aten: str
    """torch's own sequence operator; its single step is called ``<aten>_cell``. Empty if there is
    none."""
    step: Callable[..., States]
    """``step(gates_x, gates_h, *states[, parameters]) -> states``: one time step. ``gates_x`` =
    W_ih x + b_ih and ``gates_h`` = W_hh h + b_hh are (B, G*H), h is (B, H) and c (B, C*H)."""
    cells: int = 0
    """C: how many states c has, side by side. 1 for an LSTM."""
    parameters: int = 0
    """N: how many learnable vectors (H) the step takes, as a tensor (N, H)."""
    projects: bool = False
    """Whether h may be projected."""
    recurrent: bool = True
    """Whether the cell has W_hh. Without it w_hh is (G*H, 0), and gates_h are zeros."""
    recomputes: bool = True
    """Whether the fused backward can do without what the forward saves."""
    compile: Callable[[torch.dtype], str | None] | None = None
    """Of a user's cell: compiles the kernels for tensors of a dtype, unless that has been done, and
    returns None, or why there are none."""


def elman_tanh(gates_x: Tensor, gates_h: Tensor, h: Tensor) -> States:
    """Elman cell: h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Elman, "Finding structure in time", Cognitive Science 14, 1990; torch.nn.RNN.
    """
    return (torch.tanh(gates_x + gates_h),)


def elman_relu(gates_x: Tensor, gates_h: Tensor, h: Tensor) -> States:
    """Elman cell: h' = max(0, W_ih x + b_ih + W_hh h + b_hh).

    Le, Jaitly, Hinton, arXiv:1504.00941; torch.nn.RNN with ``nonlinearity="relu"``.
    """
    return (torch.relu(gates_x + gates_h),)


def gru(gates_x: Tensor, gates_h: Tensor, h: Tensor) -> States:
    """Gated recurrent unit, gate order r, z, n. The index names the block of rows of W and b.

    r  = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z  = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n  = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    h' = (1 - z) * n + z * h

    Cho et al., arXiv:1406.1078, with the reset gate applied after the product as in torch.nn.GRU.
    """
    x_r, x_z, x_n = gates_x.chunk(3, dim=-1)
    h_r, h_z, h_n = gates_h.chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h,)


def lstm(gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor) -> States:
    """Long short-term memory, gate order i, f, g, o. The index names the block of rows of W and b.

    i  = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
    f  = sigmoid(W_if x + b_if + W_hf h + b_hf)
    g  = tanh(W_ig x + b_ig + W_hg h + b_hg)
    o  = sigmoid(W_io x + b_io + W_ho h + b_ho)
    c' = f * c + i * g
    h' = o * tanh(c')

    Hochreiter, Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997, with the
    forget gate of Gers, Schmidhuber, Cummins, Neural Computation 12(10), 2000; torch.nn.LSTM.
    """
    i, f, g, o = (gates_x + gates_h).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("elman_tanh", gates=1, states=1, saved=0, aten="rnn_tanh", step=elman_tanh),
        Cell("elman_relu", gates=1, states=1, saved=0, aten="rnn_relu", step=elman_relu),
        Cell("gru", gates=3, states=1, saved=4, aten="gru", step=gru),
        Cell("lstm", gates=4, states=2, saved=4, aten="lstm", step=lstm, cells=1, projects=True),
    )
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums, gates and cell states of tensors of ``dtype`` are computed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast_enabled(device_type: str) -> bool:
    """Whether ``torch.autocast`` is on for a type of device that this package has kernels for."""
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


class LayerInputs(NamedTuple):
    """What a layer takes in one direction, for a whole sequence."""

    x: Tensor
    """Input (T, B, I); T may be 0. Or packed as in a PackedSequence: (N, I), the rows of all steps
    one after the other, of each step only the sequences that are so long. Or tokens: int64 with
    I = 1, each the number of a row of ``w_ih``."""
    states: States
    """Initial states: h (B, H), or (B, P) with ``w_hr``, and c (B, C*H)."""
    w_ih: Tensor
    """(G*H, I); of tokens a table (V, G*H), whose rows stand for W_ih x."""
    w_hh: Tensor
    """(G*H, H); with ``w_hr`` (G*H, P)."""
    b_ih: Tensor | None
    """(G*H), or None."""
    b_hh: Tensor | None
    """(G*H), or None; both biases or neither."""
    reverse: bool
    """Whether time runs from the end of a sequence down to 0. ``y[t]`` stays at its own t."""
    lengths: Tensor | None = None
    """Integers (B) from 0 to T, or None: how many steps each sequence has. Packed x needs them,
    falling."""
    reset: Tensor | None = None
    """Booleans (T, B), or None: where ``reset[t]`` is true, no state passes between t - 1 and
    t."""
    w_hr: Tensor | None = None
    """(P, H), or None: what projects the h that an LSTM puts out, h = W_hr (o * tanh(c)); Sak,
    Senior, Beaufays, arXiv:1402.1128; ``proj_size`` of torch.nn.LSTM."""
    parameters: Tensor | None = None
    """(N, H), or None: the learnable vectors of a user's cell."""


class LayerOutputs(NamedTuple):
    """What a layer returns in one direction. All are in the dtype of the states but ``cells``."""

    y: Tensor
    """The h of every step (T, B, H), or (T, B, P): zeros beyond a sequence's end, and packed where
    x is."""
    states: States
    """The final states, shaped like the initial ones."""
    cells: Tensor | None
    """The c of every step (T, B, C*H), laid out like ``y``, in the dtype of sums. None where the
    cell has no c."""


def layer(cell: Cell, inputs: LayerInputs) -> LayerOutputs:
    """Runs a whole sequence of one layer in one direction.

    As in the kernels, half types are computed in float32 and h is rounded after every step.

    Args:
        cell: A row of `CELLS`.
        inputs: The input, the initial states and the weights.

    Returns:
        The output, the final states and, if the cell has a c, the c of every step.
    """
    x, states, w_ih, w_hh, b_ih, b_hh, reverse, lengths, reset, w_hr, parameters = inputs
    if autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return layer(cell, inputs)
    if x.dim() == 2:
        return _packed_layer(cell, inputs)

    dtype, wide = states[0].dtype, compute_dtype(states[0].dtype)
    if lengths is not None:
        lengths = lengths.to(x.device)
        beyond = torch.arange(x.shape[0], device=x.device).unsqueeze(1) >= lengths
        x = x.masked_fill(beyond.unsqueeze(2), 0)  # a NaN there would reach gradients
    if x.dtype is torch.int64:
        gates_x = F.embedding(x.squeeze(2), w_ih.to(wide))
        gates_x = gates_x if b_ih is None else gates_x + b_ih.to(wide)
    else:
        gates_x = F.linear(x.to(wide), w_ih.to(wide), None if b_ih is None else b_ih.to(wide))
    # converted once: the gradient of a conversion is rounded, and so would be the sum of all steps'
    w_hh, b_hh = w_hh.to(wide), None if b_hh is None else b_hh.to(wide)
    w_hr = None if w_hr is None else w_hr.to(wide)
    more = () if parameters is None else (parameters.to(wide),)
    current = tuple(state.to(wide) for state in states)
    y, cells = [], []
    times = range(x.shape[0])
    for t in reversed(times) if reverse else times:
        before = current
        if reset is not None and (border := t + 1 if reverse else t) < x.shape[0]:
            cut = reset[border] if lengths is None else reset[border] & (border < lengths)
            before = tuple(state.masked_fill(cut.unsqueeze(1), 0) for state in current)
        if cell.recurrent:
            gates_h = F.linear(before[0], w_hh, b_hh)
        else:
            gates_h = torch.zeros_like(gates_x[t])
        h, *others = cell.step(gates_x[t], gates_h, *before, *more)
        h = h if w_hr is None else F.linear(h, w_hr)
        following = (_rounded(h, dtype), *others)
        if lengths is None:
            current = outputs = following
        else:
            ended = beyond[t].unsqueeze(1)
            outputs = tuple(state.masked_fill(ended, 0) for state in following)
            pairs = zip(current, following, strict=True)
            current = tuple(torch.where(ended, old, new) for old, new in pairs)
        y.append(outputs[0].to(dtype))
        cells.append(outputs[-1])

    def in_time(steps: list[Tensor], state: Tensor) -> Tensor:
        if not steps:
            return state.new_empty((0, *state.shape))
        return torch.stack(steps[::-1] if reverse else steps)

    finals = tuple(state.to(dtype) for state in current)
    c = in_time(cells, current[1]) if cell.states > 1 else None
    return LayerOutputs(in_time(y, finals[0]), finals, c)


def _rounded(h: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of ``h`` rounded to ``dtype``, up to the sign of zeros. Its gradient is kept.

    The gradient of a conversion is rounded to ``dtype`` too. Over many steps these errors add up.
    """
    if h.dtype is dtype:
        return h
    rounded = h.to(dtype).to(h.dtype)
    # the difference of two infinities is NaN
    return h + torch.where(h == rounded, 0, rounded - h).detach()


def _packed_layer(cell: Cell, inputs: LayerInputs) -> LayerOutputs:
    """`layer` on packed x, by way of padding."""
    x, lengths = inputs.x, inputs.lengths
    assert lengths is not None
    lengths = lengths.to(x.device)
    steps, batch = int(lengths[0]), lengths.shape[0]
    running = torch.arange(steps, device=x.device).unsqueeze(1) < lengths
    rows = running.flatten().nonzero().squeeze(1)
    padded = x.new_zeros((steps * batch, x.shape[1])).index_copy(0, rows, x)
    padded = padded.unflatten(0, (steps, batch))
    y, finals, cells = layer(cell, inputs._replace(x=padded, lengths=lengths, reset=None))
    cells = None if cells is None else cells.flatten(0, 1).index_select(0, rows)
    return LayerOutputs(y.flatten(0, 1).index_select(0, rows), finals, cells)
