"""The table of cases that the tests of kernels draw from, and the oracle they are compared with."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast import reference
from rnnfast.reference import CELLS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TORCH_CLASS: dict[str, tuple[type[torch.nn.Module], dict[str, str]]] = {
    "elman_tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "elman_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
    "gru": (torch.nn.GRU, {}),
    "lstm": (torch.nn.LSTM, {}),
}
"""The module of torch.nn that has a cell, and its options."""


class Case(NamedTuple):
    """One call of a cell's operator: sizes T, B, I, H and options."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    bias: bool = True
    reverse: bool = False
    layout: str = "contiguous"
    lengths: str = ""
    """Sequences of unequal length, "padded" or "packed"; else all of T steps."""
    resets: bool = False
    cells: bool = False
    """Whether the c of every step is looked at, too."""
    proj: int = 0
    """P, if h is projected."""
    tokens: bool = False
    """Whether x are tokens, I in number, and w_ih a table (I, G*H)."""

    @property
    def is_plain(self) -> bool:
        """Whether every device has kernels for it."""
        return not self.lengths and not self.resets and not self.proj and not self.tokens

    def __str__(self) -> str:
        options = [self.layout] * (self.layout != "contiguous") + [self.lengths] * bool(
            self.lengths
        )
        options += ["no_bias"] * (not self.bias) + ["reverse"] * self.reverse
        options += ["resets"] * self.resets + ["cells"] * self.cells
        options += [f"proj{self.proj}"] * bool(self.proj) + ["tokens"] * self.tokens
        return "-".join([self.cell, f"{self.T}x{self.B}x{self.I}x{self.H}", *options])


SHAPES = (
    (1, 1, 1, 1),
    (0, 2, 3, 4),  # no step
    (2, 0, 3, 4),  # no sequence
    (3, 2, 0, 4),  # no input
    (3, 2, 5, 7),  # below every tile
    (5, 1, 3, 16),
    (4, 3, 17, 33),  # one over a vector
    (2, 64, 8, 64),  # many rows, whole panels
    (9, 13, 20, 65),
    (6, 1, 100, 130),
    (70, 9, 4, 12),  # several blocks of steps in the backward
    (1, 20, 9, 70),  # one step of many rows
    (1, 5, 20, 40),  # weights not packed, by two and three rows at once
    (1, 2, 21, 70),  # nor in any type
    (4, 70, 170, 170),  # all products large enough for the matrix unit, in any type
)
LAYOUTS = ("batch_first", "strided", "expanded", "same_step", "same_row", "padded")
PROJECTIONS = (3, 6, 9, 16, 63, 9, 70, 5, 20, 18, 35, 100)  # for the shapes from the fourth on
# W_ih x as whole rows of the gates: of one panel of units, not packed, and of two panels
WHOLE_ROWS = ((4, 9, 70, 5), (1, 3, 70, 5), (5, 7, 90, 20))
LARGE = (4, 70, 170, 170)  # float32 goes in parts where there is a matrix unit
SPLIT_SHAPES = {
    (12, 1, 500, 520): "units",  # one thread multiplies x with whole rows of W_ih
    (1, 24, 200, 520): "units",  # weights packed panel by panel
    (50, 48, 16, 64): "rows",
    (4, 2, 3, 5): "none",
}
"""What two threads do with them: between them every way there is."""
OVERLAP_SHAPES = {"one row": (40, 1, 64, 64), "rows": (33, 3, 7, 48), "large": (6, 1, 256, 256)}
"""Of layers that may run side by side."""
MANY_BLOCKS = (330, 40, 2, 3)  # more rows than any device takes in one block of steps

RAGGED = [  # shape, lengths, resets
    *(
        ((T, B, I, H), lengths, False)
        for T, B, I, H in SHAPES[6:]
        for lengths in ("padded", "packed")
    ),
    *((shape, "", True) for shape in SHAPES[5:]),
    *((shape, "padded", True) for shape in (SHAPES[6], *SHAPES[8:])),
    ((1, 4, 3, 5), "padded", False),
    (MANY_BLOCKS, "packed", False),
    (MANY_BLOCKS, "padded", True),
]

CASES = [
    *(Case(cell, *shape) for cell in CELLS for shape in SHAPES),
    *(Case(cell, *shape, reverse=True) for cell in CELLS for shape in SHAPES[4:]),
    *(Case(cell, *shape, bias=False) for cell in CELLS for shape in SHAPES[4:7]),
    *(Case(cell, 5, 4, 6, 10, layout=layout) for cell in CELLS for layout in LAYOUTS),
    *(Case(cell, *MANY_BLOCKS, reverse=reverse) for cell in CELLS for reverse in (False, True)),
    *(
        Case(cell, *shape, reverse=reverse, lengths=lengths, resets=resets)
        for cell in CELLS
        for shape, lengths, resets in RAGGED
        for reverse in (False, True)
    ),
    *(
        Case(cell, *shape, bias=bias, reverse=not bias, lengths=lengths)
        for cell in CELLS
        for shape in WHOLE_ROWS
        for bias in (False, True)
        for lengths in ("", "packed")
    ),
    *(
        Case("lstm", 9, 13, 20, 65, reverse=reverse, lengths=lengths, cells=True)
        for lengths in ("", "padded", "packed")
        for reverse in (False, True)
    ),
    Case("lstm", *MANY_BLOCKS, resets=True, cells=True),
    *(
        Case("lstm", *shape, reverse=reverse, proj=P)
        for shape, P in [
            *zip(SHAPES[3:], PROJECTIONS, strict=True),
            (MANY_BLOCKS, 2),
        ]
        for reverse in (False, True)
    ),
    Case("lstm", 9, 13, 20, 65, bias=False, proj=17),
    *(
        Case("lstm", 9, 13, 20, 65, False, reverse, "contiguous", lengths, resets, cells, 33)
        for lengths, resets, cells in [
            ("padded", False, True),
            ("packed", False, False),
            ("padded", True, False),
        ]
        for reverse in (False, True)
    ),
    *(
        Case(cell, *shape, reverse=reverse, lengths=lengths, tokens=True)
        for cell in CELLS
        for shape, lengths in [
            *((shape, "") for shape in SHAPES if shape[2] > 0),
            ((9, 13, 20, 65), "padded"),
            ((9, 13, 20, 65), "packed"),
            (MANY_BLOCKS, ""),
            (MANY_BLOCKS, "packed"),
        ]
        for reverse in (False, True)
    ),
    *(Case(cell, 5, 4, 6, 10, layout="batch_first", tokens=True) for cell in CELLS),
    *(Case(cell, 5, 4, 6, 10, bias=False, resets=True, tokens=True) for cell in CELLS),
    Case("lstm", 9, 13, 20, 65, proj=17, tokens=True),
]

GRADCHECK_CASES = (
    [
        Case(cell, *shape, bias=bias, reverse=reverse)
        for cell in CELLS
        for shape, bias, reverse in [
            ((3, 2, 2, 3), True, False),
            ((2, 1, 3, 2), False, True),
            ((1, 2, 1, 1), True, True),
        ]
    ]
    + [
        Case(
            cell, 4, 3, 2, 4, reverse=reverse, lengths=lengths, resets=resets, cells=cell == "lstm"
        )
        for cell in CELLS
        for lengths, resets in (("padded", False), ("packed", False), ("padded", True))
        for reverse in (False, True)
    ]
    + [
        Case("lstm", 3, 2, 2, 3, reverse=reverse, lengths=lengths, cells=True, proj=2)
        for lengths in ("", "packed")
        for reverse in (False, True)
    ]
    + [
        Case(cell, 4, 3, 3, 4, reverse=reverse, lengths=lengths, tokens=True)
        for cell in CELLS
        for lengths, reverse in (("", False), ("packed", True))
    ]
)


def sample_x(case: Case) -> Tensor:
    """x (T, B, I), or packed, in float64, laid out in memory as the case says; or tokens."""
    T, B, I = case.T, case.B, 1 if case.tokens else case.I

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    layouts = {
        "contiguous": lambda: normal(T, B, I),
        "batch_first": lambda: normal(B, T, I).transpose(0, 1),
        "strided": lambda: normal(T, B, 2 * I)[..., ::2],
        "expanded": lambda: normal(1, B, 1).expand(T, B, I),
        "same_step": lambda: normal(1, B, I).expand(T, B, I),
        "same_row": lambda: normal(T, 1, I).expand(T, B, I),
        "padded": lambda: normal(T, B, I + 3)[..., :I],
    }
    x = layouts[case.layout]()
    if case.tokens:
        x = like_layout(torch.randint(case.I, x.shape), x)
    return pack(case, x) if case.lengths == "packed" else x


def lengths_of(case: Case) -> Tensor | None:
    """How long the sequences are: from 0 to T, or packed from T falling to 1 at the least."""
    if not case.lengths:
        return None
    generator = torch.Generator().manual_seed(case.T * case.B)
    least = 1 if case.lengths == "packed" else 0
    lengths = torch.randint(least, case.T + 1, (case.B,), generator=generator)
    if case.lengths == "packed":
        lengths[0] = case.T
        lengths = lengths.sort(descending=True).values
    return lengths


def reset_of(case: Case, device: str = "cpu") -> Tensor | None:
    """Where states are reset (T, B): at a quarter of the steps, some of them the first."""
    if not case.resets:
        return None
    generator = torch.Generator().manual_seed(case.T + case.B)
    return (torch.rand(case.T, case.B, generator=generator) < 0.25).to(device)


def pack(case: Case, padded: Tensor) -> Tensor:
    """The rows (N, ...) of the steps that there are."""
    lengths = lengths_of(case)
    assert lengths is not None
    return padded[torch.arange(case.T).unsqueeze(1) < lengths]


def sample_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Tensor | None]:
    """(x, *states, w_ih, w_hh, b_ih, b_hh[, w_hr]) in float64, rounded to ``dtype``."""
    torch.manual_seed(seed)
    row, P = CELLS[case.cell], case.proj or case.H
    rows, scale = row.gates * case.H, 0.3 * case.H**-0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    inputs: list[Tensor | None] = [sample_x(case)]
    inputs += [normal(case.B, size) for size in (P, case.H)[: row.states]]
    inputs += [normal(*((case.I, rows) if case.tokens else (rows, case.I))) * scale]
    inputs += [normal(rows, P) * scale]
    inputs += [normal(rows) * scale, normal(rows) * scale] if case.bias else [None, None]
    inputs += [normal(P, case.H) * case.H**-0.5] if case.proj else []
    return cast(cast(inputs, dtype, "cpu"), torch.float64, "cpu")


def like_layout(values: Tensor, layout: Tensor) -> Tensor:
    """``values`` in the strides of ``layout``; where those are 0 the values repeat."""
    base = torch.empty_strided(
        [1 if layout.stride(dim) == 0 else size for dim, size in enumerate(layout.shape)],
        layout.stride(),
        dtype=values.dtype,
        device=values.device,
    )
    for dim, stride in enumerate(layout.stride()):
        if stride == 0:
            values = values.narrow(dim, 0, min(1, values.shape[dim]))
    return base.copy_(values).expand(layout.shape)


def cast(tensors: list[Tensor | None], dtype: torch.dtype, device: str) -> list[Tensor | None]:
    """The tensors in another dtype, if no tokens, and on another device, in their own layouts."""
    return [
        None if t is None else like_layout(t.to(device, dtype if is_number(t) else None), t)
        for t in tensors
    ]


def is_number(tensor: Tensor | None) -> bool:
    """Whether there is a gradient to it: not to what is not there, and not to tokens."""
    return tensor is not None and tensor.is_floating_point()


def sample_grads(case: Case, dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    """Gradients of (y, *final states[, cells]), float64 rounded to ``dtype``."""
    torch.manual_seed(seed)
    P, states = case.proj or case.H, CELLS[case.cell].states
    shapes = [(case.T, case.B, P), *[(case.B, P), (case.B, case.H)][:states]]
    shapes += [(case.T, case.B, case.H)] * case.cells
    grads = [torch.randn(s, dtype=torch.float64).to(dtype).double() for s in shapes]
    if case.lengths != "packed":
        return grads
    return [pack(case, grad) if grad.dim() == 3 else grad for grad in grads]


class Expected(NamedTuple):
    """What the oracle says: (y, *final states[, cells]) and the inputs' gradients, in float64."""

    outputs: list[Tensor]
    grads: list[Tensor | None]


def oracle(
    case: Case,
    inputs: list[Tensor | None],
    grad_outputs: list[Tensor | None],
    dtype: torch.dtype = torch.float64,
) -> Expected:
    """The reference, differentiated by torch; None in ``grad_outputs`` stands for zeros.

    In float64, or for a half ``dtype`` in float32 with h rounded after every step, as is specified:
    a rounding decides on which side of relu's kink a unit is.
    """
    if dtype in (torch.float16, torch.bfloat16):
        inputs, grad_outputs = cast(inputs, dtype, "cpu"), cast(grad_outputs, dtype, "cpu")
    row = CELLS[case.cell]
    leaves = [t.detach().clone().requires_grad_() if is_number(t) else t for t in inputs]
    x, states, weights = leaves[0], tuple(leaves[1 : 1 + row.states]), leaves[1 + row.states :]
    extras = lengths_of(case), reset_of(case), *weights[4:]
    y, finals, cells = reference.layer(row, x, states, *weights[:4], case.reverse, *extras)
    outputs = [y, *finals] + [cells] * case.cells
    used = [
        (output, grad)
        for output, grad in zip(outputs, grad_outputs, strict=True)
        if grad is not None and output.requires_grad
    ]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in used],
            [t for t in leaves if is_number(t)],
            [grad for _, grad in used],
            materialize_grads=True,
            allow_unused=True,
        )
    )
    grads = [next(found).double() if is_number(t) else None for t in leaves]
    return Expected([output.detach().double() for output in outputs], grads)


@cache
def sample_with_oracle(
    case: Case, dtype: torch.dtype
) -> tuple[list[Tensor | None], list[Tensor], Expected]:
    """Inputs and output gradients as float64 rounded to ``dtype``, and what should come of them."""
    inputs, grads = sample_inputs(case, dtype), sample_grads(case, dtype)
    return inputs, grads, oracle(case, inputs, grads, dtype)


def run_forward(
    case: Case, inputs: list[Tensor | None], save: bool, recompute: bool = False
) -> tuple[Tensor, ...]:
    """The operator itself: (y, *final states, gates[, cells])."""
    op = getattr(torch.ops.rnnfast, case.cell)
    extras = lengths_of(case), reset_of(case, inputs[0].device.type)
    count = 5 + CELLS[case.cell].states
    return op(*inputs[:count], case.reverse, save, recompute, *extras, *inputs[count:])


def outputs_of(case: Case, forward: tuple[Tensor, ...]) -> list[Tensor]:
    """Of what ``run_forward`` returned, that which the oracle returns."""
    return [*forward[: 1 + CELLS[case.cell].states], *[forward[-1]] * case.cells]


def run_backward(
    case: Case,
    inputs: list[Tensor | None],
    grad_outputs: list[Tensor | None],
    forward: tuple[Tensor, ...],
    mask: list[bool] | None = None,
) -> tuple[Tensor, ...]:
    """The backward operator on what ``run_forward(save=True)`` returned."""
    mask = [is_number(t) for t in inputs] if mask is None else mask
    outputs, count = 1 + CELLS[case.cell].states, 5 + CELLS[case.cell].states
    grads, grad_cells = grad_outputs[:outputs], grad_outputs[outputs:]
    if grad_cells:
        grad_cells = [grad_cells[0].to(reference.compute_dtype(inputs[1].dtype))]
    op = getattr(torch.ops.rnnfast, f"{case.cell}_backward")
    extras = [lengths_of(case), reset_of(case, inputs[0].device.type)]
    if case.cell == "lstm":
        extras += [*(inputs[count:] or [None]), *grad_cells]
    saved = forward[outputs:]
    found = op(*grads, *inputs[:count], forward[0], *saved, case.reverse, mask, *extras)
    return found[: len(inputs)]


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected; NaN never passes a bound."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach().cpu().double() - expected).abs().max().item()
    return difference / (expected.abs().max().item() or 1.0)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the norm of what is expected."""
    difference = (actual.detach().cpu().double() - expected).norm()
    return (difference / expected.norm()).item()


def bound(dtype: torch.dtype) -> float:
    """How large `error` may be for values; gradients, long sums of them, may have 5 times that."""
    return torch.finfo(dtype).eps * (12 if dtype in (torch.float64, torch.float32) else 1)
