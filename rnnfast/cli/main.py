"""Dispatches to the commands, and reports errors in one line on stderr."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rnnfast import backend
from rnnfast.cli.arguments import Parser
from rnnfast.cli.parsers import build_parser

# Parts of torch's messages about sizes that exceed the memory or the range of its integers.
_TOO_LARGE = (
    *("allocate memory", "not enough memory", "out of memory", "could not allocate"),
    *("overflow", "Overflow", "too large"),
)
_SIZES = ("hidden", "layers", "embedding", "batch_size", "seq_length", "length", "size")
_EXTRAS = ("matplotlib", "numpy", "safetensors", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` if None) and return its exit code.

    Raises:
        SystemExit: with code 2 after an error of the user, with code 0 after `--help` and
            `--version`.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    with _brief_warnings():
        return _run(parser, options)


def _run(parser: Parser, options: argparse.Namespace) -> int:
    if "backend" in options:
        try:
            probe = torch.empty(0, device=options.device)
            options.backend = backend.choose(options.backend, probe)
        except (RuntimeError, ValueError) as error:  # from the option or RNNFAST_BACKEND
            parser.error(str(error))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Escape characters that the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    try:
        importlib.import_module(f"rnnfast.cli.{options.command}").run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, for example head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        remedy = "pip install --no-build-isolation '.[cli]' in the folder of rnnfast"
        parser.error(f"this command needs {error.name}, of the extra cli: {remedy}")
    except OSError as error:
        parser.error(_describe(error))
    except (ArithmeticError, MemoryError, ValueError) as error:
        parser.error(str(error) or _describe_memory(options))
    except RuntimeError as error:
        if not any(words in str(error) for words in _TOO_LARGE):
            raise
        parser.error(_describe_memory(options))
    return 0


def _describe(error: OSError) -> str:
    """The message of the operating system with the name of the file, without the error number."""
    if error.strerror is None:
        return str(error)
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{files}: {error.strerror}" if files else error.strerror


def _describe_memory(options: argparse.Namespace) -> str:
    """An error message about too little memory, with the options that reduce the need for it."""
    flags = [f"--{name.replace('_', '-')}" for name in _SIZES if name in options]
    remedy = f": a smaller {' or '.join(flags)} needs less" if flags else ""
    return f"this needs more memory than there is{remedy}"


@contextmanager
def _brief_warnings() -> Iterator[None]:
    """Print each warning in one line, without the line of source code that issued it."""

    def describe(message: Warning | str, *_: object, **__: object) -> str:
        return f"rnnfast: warning: {message}\n"

    before, warnings.formatwarning = warnings.formatwarning, describe
    try:
        yield
    finally:
        warnings.formatwarning = before
