"""Calls of the operators: their description, random inputs, execution, and expected results.

The calls that the tests of kernels make are in runs.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast import reference
from rnnfast.reference import CELLS, LayerInputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dtype_name(value: object) -> str | None:
    """The names of dtypes, for the ids of tests."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


TORCH_CLASS: dict[str, tuple[type[torch.nn.Module], dict[str, str]]] = {
    "elman_tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "elman_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
    "gru": (torch.nn.GRU, {}),
    "lstm": (torch.nn.LSTM, {}),
}
"""The module of torch.nn for each cell, and its options."""


SHAPES = (
    (1, 1, 1, 1),
    (0, 2, 3, 4),  # no steps
    (2, 0, 3, 4),  # no sequences
    (3, 2, 0, 4),  # no input features
    (3, 2, 5, 7),  # smaller than every tile
    (5, 1, 3, 16),
    (4, 3, 17, 33),  # one more than a vector
    (2, 64, 8, 64),  # many rows, full panels
    (9, 13, 20, 65),
    (6, 1, 100, 130),
    (70, 9, 4, 12),  # several blocks of steps in the backward
    (1, 20, 9, 70),  # one step with many rows
    (1, 5, 20, 40),  # weights are not packed; products of two and three rows at once
    (1, 2, 21, 70),  # weights are not packed in any dtype
    # W_ih is multiplied as one matrix of all gates: one panel of units, unpacked, and two panels
    (4, 9, 70, 5),
    (1, 3, 70, 5),
    (5, 7, 90, 20),
)
"""T, B, I, H of cases at the limits of what kernels treat differently."""
LARGE = (4, 70, 170, 170)  # all products are large enough for AMX, in any dtype
MANY_BLOCKS = (330, 40, 2, 3)  # more rows than any device puts in one block of steps
BLOCKS_OF_A_STEP = (2, 520, 2, 70)  # with so many rows, each step is a block of the backward
SPLIT_SHAPES = {
    (12, 1, 500, 520): "units",  # one thread multiplies x by W_ih as one matrix
    (1, 24, 200, 520): "units",  # weights are packed panel by panel
    (50, 48, 16, 64): "rows",
    (4, 2, 3, 5): "none",
}
"""How two threads split these cases; together they cover every way of splitting."""
GRID_SHAPE = (3, 24, 20, 520)
"""A case in which four or six threads split both rows and units."""
OVERLAP_SHAPES = {"one row": (40, 1, 64, 64), "rows": (33, 3, 7, 48), "large": (6, 1, 256, 256)}
"""Cases of layers that may run side by side."""


class Case(NamedTuple):
    """One call of a cell's operator, with sizes T, B, I, H and options."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    bias: bool = True
    reverse: bool = False
    layout: str = "contiguous"
    lengths: str = ""
    """"padded" or "packed" for sequences of unequal length; else all have T steps."""
    resets: bool = False
    cells: bool = False
    """Whether the c of every step is checked too."""
    proj: int = 0
    """P if h is projected."""
    tokens: bool = False
    """Whether x is I different tokens, and w_ih a table (I, G*H)."""
    gates: str = ""
    """Weights that make gates "saturated", or the cell "remembering"."""

    @property
    def is_plain(self) -> bool:
        """Whether every device has kernels for this case."""
        return not self.lengths and not self.resets and not self.proj and not self.tokens

    def __str__(self) -> str:
        options = [self.layout] * (self.layout != "contiguous") + [self.lengths] * bool(
            self.lengths
        )
        options += ["no_bias"] * (not self.bias) + ["reverse"] * self.reverse
        options += ["resets"] * self.resets + ["cells"] * self.cells
        options += [f"proj{self.proj}"] * bool(self.proj) + ["tokens"] * self.tokens
        options += [self.gates] * bool(self.gates)
        return "-".join([self.cell, f"{self.T}x{self.B}x{self.I}x{self.H}", *options])


LAYOUTS = (
    "contiguous",
    "batch_first",
    "strided",
    "expanded",
    "same_step",
    "same_row",
    "padded",
)
"""The memory layouts of x; packed x has no "batch_first" and no "same_row"."""


def sample_x(case: Case) -> Tensor:
    """Returns x (T, B, I) or packed, in float64, in the case's memory layout; or tokens."""
    T, B, I = case.T, case.B, 1 if case.tokens else case.I
    lengths = lengths_of(case)
    if case.lengths == "packed":
        assert lengths is not None
        T, B = int(lengths.sum()), 1

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
    return x[:, 0] if case.lengths == "packed" else x


def lengths_of(case: Case) -> Tensor | None:
    """Returns lengths from 0 to T; for packed sequences from T down to 1, not increasing."""
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
    """Returns where states are reset (T, B): a quarter of the steps, including some first ones."""
    if not case.resets:
        return None
    generator = torch.Generator().manual_seed(case.T + case.B)
    return (torch.rand(case.T, case.B, generator=generator) < 0.25).to(device)


def pack(case: Case, padded: Tensor) -> Tensor:
    """Returns the rows (N, ...) of the steps within the lengths."""
    lengths = lengths_of(case)
    assert lengths is not None
    return padded[torch.arange(case.T).unsqueeze(1) < lengths]


def sample_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Tensor | None]:
    """Returns (x, *states, w_ih, w_hh, b_ih, b_hh[, w_hr]), float64 rounded to ``dtype``."""
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
    if case.gates:
        set_gates(case, inputs[1 + row.states :], dtype)
    return cast(cast(inputs, dtype, "cpu"), torch.float64, "cpu")


def set_gates(case: Case, weights: list[Tensor | None], dtype: torch.dtype) -> None:
    """Changes (w_ih, w_hh, b_ih, b_hh) so that the gates are as `Case.gates` says."""
    _, w_hh, b_ih, _ = weights[:4]
    assert w_hh is not None
    assert b_ih is not None, "gates are set by biases"
    H = case.H
    if case.gates == "saturated":
        # Both signs: some so large that gates are 0 or 1 to the last bit, some moderate. For
        # float64 the others leave bits of 1 - s in float32 too, in which errors are estimated.
        some = 14 if dtype == torch.float64 else 20
        levels = torch.tensor([-60, -some, -4, 0, 0, 0, 4, some, 60], dtype=torch.float64)
        levels = levels.clamp(max=1) if case.cell == "elman_relu" else levels
        b_ih += levels[torch.randint(len(levels), b_ih.shape)]
    elif case.cell in ("lstm", "gru"):
        # f, or z, is 0.9997; in half types it is the value nearest to 1 that leaves bits of 1 - f
        b_ih[H : 2 * H] += {torch.bfloat16: 3, torch.float16: 5}.get(dtype, 8)
    else:
        w_hh.div_(32).add_(torch.eye(H, dtype=torch.float64))


def like_layout(values: Tensor, layout: Tensor) -> Tensor:
    """Copies ``values`` into the strides of ``layout``; where a stride is 0 the values repeat."""
    base = torch.empty_strided(
        [min(1, n) if layout.stride(dim) == 0 else n for dim, n in enumerate(layout.shape)],
        layout.stride(),
        dtype=values.dtype,
        device=values.device,
    )
    for dim, stride in enumerate(layout.stride()):
        if stride == 0:
            values = values.narrow(dim, 0, min(1, values.shape[dim]))
    return base.copy_(values).expand(layout.shape)


def cast(tensors: list[Tensor | None], dtype: torch.dtype, device: str) -> list[Tensor | None]:
    """Converts tensors (except tokens) to a dtype and device, keeping their memory layouts."""
    return [
        None if t is None else like_layout(t.to(device, dtype if is_number(t) else None), t)
        for t in tensors
    ]


def is_number(tensor: Tensor | None) -> bool:
    """Whether a gradient with respect to it exists: it is a tensor, and not tokens."""
    return tensor is not None and tensor.is_floating_point()


GRADS = ("all", "y", "finals", "sum", "batch_first", "padded")
"""Which results have gradients or, if all have, the memory layout of y's gradient."""


def sample_grads(
    case: Case, dtype: torch.dtype, seed: int = 1, grads: str = "all"
) -> list[Tensor | None]:
    """Gradients of (y, *final states[, cells]), float64 rounded to ``dtype``.

    With ``grads`` "sum", y's gradient is a single number, expanded.
    """
    torch.manual_seed(seed)
    P, states = case.proj or case.H, CELLS[case.cell].states
    of_y, of_cells = (case.T, case.B, P), (case.T, case.B, case.H)
    finals = [(case.B, P), (case.B, case.H)][:states]
    found = [torch.randn(s, dtype=torch.float64) for s in [of_y, *finals, *[of_cells] * case.cells]]
    found = [grad.to(dtype).double() for grad in found]
    if case.lengths == "packed":
        found = [pack(case, grad) if grad.dim() == 3 else grad for grad in found]
    y, others = found[0], found[1:]
    if grads == "y":
        return [y, *[None] * len(others)]
    if grads == "finals":
        return [None, *others]
    if grads == "sum":
        y = torch.full((1,) * y.dim(), 0.5, dtype=y.dtype).expand(y.shape)
    elif grads == "batch_first":
        y = y.transpose(0, 1).contiguous().transpose(0, 1)
    elif grads == "padded":
        y = torch.cat([y, torch.full_like(y[..., :3], float("nan"))], -1)[..., :P]
    return [y, *others]


class Expected(NamedTuple):
    """Expected results in float64: (y, *final states[, cells]) and the gradients of the inputs."""

    outputs: list[Tensor]
    grads: list[Tensor | None]


def oracle(
    case: Case,
    inputs: list[Tensor | None],
    grad_outputs: list[Tensor | None],
    dtype: torch.dtype = torch.float64,
) -> Expected:
    """The reference, differentiated by torch; None in ``grad_outputs`` stands for zeros.

    It runs in float64. For a half ``dtype`` it runs in float32 with h rounded after every step, as
    the operators are specified, since a rounding can move a unit across relu's kink.
    """
    if dtype in (torch.float16, torch.bfloat16):
        inputs, grad_outputs = cast(inputs, dtype, "cpu"), cast(grad_outputs, dtype, "cpu")
    row = CELLS[case.cell]
    leaves = [t.detach().clone().requires_grad_() if is_number(t) else t for t in inputs]
    x, states, weights = leaves[0], tuple(leaves[1 : 1 + row.states]), leaves[1 + row.states :]
    extras = lengths_of(case), reset_of(case), *weights[4:]
    given = LayerInputs(x, states, *weights[:4], case.reverse, *extras)
    y, finals, cells = reference.layer(row, given)
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


class Sample(NamedTuple):
    """A call and its expected results."""

    inputs: list[Tensor | None]
    grads: list[Tensor | None]
    """Gradients of the outputs; like the inputs, float64 rounded to a dtype."""
    expected: Expected
    noise: Expected | None
    """The error of the dtype's arithmetic, if it is larger than its rounding."""


@lru_cache(maxsize=8)
def sample_with_oracle(case: Case, dtype: torch.dtype, grads: str = "all") -> Sample:
    """A call in ``dtype``; see `sample_grads` for ``grads``.

    The factor 1 - s of gradients (in a GRU also of values) keeps few bits if the gate s is close to
    1, and sums of a few elements, or of equal ones, may cancel. So may a factor such as h - n of a
    GRU, which a row of a weight gradient depends on if there are a few rows of x. The loss is
    estimated by the reference's error in float32, scaled to the dtype. The error of one call may be
    small by chance, so it is the larger one of two calls of nearly equal inputs.
    """
    inputs, given = sample_inputs(case, dtype), sample_grads(case, dtype, grads=grads)
    expected, noise = oracle(case, inputs, given, dtype), None
    is_small = min(case.H, case.proj or case.H, case.T * case.B) < 5
    if case.gates or case.layout == "expanded" or is_small:
        scale = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        errors = [float32_errors(case, inputs, given, factor) for factor in (1, 1 + 2**-12)]
        noise = Expected(*(largest(results, scale) for results in zip(*errors, strict=True)))
    return Sample(inputs, given, expected, noise)


def float32_errors(
    case: Case, inputs: list[Tensor | None], grads: list[Tensor | None], factor: float
) -> Expected:
    """The differences of the reference in float32 and in float64.

    x and the initial states are multiplied by a factor, and all inputs are rounded to float32.
    """
    changed = range(1 + CELLS[case.cell].states)
    scaled = [t * factor if i in changed and is_number(t) else t for i, t in enumerate(inputs)]
    singles = [cast(tensors, torch.float32, "cpu") for tensors in (scaled, grads)]
    single = oracle(case, *singles)
    double = oracle(case, *(cast(tensors, torch.float64, "cpu") for tensors in singles))
    return Expected(
        *(
            [None if one is None else (one - other).abs() for one, other in zip(*pair, strict=True)]
            for pair in zip(single, double, strict=True)
        )
    )


def largest(lists: tuple[list[Tensor | None], ...], scale: float) -> list[Tensor | None]:
    """The elementwise maxima of tensors at the same place of several lists, times a scale."""
    return [
        None if tensors[0] is None else scale * torch.stack(tensors).amax(0)
        for tensors in zip(*lists, strict=True)
    ]


def run_forward(
    case: Case, inputs: list[Tensor | None], save: bool, recompute: bool = False
) -> tuple[Tensor, ...]:
    """Runs the operator; returns (y, *final states, gates[, cells])."""
    op = getattr(torch.ops.rnnfast, case.cell)
    extras = lengths_of(case), reset_of(case, inputs[0].device.type)
    count = 5 + CELLS[case.cell].states
    return op(*inputs[:count], case.reverse, save, recompute, *extras, *inputs[count:])


def outputs_of(case: Case, forward: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns those of ``run_forward``'s results that the oracle also returns."""
    return [*forward[: 1 + CELLS[case.cell].states], *[forward[-1]] * case.cells]


def run_backward(
    case: Case,
    inputs: list[Tensor | None],
    grad_outputs: list[Tensor | None],
    forward: tuple[Tensor, ...],
    mask: list[bool] | None = None,
) -> tuple[Tensor, ...]:
    """Runs the backward operator on the results of ``run_forward(save=True)``."""
    mask = [is_number(t) for t in inputs] if mask is None else mask
    outputs, count = 1 + CELLS[case.cell].states, 5 + CELLS[case.cell].states
    grads, grad_cells = grad_outputs[:outputs], grad_outputs[outputs:]
    if grad_cells and grad_cells[0] is not None:
        grad_cells = [grad_cells[0].to(reference.compute_dtype(inputs[1].dtype))]
    op = getattr(torch.ops.rnnfast, f"{case.cell}_backward")
    extras = [lengths_of(case), reset_of(case, inputs[0].device.type)]
    if case.cell == "lstm":
        extras += [*(inputs[count:] or [None]), *grad_cells]
    saved = forward[outputs:]
    found = op(*grads, *inputs[:count], forward[0], *saved, case.reverse, mask, *extras)
    return found[: len(inputs)]


def error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference relative to the largest value; NaN fails any bound."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach().cpu().double() - expected).abs().max().item()
    return difference / (expected.abs().max().item() or 1.0)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    tolerance: float,
    dtype: torch.dtype,
    noise: Tensor | None = None,
) -> None:
    """No error is larger than ``tolerance`` times the largest value, plus 8 times the noise.

    The noise counts up to a 16th of the largest value, so that zeros always fail.

    Each row along the last dimension is also compared with its own largest value. Its error may be
    4 times the tolerance of that value plus a 32nd of the tensor's largest value, which allows for
    sums of much larger terms. Rows of a few elements are exempt, as their values say little about
    their terms.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    difference = (actual.detach().cpu().double() - expected).abs()
    largest, info = expected.abs().max(), torch.finfo(dtype)
    least = 8 * info.smallest_normal * info.eps  # a few of the smallest numbers of the type
    if dtype is torch.bfloat16:  # the processors' dot products take smaller numbers for zeros
        least = info.smallest_normal
    limit = tolerance * largest + least
    if noise is not None:
        noise = noise.clamp(max=largest / 16)
        limit += 8 * noise.max()
    assert difference.max() <= limit, f"off by {difference.max()}, more than {limit}"
    if expected.dim() < 2 or expected.shape[-1] < 8:
        return
    limits = 4 * tolerance * (expected.abs().amax(-1) + largest / 32) + least
    if noise is not None:
        limits += 8 * (noise.amax(-1) + noise.square().mean().sqrt())
    worst = (difference.amax(-1) / limits).max()
    assert worst <= 1, f"a row is off by {worst} of what its values allow"


def distance(actual: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference, relative to the norm of the expected values."""
    difference = (actual.detach().cpu().double() - expected).norm()
    return (difference / expected.norm()).item()


def bound(dtype: torch.dtype, steps: int = 1) -> float:
    """Returns how large `error` may be for values; gradients, as long sums, may have 5 times that.

    Beyond 100 steps it grows in proportion to them.
    """
    ulps = 12 if dtype in (torch.float64, torch.float32) else 1
    return torch.finfo(dtype).eps * ulps * max(1, steps / 100)


def rounding_of_settled_gates(case: Case, dtype: torch.dtype) -> float:
    """Returns how large `error` of initial states' gradients may be beyond their `bound`.

    Half types save rounded gates. Where x is the same at every step the gates settle, so each step
    has the same error, at most eps / 2 of a gate. The gradient of an initial state is a product of
    the gates of all steps, so these errors add up; for 32 steps at most, so that zeros would fail.
    """
    saves = CELLS[case.cell].saved > 0 and dtype in (torch.float16, torch.bfloat16)
    if not saves or case.layout not in ("same_step", "expanded"):
        return 0.0
    return min(case.T, 32) * torch.finfo(dtype).eps / 2
