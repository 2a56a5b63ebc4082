"""A Sphinx extension: formulas of docstrings, which are plain text there, become MathML.

A paragraph of a docstring is taken for formulas if each of its lines is ``left = right``, such as
``h_t = tanh(W_ih x_t + b_ih)``. Formulas with words other than functions stay plain text, with
their line breaks. Browsers show MathML themselves, so that the pages need no script and no network.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

_FUNCTIONS = ("tanh", "relu", "sigmoid", "log_softmax", "softmax", "max", "cell", "layers")
_SYMBOLS = {"prod": r"\prod", "phi": r"\varphi", "xi": r"\xi", "pi": r"\pi"}
_NAME = re.compile(r"([A-Za-z]+)(?:_(\{[^}]*\}|\w+))?")
_REMARK = re.compile(r"^(.*?), ((?:in|with|from|where|after) .*)$")


class _UnknownWordError(ValueError):
    """A line has a word that is no function."""


def to_latex(line: str) -> str:
    """LaTeX for a formula in plain text, with a remark such as ", in each layer" after it.

    Raises:
        ValueError: There are words in it that are no functions.
    """
    match = _REMARK.match(line)
    formula, remark = match.groups() if match else (line, "")
    latex = _NAME.sub(_name, formula.rstrip(",."))
    latex = latex.replace("...", r"\ldots ").replace(" * ", r" \odot ").replace(" | ", r" \mid ")
    return latex + (rf"\quad\text{{{remark}}}" if remark else "")


def _name(match: re.Match[str]) -> str:
    whole, (base, index) = match[0], match.groups()
    if whole in _FUNCTIONS:
        return rf"\operatorname{{{whole.replace('_', ' ')}}}"
    if base in _SYMBOLS:
        base = _SYMBOLS[base]
    elif len(base) > 1:
        raise _UnknownWordError(whole)
    if index is None:
        return base + (" " if base.startswith("\\") else "")
    return f"{base}_{{{index.strip('{}')}}}"


def set_formulas(
    app: Any, what: str, name: str, thing: object, options: Any, lines: list[str]
) -> None:
    """Turns paragraphs of formulas into math, or into plain text with its line breaks."""
    result: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        formulas = _set(paragraph)
        if formulas and formulas is not paragraph:
            _end_literal_block(result)
        result += [*formulas, ""]
        paragraph = []
    lines[:] = result


def _end_literal_block(lines: list[str]) -> None:
    """Shortens a ``::`` at the end, which would set what follows as literal text, to a colon."""
    last = max((i for i, line in enumerate(lines) if line.strip()), default=None)
    if last is not None and lines[last].endswith("::"):
        lines[last] = lines[last].removesuffix(":")


def _set(paragraph: list[str]) -> list[str]:
    margins = {len(line) - len(line.lstrip()) for line in paragraph}
    stripped = [line.strip() for line in paragraph]
    if len(margins) != 1 or not all(map(_is_equation, stripped)):
        return paragraph
    margin = " " * margins.pop()
    try:
        body = [to_latex(line) for line in stripped]
        directive = ".. math::"
    except _UnknownWordError:
        body, directive = stripped, ".. code-block:: text"
    return [margin + directive, "", *(f"{margin}   {line}" for line in body)]


def _is_equation(line: str) -> bool:
    """Whether a line is ``left = right``, with a left side that is a formula."""
    left, equals, _ = line.partition(" = ")
    try:
        return bool(equals and to_latex(left))
    except _UnknownWordError:
        return False


def visit_inline(self: Any, node: Any) -> None:
    """Writes a formula within a line."""
    self.body.append(_to_mathml(node.astext(), as_block=False))
    raise import_module("docutils.nodes").SkipNode


def visit_displayed(self: Any, node: Any) -> None:
    """Writes a block of formulas, one on each line."""
    lines = filter(str.strip, node.astext().splitlines())
    self.body += [
        '<div class="math">',
        *(_to_mathml(line, as_block=True) for line in lines),
        "</div>",
    ]
    raise import_module("docutils.nodes").SkipNode


def _to_mathml(latex: str, as_block: bool) -> str:
    return import_module("docutils.utils.math.latex2mathml").tex2mathml(latex, as_block=as_block)


def setup(app: Any) -> dict[str, Any]:
    """Registers the functions above; before napoleon, which takes docstrings apart."""
    app.connect("autodoc-process-docstring", set_formulas, priority=400)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_displayed, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
