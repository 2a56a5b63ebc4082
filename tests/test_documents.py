"""README and documents: their code runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from rnnfast.backend import EXTENSION
from rnnfast.cli import parsers
from rnnfast.cli.parsers import build_parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "csrc/**/*.md", "benchmarks/**/*.md", "rnnfast/**/*.md")
    for path in ROOT.glob(pattern)
)
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
BUILT = EXTENSION is not None or os.environ.get("RNNFAST_EXPECT_EXTENSION") != "0"

FENCE = re.compile(r"^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.M | re.S)
HEADING = re.compile(r"^#+ (.+)$", re.M)
LINK = re.compile(r"\]\(([^()\s]+)\)")
LANGUAGES = {"python", "sh", "c", "diff", "text", "{eval-rst}"}


class Block(NamedTuple):
    """Code in a document, and where it is: the path, and the line before the first of it."""

    document: str
    line: int
    language: str
    code: str


def blocks() -> Iterator[Block]:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("code"))
            yield Block(name_of(path), line, match["language"], match["code"])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A document without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))


def python_blocks() -> list[Any]:
    found = []
    for document, line, language, code in blocks():
        if language == "python":
            marks = [pytest.mark.full] if "aoti_compile" in code else []
            found.append(
                pytest.param(document, line, code, id=f"{document}-{line + 1}", marks=marks)
            )
    return found


def test_no_code_is_overlooked():
    assert ROOT / "README.md" in DOCUMENTS
    for path in DOCUMENTS:
        fences = re.findall(r"^ *```(\S+)", path.read_text(encoding="utf-8"), re.M)
        found = [block.language for block in blocks() if block.document == name_of(path)]
        assert fences == found, path
        assert set(found) <= LANGUAGES, path
    assert len(python_blocks()) >= 20


@pytest.mark.skipif(
    not (BUILT and COMPILER), reason="exports need the extension, and compiling a compiler"
)
@pytest.mark.parametrize(("document", "line", "code"), python_blocks())
def test_python_runs_as_printed(document, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile("\n" * line + code, ROOT / document, "exec"), {"__name__": "__main__"})


@pytest.mark.skipif(not COMPILER, reason="needs a compiler")
@pytest.mark.parametrize(
    ("language", "code"),
    [
        pytest.param(block.language, block.code, id=f"{block.document}-{block.line + 1}")
        for block in blocks()
        if block.language == "c"
    ],
)
def test_c_compiles_as_printed(language: str, code: str) -> None:
    flags = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc/c'}"]
    command = [COMPILER, *flags, "-x", language, "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Commands


def shell_commands() -> list[Any]:
    """The commands of fenced blocks, and of indented lines that begin with one."""
    found = []
    for document, line, language, code in blocks():
        if language == "sh":
            lines = code.replace("\\\n", " ").splitlines()
            found += [(document, line, words) for text in lines for words in commands_in(text)]
    for path in DOCUMENTS:
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        for indented in re.findall(r"^    (\S.*)$", text, re.M):
            if indented.split()[0] in CHECKS:
                found += [(name_of(path), 0, words) for words in commands_in(indented)]
    return [
        pytest.param(words, id=f"{document}-{line + 1}-{shlex.join(words)}")
        for document, line, words in found
    ]


def commands_in(line: str) -> Iterator[list[str]]:
    """The commands of a line, without what is redirected and without comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    tokens = iter(lexer)
    for token in tokens:
        if token in ("&&", "||", "|", ";", "&"):
            yield words
            words = []
        elif token in ("<", ">", ">>"):
            next(tokens)
        else:
            words.append(token)
    if words:
        yield words


def check_command(words: list[str]) -> None:
    words = list(words)
    while re.match(r"\w+=", words[0]):
        name = words.pop(0).partition("=")[0]
        assert not name.startswith("RNNFAST_") or name in settings(), f"nothing reads {name}"
    command, *arguments = words
    if command.startswith((".venv/bin/", ".venv-cuda/bin/")):
        command = Path(command).name
    if "/" in command:
        assert os.access(ROOT / command, os.X_OK), f"{command} cannot be executed"
        return
    assert command in CHECKS, f"nothing here knows how to check {command}"
    CHECKS[command](arguments)


def settings() -> set[str]:
    """The environment variables of this package that something reads."""
    files = [ROOT / "setup.py", *ROOT.glob("rnnfast/*.py"), *ROOT.glob("csrc/cpu/*.cpp")]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    return set(re.findall(r'"(RNNFAST_\w+)"', text))


def check_rnnfast(arguments: list[str]) -> None:
    code: object = 0
    try:
        build_parser().parse_args(arguments)
    except SystemExit as end:  # of --help, too
        code = end.code
    assert code == 0, "the command line does not take these arguments"


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        variable = word.partition("=")[0]
        if variable != word:
            assert f"$({variable})" in makefile or f"{variable} ?=" in makefile, f"no {variable}"
        elif not word.startswith("-"):
            assert re.search(rf"^{re.escape(word)}:", makefile, re.M), f"no target {word}"


def check_pip(arguments: list[str]) -> None:
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = metadata.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for previous, word in zip(["", *arguments], arguments, strict=False):
        if previous in ("-r", "-c"):
            assert (ROOT / word).is_file(), f"no file {word}"
        for extra in re.findall(r"[\w-]+", "".join(re.findall(r"^(?:\.|rnnfast)\[(.*)\]$", word))):
            assert re.search(rf"^{extra} = ", extras, re.M), f"no extra {extra}"


def check_python(arguments: list[str]) -> None:
    option, *rest = arguments
    if option == "-c":
        compile(rest[0], "<command>", "exec")
    elif option == "-m":
        check_module(*rest)
    else:
        assert (ROOT / option).is_file(), f"no file {option}"


def check_module(name: str, *arguments: str) -> None:
    if name in CHECKS:
        CHECKS[name](list(arguments))
    elif name == "pytest":
        paths = [word.partition("::")[0] for word in arguments if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths), f"not all there: {paths}"
    elif name.startswith(("benchmarks.", "tests.")):
        check_own_module(name, list(arguments))
    else:
        assert name in ("venv", "build"), f"nothing here knows how to check {name}"


class _ParsedError(Exception):
    """The arguments of a program are in order; it is not to run."""


def check_own_module(name: str, arguments: list[str]) -> None:
    """Runs a program of the repository until it has parsed its arguments."""
    source = ROOT.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    assert "__main__" in source, f"{name} is no program"
    if "ArgumentParser(" not in source:
        assert not arguments, f"{name} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: Any, *args: Any) -> None:
        parse(self, *args)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(sys, "argv", [name, *arguments])
        patch.syspath_prepend(str(ROOT))
        patch.delitem(sys.modules, name, raising=False)
        with pytest.raises(_ParsedError):
            runpy.run_module(name, run_name="__main__")


def check_torchrun(arguments: list[str]) -> None:
    place = arguments.index("-m")
    check_module(*arguments[place + 1 :])


def check_nothing(arguments: list[str]) -> None:
    """General tools, of which nothing here could be wrong."""


CHECKS = {
    "rnnfast": check_rnnfast,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    "torchrun": check_torchrun,
    "git": check_nothing,
    "cd": check_nothing,
    "source": check_nothing,
}


def test_wrong_commands_are_found():
    for command in (
        "rnnfast trane",
        "rnnfast train --hiden 3",
        "RNNFAST_BACKENT=aten rnnfast train",
        "make tset",
        "make bench RESULT=x",
        "pip install '.[clii]'",
        "python -m benchmarks.compare --pears torch",
        "python -m benchmarks.lines --all",
        "python -m pytest tests/test_nothing.py",
        "torchrun --nproc-per-node 2 -m rnnfast trane",
        "rnnfastt train",
        ".ci/rum",
    ):
        with pytest.raises((AssertionError, FileNotFoundError, SystemExit, pytest.fail.Exception)):
            check_command(*commands_in(command))


@pytest.mark.parametrize("words", shell_commands())
def test_commands_exist(words):
    check_command(words)


# Links and the site


def slugs(path: Path) -> set[str]:
    """The anchors that GitHub and the site give to the headings of a document."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for link in LINK.findall(prose(path)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            assert anchor in slugs(target), link


def load(name: str) -> ModuleType:
    """A module of the site's configuration."""
    spec = spec_from_file_location(name, ROOT / f"rnnfast/docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_has_every_document():
    configuration = load("conf")
    listed = [page for pages in configuration.PAGES.values() for page in pages]
    assert len(listed) == len(set(listed))
    documents = {name_of(path).removesuffix(".md") for path in DOCUMENTS}
    assert {configuration.root_doc, *listed} == documents


PUBLIC = ["rnnfast", *(f"rnnfast.{name}" for name in ("functional", "models", "text", "explain"))]
PUBLIC += ["rnnfast.onnx", "rnnfast.cli"]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_site_has_every_public_module(name):
    text = (ROOT / f"rnnfast/docs/api/{name.rpartition('.')[2]}.md").read_text(encoding="utf-8")
    assert re.search(rf"(?:auto)?module:: {name}\n", text)
    whole = re.search(rf"automodule:: {name}\n   :members:\n", text)
    for member in getattr(importlib.import_module(name), "__all__", ()):
        if not whole and find_spec(f"{name}.{member}") is None:
            assert re.search(rf"\b{member}$", text, re.M), member


def test_the_site_has_every_command():
    commands = {command.split()[0] for command in load("conf").COMMANDS}
    assert commands == {module.name for module in pkgutil.iter_modules(parsers.__path__)}


def test_formulas_of_docstrings_become_math():
    lines = [
        "Elman layers, h' = tanh or relu of (W_ih x + b_ih).",
        "",
        "h_t = tanh(W_ih x_t + h_{t-1}), with t from 1 to T",
        "c' = f * c",
        "",
        "    P(y | x) = prod_t P(y_t | x),    y_0 = start",
    ]
    load("formulas").set_formulas(None, "class", "", None, None, lines)
    assert lines == [
        "Elman layers, h' = tanh or relu of (W_ih x + b_ih).",
        "",
        ".. math::",
        "",
        r"   h_{t} = \operatorname{tanh}(W_{ih} x_{t} + h_{t-1})\quad\text{with t from 1 to T}",
        r"   c' = f \odot c",
        "",
        "    .. code-block:: text",
        "",
        "       P(y | x) = prod_t P(y_t | x),    y_0 = start",
        "",
    ]
