"""Programs: elementwise formulas as plain data, which can be run, printed, compared and pickled."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Ref(NamedTuple):
    """A value of a program: an input, or after the inputs the result of an operation."""

    index: int  # type: ignore[assignment]  # a tuple's method has this name too


Argument = Ref | float | str | None
Value = Ref | float

CALLS: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs,
    "add": torch.add,
    "clamp_max": torch.clamp_max,
    "clamp_min": torch.clamp_min,
    "cos": torch.cos,
    "detach": torch.detach,
    "div": torch.div,
    "elu": lambda x, alpha, scale, input_scale: torch.ops.aten.elu(x, alpha, scale, input_scale),
    "eq": torch.eq,
    "erf": torch.erf,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "full_like": torch.full_like,
    "ge": torch.ge,
    "gelu": lambda x, approximate: F.gelu(x, approximate=approximate),
    "gt": torch.gt,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "le": torch.le,
    "leaky_relu": F.leaky_relu,
    "log": torch.log,
    "log1p": torch.log1p,
    "log_sigmoid": F.logsigmoid,
    "logaddexp": torch.logaddexp,
    "logical_and": torch.logical_and,
    "logical_not": torch.logical_not,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "lt": torch.lt,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mish": F.mish,
    "mul": torch.mul,
    "ne": torch.ne,
    "neg": torch.neg,
    "pow": torch.pow,
    "reciprocal": torch.reciprocal,
    "relu": torch.relu,
    "rsqrt": torch.rsqrt,
    "rsub": torch.rsub,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "sqrt": torch.sqrt,
    "sub": torch.sub,
    "tanh": torch.tanh,
    "where": torch.where,
}
"""What each operator of a program calls. The operators have the names of torch's in aten, without
the overload: an argument may be a number wherever torch takes one."""

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
MASKS = frozenset(COMPARISONS) | {"logical_and", "logical_or", "logical_xor", "logical_not"}
"""The operators whose results are booleans."""


class Operation(NamedTuple):
    """One operator and its arguments."""

    operator: str
    """A key of `CALLS`."""
    arguments: tuple[Argument, ...]
    name: str = ""
    """The name of the result in the function that the program comes from, if it has one there."""

    # By the texts: NaN equals NaN, and 0.0 differs from -0.0.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and repr(self) == repr(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(repr(self))


class Program(NamedTuple):
    """An elementwise formula in the form of operations, each of which gives one new value.

    It is plain data: it can be compared, hashed and pickled.
    """

    inputs: tuple[str, ...]
    """What each input stands for, as a Python expression such as ``x[0]`` or ``state.h``."""
    operations: tuple[Operation, ...]
    outputs: tuple[Ref | None, ...]
    """The results. None is a zero: a gradient of something that has no influence."""

    def values(self, *tensors: Tensor) -> list[Tensor]:
        """All values of the program: the inputs, then the results of the operations."""
        values = list(tensors)
        for operation in self.operations:
            arguments = [
                values[argument.index] if isinstance(argument, Ref) else argument
                for argument in operation.arguments
            ]
            values.append(CALLS[operation.operator](*arguments))
        return values

    def run(self, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the outputs in PyTorch.

        Args:
            tensors: One tensor for each of ``inputs``. They may have any shapes that broadcast and
                any floating point type.

        Returns:
            One tensor for each of ``outputs``, or None for a zero.
        """
        values = self.values(*tensors)
        return tuple(None if output is None else values[output.index] for output in self.outputs)

    def source(self, name: str) -> str:
        """The program as the source text of a function called ``name`` in plain PyTorch."""
        arguments = list(dict.fromkeys(re.split(r"\W", text)[0] for text in self.inputs))
        taken = {*arguments, "torch", "F"}
        statements, outputs = written(self, self.inputs, _PythonSyntax(), taken)
        results = ["None" if output is None else output for output in outputs]
        lines = [f"def {name}({', '.join(arguments)}):"]
        lines += [f"    {variable} = {text}" for variable, text in statements]
        lines.append(f"    return {', '.join(results)}")
        return "\n".join(lines) + "\n"


def as_value(argument: Argument) -> Value:
    """An argument that is no text and is not missing."""
    assert isinstance(argument, Ref | int | float)
    return argument


class Builder:
    """Makes a program. Operations that are there already are shared.

    Args:
        inputs: The inputs of the program.
        simplify: Whether to apply the rules of algebra that change at most the sign of a zero.
    """

    def __init__(self, inputs: Iterable[str], simplify: bool = False) -> None:
        self.inputs = tuple(inputs)
        self.operations: list[Operation] = []
        self.names: dict[Ref, str] = {}
        self._known: dict[tuple[str, ...], Ref] = {}
        self._simplify = simplify

    def operation(self, value: Argument) -> Operation | None:
        """The operation that gives a value; None for an input or a number."""
        if isinstance(value, Ref) and value.index >= len(self.inputs):
            return self.operations[value.index - len(self.inputs)]
        return None

    def add(self, operator: str, *arguments: Argument) -> Value:
        """The result of an operator. Its arguments may all be numbers."""
        operator, arguments = _tensor_first(operator, arguments)
        first = 1 if operator == "where" else 0
        tensors = arguments[first : first + 2] if operator == "where" else arguments[:1]
        if not any(isinstance(argument, Ref) for argument in tensors):
            if operator == "full_like":
                raise AssertionError("full_like takes a tensor")
            one = self._append("full_like", (Ref(0), arguments[first]))
            arguments = (*arguments[:first], one, *arguments[first + 1 :])
        if operator in ("mul", "div") and arguments[1] == 1:
            return as_value(arguments[0])
        if self._simplify:
            simple = self._simplified(operator, arguments)
            if simple is not None:
                return simple
            if operator in ("add", "mul", "logical_and", "logical_or", "maximum", "minimum") and (
                isinstance(arguments[1], Ref)
            ):
                known = self._known.get(_key(operator, (arguments[1], arguments[0])))
                if known is not None:
                    return known
        return self._append(operator, arguments)

    def _append(self, operator: str, arguments: tuple[Argument, ...]) -> Ref:
        key = _key(operator, arguments)
        if key not in self._known:
            self.operations.append(Operation(operator, arguments))
            self._known[key] = Ref(len(self.inputs) + len(self.operations) - 1)
        return self._known[key]

    def _simplified(self, operator: str, arguments: tuple[Argument, ...]) -> Value | None:
        a, b = (*arguments, None, None)[:2]
        of_a, of_b = self.operation(a), self.operation(b)
        minus_a = of_a.arguments[0] if of_a is not None and of_a.operator == "neg" else None
        minus_b = of_b.arguments[0] if of_b is not None and of_b.operator == "neg" else None
        assert operator == "where" or isinstance(a, Ref)
        if operator == "detach":
            return as_value(a)
        if operator == "neg":
            if minus_a is not None:
                return as_value(minus_a)
            if of_a is not None and of_a.operator == "sub":
                return self.add("sub", of_a.arguments[1], of_a.arguments[0])
            if of_a is not None and of_a.operator == "rsub":
                return self.add("sub", *of_a.arguments)
        if operator in ("add", "sub") and b == 0:
            return as_value(a)
        if operator == "rsub" and b == 0:
            return self.add("neg", a)
        if operator in ("mul", "div") and b == -1:
            return self.add("neg", a)
        if operator in ("mul", "div"):
            if minus_a is not None and isinstance(b, float):
                return self.add(operator, minus_a, -b)
            if minus_a is not None:
                return self.add("neg", self.add(operator, minus_a, b))
            if minus_b is not None:
                return self.add("neg", self.add(operator, a, minus_b))
        if operator == "add" and minus_b is not None:
            return self.add("sub", a, minus_b)
        if operator == "add" and minus_a is not None:
            return self.add("sub", b, minus_a)
        if operator == "sub" and minus_b is not None:
            return self.add("add", a, minus_b)
        if operator == "rsub" and minus_a is not None:
            return self.add("add", minus_a, b)
        if operator == "where" and repr(arguments[1]) == repr(arguments[2]):
            return as_value(arguments[1])
        if operator == "logical_not" and of_a is not None and of_a.operator == "logical_not":
            return as_value(of_a.arguments[0])
        return None

    def build(self, outputs: Iterable[Ref | None]) -> Program:
        """The program with these outputs, without the operations that none of them needs."""
        outputs, count = tuple(outputs), len(self.inputs)
        needed = {output for output in outputs if output is not None}
        for index in reversed(range(len(self.operations))):
            if Ref(count + index) in needed:
                arguments = self.operations[index].arguments
                needed.update(argument for argument in arguments if isinstance(argument, Ref))
        new = {Ref(index): Ref(index) for index in range(count)}
        operations: list[Operation] = []
        for index, operation in enumerate(self.operations):
            old = Ref(count + index)
            if old in needed:
                arguments = tuple(new[a] if isinstance(a, Ref) else a for a in operation.arguments)
                new[old] = Ref(count + len(operations))
                operations.append(Operation(operation.operator, arguments, self.names.get(old, "")))
        results = tuple(None if output is None else new[output] for output in outputs)
        return Program(self.inputs, tuple(operations), results)


_SWAPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


def _tensor_first(
    operator: str, arguments: tuple[Argument, ...]
) -> tuple[str, tuple[Argument, ...]]:
    """The same operation with a tensor as its first argument, where one of two is a number."""
    if len(arguments) != 2:
        return operator, arguments
    a, b = arguments
    if operator == "sub" and not isinstance(a, Ref) and isinstance(b, Ref):
        return "rsub", (b, a)
    if operator == "rsub" and isinstance(b, Ref):
        return _tensor_first("sub", (b, a))
    if operator in ("maximum", "minimum") and not (isinstance(a, Ref) and isinstance(b, Ref)):
        a, b = (a, b) if isinstance(a, Ref) else (b, a)
        return ("clamp_min" if operator == "maximum" else "clamp_max"), (a, b)
    symmetric = ("add", "mul", "eq", "ne", *_SWAPPED)
    if operator in symmetric and not isinstance(a, Ref) and isinstance(b, Ref):
        return _SWAPPED.get(operator, operator), (b, a)
    return operator, arguments


def _key(operator: str, arguments: tuple[Argument, ...]) -> tuple[str, ...]:
    # repr tells 0.0 from -0.0, and NaN equals NaN
    return (operator, *map(repr, arguments))


def number_text(value: float) -> str:
    """A finite number, without a fraction where it has none."""
    whole = value == int(value) and abs(value) < 1e6 and repr(value) != "-0.0"
    return str(int(value)) if whole else repr(value)


def uses(program: Program) -> dict[Ref, int]:
    """How often each value is an argument or an output."""
    counts: dict[Ref, int] = {}
    everything: list[Argument] = [a for o in program.operations for a in o.arguments]
    for argument in (*everything, *program.outputs):
        if isinstance(argument, Ref):
            counts[argument] = counts.get(argument, 0) + 1
    return counts


class Text(NamedTuple):
    """The text of an expression, and how tightly it binds: the higher, the tighter."""

    text: str
    level: int

    def at(self, level: int) -> str:
        """The text as an operand where one that binds less tightly needs parentheses."""
        return self.text if self.level >= level else f"({self.text})"


COMPARING, SUM, PRODUCT, SIGNED, ATOM = range(5)
INFIX = {"add": (" + ", SUM), "sub": (" - ", SUM), "mul": (" * ", PRODUCT), "div": (" / ", PRODUCT)}
INFIX |= {
    operator: (f" {text} ", COMPARING)
    for operator, text in zip(COMPARISONS, ("==", "!=", "<", "<=", ">", ">="), strict=True)
}


def infix(operator: str, a: Text, b: Text) -> Text:
    """An operation that has a sign between its operands, in Python and in C++."""
    sign, level = INFIX[operator]
    left = level + 1 if level == COMPARING else level
    return Text(f"{a.at(left)}{sign}{b.at(level + 1)}", level)


class Syntax:
    """How a language writes numbers and operations."""

    repeating: frozenset[str] = frozenset()
    """Operators whose text has their first argument more than once."""

    def number(self, value: float) -> Text:
        """A constant."""
        raise NotImplementedError

    def operation(self, operator: str, arguments: list[Text], numbers: list[bool]) -> Text:
        """An operation; ``numbers`` says which of its arguments are numbers."""
        raise NotImplementedError

    def identifier(self, name: str) -> str:
        """A name that is allowed, and resembles this one; or an empty text."""
        raise NotImplementedError


def written(
    program: Program, inputs: Sequence[str], syntax: Syntax, taken: set[str]
) -> tuple[list[tuple[str, str]], list[str | None]]:
    """Writes a program as assignments.

    Args:
        program: What to write.
        inputs: The expressions that stand for its inputs.
        syntax: The language.
        taken: The names that must not be assigned to. The new ones are added.

    Returns:
        Pairs of a variable and its expression, and the expressions of the outputs.
    """
    counts = uses(program)
    texts = [Text(text, ATOM) for text in inputs]
    statements: list[tuple[str, str]] = []
    temporaries = 0
    repeated = {o.arguments[0] for o in program.operations if o.operator in syntax.repeating}
    for index, operation in enumerate(program.operations):
        arguments, numbers = [], []
        for argument in operation.arguments:
            if isinstance(argument, Ref):
                arguments.append(texts[argument.index])
            elif isinstance(argument, float):
                arguments.append(syntax.number(argument))
            else:
                arguments.append(Text(repr(argument), ATOM))
            numbers.append(isinstance(argument, float))
        text = syntax.operation(operation.operator, arguments, numbers)
        name = syntax.identifier(operation.name) if operation.name else ""
        value = Ref(len(program.inputs) + index)
        once = counts[value] == 1 and value not in repeated
        if not name and once and len(text.text) <= 60:
            texts.append(text)
            continue
        while name in taken:
            name += "_new" if not name.endswith("_new") else "_"
        while not name or name in taken:
            name = f"t{temporaries}"
            temporaries += 1
        taken.add(name)
        statements.append((name, text.text))
        texts.append(Text(name, ATOM))
    outputs = [None if output is None else texts[output.index].text for output in program.outputs]
    return statements, outputs


class _PythonSyntax(Syntax):
    _FUNCTIONAL = ("gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "silu")

    def number(self, value: float) -> Text:
        if not math.isfinite(value):
            return Text(f'float("{value}")', ATOM)
        text = number_text(value)
        return Text(text, SIGNED if text.startswith("-") else ATOM)

    def operation(self, operator: str, arguments: list[Text], numbers: list[bool]) -> Text:
        plain = [argument.text for argument in arguments]
        if operator in INFIX:
            return infix(operator, *arguments)
        if operator == "rsub":
            return infix("sub", arguments[1], arguments[0])
        if operator == "neg":
            return Text(f"-{arguments[0].at(SIGNED + 1)}", SIGNED)
        if operator == "gelu":
            plain[1] = f"approximate={plain[1]}"
        if operator == "elu":
            if plain[2:] == ["1", "1"]:
                return Text(f"F.elu({plain[0]}, {plain[1]})", ATOM)
            return Text(f"torch.ops.aten.elu({', '.join(plain)})", ATOM)
        if operator in ("log_sigmoid", "softplus") or operator in self._FUNCTIONAL:
            return Text(f"F.{operator.replace('log_', 'log')}({', '.join(plain)})", ATOM)
        return Text(f"torch.{operator}({', '.join(plain)})", ATOM)

    def identifier(self, name: str) -> str:
        return name if name.isidentifier() and not keyword.iskeyword(name) else ""
