"""The C++ header of a cell: a struct with ``forward`` and ``backward``, as in csrc/cells."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from rnnfast.custom.derivative import Derivative, derive
from rnnfast.custom.program import (
    ATOM,
    COMPARING,
    INFIX,
    PRODUCT,
    SIGNED,
    Argument,
    Operation,
    Program,
    Ref,
    Syntax,
    Text,
    infix,
    number_text,
    uses,
    written,
)


class CellFacts(NamedTuple):
    """What the drivers know of a cell: the constants of its struct."""

    gates: int
    """Blocks of rows in ``w_ih`` and ``w_hh``."""
    saved: int
    """Blocks that a step saves for the backward."""
    grad_blocks: int
    """Blocks of gate gradients. The last ``gates`` are those of ``w_hh``, the first those of
    ``w_ih``, in the order of ``input_gate``."""
    cells: int
    """States beside h."""
    parameters: int
    """Learnable vectors."""
    direct: bool
    """Whether h before the step is read, and its gradient beside that through ``w_hh`` written."""
    reads_h: bool
    """Whether the backward reads the new h."""


class Emission(NamedTuple):
    """A cell in C++."""

    struct: str
    """The name of the struct, in the namespace ``rnnfast``."""
    header: str
    """The text of the header."""
    facts: CellFacts
    derivative: Derivative
    """The programs that the header was written from."""
    input_gate: tuple[int, ...]
    """The gate of ``w_ih`` that each of the first ``gates`` gradient blocks belongs to."""


def emit(
    name: str,
    program: Program,
    gates: int,
    states: Sequence[str],
    parameters: Sequence[str] = (),
) -> Emission:
    """Writes the C++ header of a cell.

    Args:
        name: The cell's name, of which the struct's is made.
        program: What `rnnfast.custom.tracing.trace` returned.
        gates: How many gates the cell has.
        states: The names of its states, of which the first is h.
        parameters: The names of its learnable vectors.

    Returns:
        The header and what is to be known of it. They are the same in every process.

    Raises:
        CellError: A derivative needs an operator that has no kernel.
    """
    derivative = derive(program, gates, states, parameters)
    forward, backward, saved = derivative
    of_x, of_h = backward.outputs[:gates], backward.outputs[gates : 2 * gates]
    first = next((g for g in range(gates) if of_x[g] != of_h[g]), gates)
    extra = gates - first
    h_before, h_after = forward.inputs[2 * gates], f"new.{states[0]}"
    facts = CellFacts(
        gates=gates,
        saved=saved,
        grad_blocks=gates + extra,
        cells=len(states) - 1,
        parameters=len(parameters),
        direct=_reads(forward, h_before) or _reads(backward, h_before),
        reads_h=_reads(backward, h_after),
    )
    struct = _struct_name(name)
    header = _HEADER.format(
        source="".join(f"// {line}".rstrip() + "\n" for line in program.source("step").split("\n")),
        struct=struct,
        name=_identifier(name),
        direct=str(facts.direct).lower(),
        reads_h=str(facts.reads_h).lower(),
        input_gate=_input_gate(first, extra),
        forward=_forward(forward, facts, states),
        backward=_backward(derivative, facts, states, first),
        **{key: value for key, value in facts._asdict().items() if not isinstance(value, bool)},
    ).replace("//\n#pragma", "#pragma")
    order = tuple(first + j if j < extra else j - extra for j in range(gates))
    return Emission(struct, header, facts, derivative, order)


_HEADER = """\
// A cell made of this step in PyTorch:
//
{source}#pragma once

#include "cells/common.h"

namespace rnnfast {{

struct {struct} {{
  static constexpr const char* kName = "{name}";
  static constexpr int kGates = {gates};
  static constexpr int kSaved = {saved};  // blocks saved by forward for backward
  static constexpr int kGradBlocks = {grad_blocks};
  static constexpr int kCells = {cells};  // states beside h
  static constexpr int kParameters = {parameters};  // learnable vectors
  static constexpr bool kDirect = {direct};
  static constexpr bool kReadsH = {reads_h};
  RNNFAST_HD static constexpr int input_gate(int j) {{ return {input_gate}; }}

{forward}
{backward}}};

}}  // namespace rnnfast
"""


def _identifier(name: str) -> str:
    text = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return text if text[:1].isalpha() else f"cell_{text}".rstrip("_")


# names that csrc/cells has in the namespace of the structs
_STRUCTS = {"Compute", "ComputeType", "CellKind", "Dtype", "Elman", "ElmanRelu", "ElmanTanh"}
_STRUCTS |= {"ElmanTraits", "Gru", "Lstm", "ReluActivation", "TanhActivation"}


def _struct_name(name: str) -> str:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    struct = "".join(word.capitalize() for word in _identifier(words).split("_"))
    return f"{struct}Cell" if struct in _STRUCTS else struct


def _input_gate(first: int, extra: int) -> str:
    if extra == 0:
        return "j"
    start = f"{first} + j" if first else "j"
    return f"j < {extra} ? {start} : j - {extra}"


def _reads(program: Program, name: str) -> bool:
    return program.inputs.index(name) in {ref.index for ref in uses(program)}


# ---- functions ----


def _forward(program: Program, facts: CellFacts, states: Sequence[str]) -> str:
    cells, used = facts.cells, uses(program)
    first = 2 * facts.gates
    taken = {"from_x", "from_h", "h_prev", "parameters", "c", "h", "saved"}
    lines = []
    inputs = [f"from_x[{g}]" for g in range(facts.gates)]
    inputs += [f"from_h[{g}]" for g in range(facts.gates)]
    inputs.append("h_prev")
    for k in range(cells):
        name = _variable(f"{states[k + 1]}_prev", taken)
        if used.get(Ref(first + 1 + k)):
            lines.append(f"const V {name} = c[{k}];")
        inputs.append(name)
    inputs += [f"parameters[{i}]" for i in range(facts.parameters)]
    statements, outputs = written(_fused(program), inputs, _CppSyntax(), taken)
    lines += [f"const V {name} = {text};" for name, text in statements]
    targets = ["h", *(f"c[{k}]" for k in range(cells))]
    targets += [f"saved[{k}]" for k in range(facts.saved)]
    # h comes after the others, as it is often computed from them
    pairs = [*zip(targets, outputs, strict=True)]
    lines += [f"{target} = {text};" for target, text in [*pairs[1 : cells + 1], pairs[0]]]
    lines += [f"{target} = {text};" for target, text in pairs[cells + 1 :]]
    arguments = [
        *("const V* from_x", "const V* from_h", "V h_prev", "const V* parameters", "V* c"),
        *("V& h", "V* saved"),
    ]
    return _function("forward", arguments, lines)


def _backward(derivative: Derivative, facts: CellFacts, states: Sequence[str], first: int) -> str:
    program, (gates, cells) = derivative.backward, (facts.gates, facts.cells)
    taken = {"saved", "h", "h_prev", "c", "c_prev", "parameters"}
    taken |= {"d_h", "d_c", "d_h_direct", "d_gates"}
    lines, used = [], uses(program)
    names = _saved_names(derivative, states)
    inputs = []
    for k, name in enumerate(names):
        inputs.append(_variable(name, taken))
        lines.append(f"const V {inputs[-1]} = saved[{k}];")
    inputs += ["h_prev", *(f"c_prev[{k}]" for k in range(cells))]
    inputs += ["h", *(f"c[{k}]" for k in range(cells))]
    inputs += [f"parameters[{i}]" for i in range(facts.parameters)]
    inputs.append("d_h")
    for k in range(cells):
        name = _variable(f"d_{states[k + 1]}_new", taken)
        if used.get(Ref(len(inputs))):
            lines.append(f"const V {name} = d_c[{k}];")
        inputs.append(name)

    of_x, of_h = program.outputs[:gates], program.outputs[gates : 2 * gates]
    before = program.outputs[2 * gates : 2 * gates + cells + 1]
    blocks = [*of_x[first:], *of_h, *program.outputs[2 * gates + cells + 1 :]]
    targets = [f"d_gates[{j}]" for j in range(len(blocks))]
    targets += [f"d_c[{k}]" for k in range(cells)]
    results = [*blocks, *before[1:]]
    if facts.direct:
        targets.append("d_h_direct")
        results.append(before[0])
    shown = _fused(program._replace(outputs=tuple(results)))
    statements, outputs = written(shown, inputs, _CppSyntax(), taken)
    lines += [f"const V {name} = {text};" for name, text in statements]
    for target, text in zip(targets, outputs, strict=True):
        lines.append(f"{target} = {'V{}' if text is None else text};")
    arguments = [
        *("const V* saved", "V h", "V h_prev", "const V* c", "const V* c_prev"),
        *("const V* parameters", "V d_h", "V* d_c", "V& d_h_direct", "V* d_gates"),
    ]
    return _function("backward", arguments, lines)


def _saved_names(derivative: Derivative, states: Sequence[str]) -> list[str]:
    """The names of the saved values in the user's function, or short ones."""
    forward = derivative.forward
    names = []
    for k, output in enumerate(forward.outputs[len(states) :]):
        assert output is not None
        position = output.index - len(forward.inputs)
        name = forward.operations[position].name if position >= 0 else ""
        if not name and position < 0:
            name = "from_" + re.sub(r"\W", "", forward.inputs[output.index])  # from_h2
        names.append(name or f"saved_{k}")
    return names


def _function(name: str, arguments: list[str], lines: list[str]) -> str:
    body = "\n".join(lines)
    shown = []
    for argument in arguments:
        kind, variable = argument.rsplit(" ", 1)
        used = re.search(rf"\b{variable}\b", body)
        shown.append(argument if used else f"{kind} /*{variable}*/")
    start = f"  RNNFAST_HD static void {name}("
    signature = _wrapped(start + ", ".join(shown) + ") {", " " * len(start))
    text = ["  template <class M, class V>", *signature]
    for line in lines:
        text += _wrapped(f"    {_typed(line)}", " " * 8)
    return "\n".join([*text, "  }"]) + "\n"


def _typed(line: str) -> str:
    # the results of comparisons are masks, whose type is not V
    mask = re.match(r"const V (\w+) = (.*);$", line)
    if mask and mask[2].startswith(_MASK):
        return f"const auto {mask[1]} = {mask[2][len(_MASK) :]};"
    return line.replace(_MASK, "")


def _wrapped(line: str, indent: str) -> list[str]:
    lines = []
    while len(line) > 100:
        starts = [m.end() for m in re.finditer(r", | [-+*/?&|<>=]+ ", line[:100])]
        at = max((s for s in starts if s > len(indent) + 10), default=0)
        if not at:
            break
        lines.append(line[:at].rstrip())
        line = indent + line[at:]
    return [*lines, line]


# ---- expressions ----

_MASK = "\0"  # before the text of a comparison that gets a variable


def _fused(program: Program) -> Program:
    """The program with multiply-adds, where a product is used only there."""
    counts, count = uses(program), len(program.inputs)
    operations = list(program.operations)

    def product(value: Argument) -> tuple[Argument, ...] | None:
        if not isinstance(value, Ref) or value.index < count or counts[value] != 1:
            return None
        operation = program.operations[value.index - count]
        return operation.arguments if operation.operator == "mul" else None

    for index, (operator, arguments, name) in enumerate(operations):
        if counts.get(Ref(count + index), 0) == 0 or operator not in ("add", "sub", "rsub"):
            continue
        a, b = arguments
        if operator == "add" and (factors := product(a)) is not None:
            operations[index] = Operation("fma", (*factors, b), name)
        elif operator == "add" and (factors := product(b)) is not None:
            operations[index] = Operation("fma", (*factors, a), name)
        elif operator == "sub" and (factors := product(b)) is not None:
            operations[index] = Operation("fnma", (*factors, a), name)
        elif operator == "rsub" and (factors := product(a)) is not None:
            if b == 1 and factors[0] == factors[1]:
                operations[index] = Operation("one_minus_square", factors[:1], name)
            else:
                operations[index] = Operation("fnma", (*factors, b), name)
    return _without_dead(program._replace(operations=tuple(operations)))


def _without_dead(program: Program) -> Program:
    count = len(program.inputs)
    needed = {output for output in program.outputs if output is not None}
    for index in reversed(range(len(program.operations))):
        if Ref(count + index) in needed:
            arguments = program.operations[index].arguments
            needed.update(a for a in arguments if isinstance(a, Ref))
    new = {Ref(index): Ref(index) for index in range(count)}
    operations: list[Operation] = []
    for index, (operator, arguments, name) in enumerate(program.operations):
        if Ref(count + index) in needed:
            new[Ref(count + index)] = Ref(count + len(operations))
            moved = tuple(new[a] if isinstance(a, Ref) else a for a in arguments)
            operations.append(Operation(operator, moved, name))
    outputs = tuple(None if output is None else new[output] for output in program.outputs)
    return Program(program.inputs, tuple(operations), outputs)


_RESERVED = frozenset(
    re.findall(
        r"\w+",
        """
        alignas alignof and and_eq asm assert auto bitand bitor bool break case catch char
        char8_t char16_t char32_t class compl concept const consteval constexpr constinit
        const_cast continue co_await co_return co_yield decltype default delete do double
        dynamic_cast else enum errno explicit export extern false float for friend goto if
        inline int linux long major minor mutable namespace new noexcept not not_eq nullptr
        operator or or_eq private protected public register reinterpret_cast requires return
        short signed sizeof static static_assert static_cast stderr stdin stdout struct switch
        template this thread_local throw true try typedef typeid typename typeof union unix
        unsigned using virtual void volatile wchar_t while xor xor_eq
        """,
    )
)
"""Keywords of C++ and macros of its headers."""


def _safe(name: str) -> str:
    name = name.lower()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or "__" in name:
        return ""
    return f"{name}_" if name in _RESERVED else name


def _variable(name: str, taken: set[str]) -> str:
    plain = name = _safe(name) or "value"
    number = 1
    while name in taken:
        name = f"{plain}_{number}"
        number += 1
    taken.add(name)
    return name


_FUNCTIONS = {"where": "select", "clamp_min": "maximum", "clamp_max": "minimum"}


class _CppSyntax(Syntax):
    repeating = frozenset({"relu"})

    def number(self, value: float) -> Text:
        if math.isnan(value):
            return Text('__builtin_nan("")', ATOM)
        if math.isinf(value):
            text = "__builtin_huge_val()"
            return Text(text, ATOM) if value > 0 else Text(f"-{text}", SIGNED)
        text = number_text(value)
        return Text(text, SIGNED if text.startswith("-") else ATOM)

    def _vector(self, argument: Text, is_number: bool) -> str:
        """The text of an argument that must be a vector."""
        if not is_number:
            return argument.text
        return "V{}" if argument.text == "0" else f"V{{}} + {argument.text}"

    def operation(self, operator: str, arguments: list[Text], numbers: list[bool]) -> Text:
        arguments = [Text(text.removeprefix(_MASK), level) for text, level in arguments]
        if operator in INFIX:
            result = infix(operator, *arguments)
            return Text(_MASK + result.text, COMPARING) if result.level == COMPARING else result
        first = arguments[0]
        if operator == "full_like":
            return Text(self._vector(arguments[1], True), PRODUCT - 1)
        if operator == "rsub":
            return infix("sub", arguments[1], first)
        if operator == "neg":
            return infix("mul", Text("-1", SIGNED), first)
        if operator == "reciprocal":
            return infix("div", Text("1", ATOM), first)
        if operator == "relu":
            return Text(f"M::select({first.text} < V{{}}, V{{}}, {first.text})", ATOM)
        vectors = [self._vector(*pair) for pair in zip(arguments, numbers, strict=True)]
        text = f"M::{_FUNCTIONS.get(operator, operator)}({', '.join(vectors)})"
        return Text(_MASK + text if operator.startswith("logical_") else text, ATOM)

    def identifier(self, name: str) -> str:
        return _safe(name)
