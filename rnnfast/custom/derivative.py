"""The derivative of a cell's step: what a forward saves, and a backward that reads it.

torch's autograd differentiates. Here its operations are recorded, taken apart into those that
`rnnfast.custom.emission` knows, and divided between the two programs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._decomp import get_decompositions

from rnnfast.custom.program import MASKS, Argument, Builder, Program, Ref, Value, as_value
from rnnfast.custom.tracing import CellError, Recorder, Traced, alone, input_names


class Derivative(NamedTuple):
    """The two programs of a cell with a gradient."""

    forward: Program
    """From the inputs of the step (`input_names`) to the new states, then the saved values."""
    backward: Program
    """From the saved values, the states before the step, those after it, the parameters and the
    gradients of the new states to the gradients of the gates of x, the gates of h, the states
    before and the parameters. All are elementwise: nothing is summed over the batch."""
    saved: int
    """How many values the forward saves."""


PRIMITIVES = MASKS | {
    *("abs", "add", "clamp_max", "clamp_min", "cos", "div", "erf", "exp", "expm1", "full_like"),
    *("log", "log1p", "maximum", "minimum", "mul", "neg", "reciprocal", "relu", "rsqrt", "rsub"),
    *("sigmoid", "sign", "sin", "sqrt", "sub", "tanh", "where"),
}
"""The operators of derivatives."""


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    aten = torch.ops.aten
    backwards = [
        *(aten.elu_backward, aten.gelu_backward, aten.hardsigmoid_backward),
        *(aten.hardswish_backward, aten.hardtanh_backward, aten.leaky_relu_backward),
        *(aten.log_sigmoid_backward, aten.mish_backward, aten.sigmoid_backward),
        *(aten.silu_backward, aten.softplus_backward, aten.tanh_backward, aten.threshold_backward),
    ]
    forwards = [
        *(aten.elu, aten.gelu, aten.hardsigmoid, aten.hardswish, aten.hardtanh, aten.leaky_relu),
        *(aten.log_sigmoid_forward, aten.mish, aten.silu, aten.softplus),
    ]
    return dict(get_decompositions([*backwards, *forwards]))


class _Primitive(Builder):
    """A builder that writes what torch does not take apart in terms of other operators."""

    def add(self, operator: str, *arguments: Argument) -> Value:
        if operator == "pow":
            base, exponent = arguments
            assert isinstance(exponent, float)
            return self._power(base, exponent)
        if operator == "logaddexp":
            return self._logaddexp(*arguments)
        if operator in ("clamp_min", "clamp_max") and isinstance(arguments[1], Ref):
            operator = "maximum" if operator == "clamp_min" else "minimum"
        result = super().add(operator, *arguments)
        operation = self.operation(result)
        if operation is not None and operation.operator not in PRIMITIVES:
            raise CellError(f"The derivative of this cell needs {operator}, which has no kernel.")
        return result

    def _power(self, base: Argument, exponent: float) -> Value:
        if exponent == 0:
            return 1.0
        if exponent == -0.5:
            return self.add("rsqrt", base)
        if exponent < 0:
            base = self.add("reciprocal", base)
        size = abs(exponent)
        factors = [base] * int(size) + [self.add("sqrt", base)] * (size != int(size))
        result = as_value(factors[0])
        for factor in factors[1:]:
            result = self.add("mul", result, factor)
        return result

    def _logaddexp(self, *arguments: Argument) -> Value:
        a, b = arguments
        distance = self.add("abs", self.add("sub", a, b))
        small = self.add("log1p", self.add("exp", self.add("neg", distance)))
        # the distance of two equal infinities is NaN
        same = self.add("logical_and", self.add("eq", a, b), self.add("gt", self._abs(a), _HUGE))
        return self.add("where", same, a, self.add("add", self.add("maximum", a, b), small))

    def _abs(self, a: Argument) -> Value:
        return self.add("abs", a)


_HUGE = 3e38


def derive(
    program: Program, gates: int, states: Sequence[str], parameters: Sequence[str] = ()
) -> Derivative:
    """Differentiates a cell's step.

    Args:
        program: What `rnnfast.custom.tracing.trace` returned.
        gates: How many gates the cell has.
        states: The names of its states.
        parameters: The names of its learnable vectors.

    Returns:
        The forward and the backward program. They are the same in every process.

    Raises:
        CellError: A derivative needs an operator that has no kernel.
    """
    return alone(lambda: _derived(program, gates, states, parameters))


def _derived(
    program: Program, gates: int, states: Sequence[str], parameters: Sequence[str]
) -> Derivative:
    count = len(program.inputs)
    gradients = tuple(f"gradient.{name}" for name in states)
    joint = _Primitive((*input_names(gates, states, parameters), *gradients), simplify=True)
    recorder = Recorder(joint, of_user=False, decompositions=_decompositions())
    with recorder:
        inputs = [recorder.input(index, requires_grad=True) for index in range(count)]
        arriving = [recorder.input(count + k) for k in range(len(states))]
        values: list[Any] = program.values(*inputs)
        outputs = [values[output.index] for output in program.outputs if output is not None]
        pairs = [(o, g) for o, g in zip(outputs, arriving, strict=True) if o.requires_grad]
        found = (
            torch.autograd.grad(
                [o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True
            )
            if pairs
            else (None,) * count
        )
    for operation, tensor in zip(program.operations, values[count:], strict=True):
        if operation.name and joint.operation(tensor.value) is not None:
            joint.names.setdefault(tensor.value, operation.name)
    after = [_materialised(joint, output) for output in outputs]
    results = [_gradient(joint, tensor) for tensor in found]
    return _divided(joint, after, results, gates, len(states))


def _materialised(joint: Builder, tensor: Traced) -> Ref:
    value = tensor.value
    if not isinstance(value, Ref):
        value = joint.add("full_like", Ref(0), value)
    assert isinstance(value, Ref)
    return value


def _gradient(joint: Builder, tensor: Any) -> Ref | None:
    if tensor is None or tensor.value == 0:
        return None
    return _materialised(joint, tensor)


# ---- what is saved ----

_SAVE = 1000  # writing a value in the forward and reading it in the backward
_SLOW, _MIDDLE, _CHEAP = 400, 60, 10  # computing a value again
_COSTS = dict.fromkeys(("div", "reciprocal", "sqrt", "rsqrt"), _MIDDLE)
_COSTS |= dict.fromkeys(
    ("cos", "erf", "exp", "expm1", "log", "log1p", "sigmoid", "sin", "tanh"), _SLOW
)
_NEVER = 10**9


def _divided(
    joint: Builder, after: list[Ref], results: list[Ref | None], gates: int, states: int
) -> Derivative:
    """Divides the joint program into a forward and a backward."""
    total = len(joint.inputs)
    count = total - states
    first_state = 2 * gates
    late = {Ref(count + k) for k in range(states)}  # what depends on the gradients
    for index, operation in enumerate(joint.operations):
        if any(argument in late for argument in operation.arguments):
            late.add(Ref(total + index))

    whole = {result for result in results if result is not None}
    wanted: set[Ref] = {result for result in whole if result not in late}
    for index in reversed(range(len(joint.operations))):
        value = Ref(total + index)
        if value in whole and value in late:
            arguments = joint.operations[index].arguments
            references = {a for a in arguments if isinstance(a, Ref)}
            whole |= references
            wanted |= references - late

    free = {Ref(index): 5 for index in range(first_state + 1, count)}  # cells and parameters
    free |= {value: 5 for value in after[1:] if value not in free}
    free.setdefault(after[0], 20)
    free[Ref(first_state)] = 30  # h before the step
    saved = _cheapest(joint, total, wanted, free)
    forward_builder = _Copy(joint, joint.inputs[:count])
    forward = forward_builder.builder.build(forward_builder.copied([*after, *saved]))

    before = joint.inputs[first_state:]
    names = [f"saved[{k}]" for k in range(len(saved))]
    parameters = before[states : len(before) - states]
    news = [name.replace("state.", "new.") for name in before[:states]]
    incoming = joint.inputs[count:]
    inputs = (*names, *before[:states], *news, *parameters, *incoming)
    backward_builder = _Copy(joint, inputs)
    known = backward_builder.known
    k = len(saved)
    # Where a value has several places, the last one counts: a state before the step is better than
    # the same after it, and another state is better than h, which is rounded.
    known.update({value: Ref(k + states + index) for index, value in enumerate(after)})
    known.update({value: Ref(index) for index, value in enumerate(saved)})
    known.update({Ref(first_state + index): Ref(k + index) for index in range(states)})
    for index in range(len(parameters)):
        known[Ref(first_state + states + index)] = Ref(k + 2 * states + index)
    for index in range(states):
        known[Ref(count + index)] = Ref(k + 2 * states + len(parameters) + index)
    backward_builder.copied([value for value in results if value is not None])
    gradients = [None if value is None else known[value] for value in results]
    return Derivative(forward, backward_builder.builder.build(gradients), len(saved))


class _Copy:
    """Copies what is needed of a program into another.

    The tensor that a full_like takes its size from may be any input: where the other program lacks
    it, the first one serves.
    """

    def __init__(self, source: Builder, inputs: tuple[str, ...]) -> None:
        self.source, self.builder = source, Builder(inputs)
        self.known = {
            Ref(index): Ref(inputs.index(name))
            for index, name in enumerate(source.inputs)
            if name in inputs
        }

    def copied(self, values: Sequence[Ref]) -> list[Ref]:
        """The values' references in the other program. The order of operations is kept."""
        needed = set(values) - self.known.keys()
        count = len(self.source.inputs)
        for index in reversed(range(len(self.source.operations))):
            if Ref(count + index) in needed:
                arguments = self.source.operations[index].arguments
                needed.update(a for a in arguments if isinstance(a, Ref) and a not in self.known)
        for index, operation in enumerate(self.source.operations):
            value = Ref(count + index)
            if value not in needed:
                continue
            arguments = tuple(
                self.known.get(a, Ref(0)) if isinstance(a, Ref) else a for a in operation.arguments
            )
            result = self.builder.add(operation.operator, *arguments)
            assert isinstance(result, Ref)
            self.known[value] = result
            if value in self.source.names:
                self.builder.names.setdefault(result, self.source.names[value])
        return [self.known[value] for value in values]


def _cheapest(joint: Builder, total: int, wanted: set[Ref], free: dict[Ref, int]) -> list[Ref]:
    """The values to save, so that saving and computing again cost least together.

    Each value has two nodes: one is on the side of the source if the backward has the value, the
    other if it computes it again. The minimum cut chooses.
    """
    source, sink = -1, -2
    capacity: dict[int, dict[int, int]] = {source: {}, sink: {}}

    def edge(a: int, b: int, size: int) -> None:
        capacity.setdefault(a, {})[b] = capacity.get(a, {}).get(b, 0) + size
        capacity.setdefault(b, {}).setdefault(a, 0)

    size = total + len(joint.operations)
    for index in range(size):
        value = Ref(index)
        has, computes = 2 * index, 2 * index + 1
        operation = joint.operation(value)
        is_mask = operation is not None and operation.operator in MASKS
        edge(has, computes, free.get(value, _NEVER if is_mask else _SAVE))
        edge(computes, sink, _NEVER if operation is None else _cost(operation.operator))
        sizes = operation is not None and operation.operator == "full_like"
        for argument in () if operation is None or sizes else operation.arguments:
            if isinstance(argument, Ref):
                edge(computes, 2 * argument.index, _NEVER)
        if value in wanted:
            edge(source, has, _NEVER)
    reached = _source_side(capacity, source, sink)
    return [
        Ref(index)
        for index in range(size)
        if 2 * index in reached and 2 * index + 1 not in reached and Ref(index) not in free
    ]


def _cost(operator: str) -> int:
    return 0 if operator == "full_like" else _COSTS.get(operator, _CHEAP)


def _source_side(capacity: dict[int, dict[int, int]], source: int, sink: int) -> set[int]:
    """The nodes on the source's side of the minimum cut that is nearest to the source."""
    while True:
        previous = {source: source}
        queue = deque([source])
        while queue and sink not in previous:
            node = queue.popleft()
            for following, left in capacity[node].items():
                if left > 0 and following not in previous:
                    previous[following] = node
                    queue.append(following)
        if sink not in previous:
            return set(previous)
        path, node = [], sink
        while node != source:
            path.append((previous[node], node))
            node = previous[node]
        flow = min((capacity[a][b] for a, b in path), default=math.inf)
        for a, b in path:
            capacity[a][b] -= int(flow)
            capacity[b][a] += int(flow)
