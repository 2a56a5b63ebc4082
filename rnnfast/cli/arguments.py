"""Argument types and groups of arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

DEFAULT_FOLDER = Path("char-lstm")


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


class Noted(argparse.Action):
    """Stores the value (True for a flag), and adds the name of the option to the set `given`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Store the value; the parser calls this only for options on the command line."""
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


class NotedFlag(Noted):
    """The action "store_true", which also adds the name of the option to the set `given`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, **options)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults other than None, and keeps the line breaks of descriptions and examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def add_temperature(parser: argparse._ActionsContainer) -> None:
    """Add `--temperature` and `--greedy`."""
    parser.add_argument(
        "--temperature",
        type=positive,
        default=0.8,
        metavar="T",
        help="divides the logits: below 1 unlikely characters become rarer, above 1 more frequent",
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest character")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--backend`."""
    group = parser.add_argument_group("where to run")
    group.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    group.add_argument(
        "--backend",
        choices=("fused", "aten", "reference"),
        help="backend of the layers; by default the fastest available (see rnnfast doctor)",
    )


def number(
    kind: type[int] | type[float], expected: str, accepts: Callable[[float], bool]
) -> Callable[[str], float]:
    """Make an argument type: numbers for which `accepts` returns true."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected a number {expected}, got {text!r}")
        return value

    return parse


count = number(int, "of 1 or more, without fraction", lambda value: 1 <= value < 2**31)
layers = number(int, "from 1 to 1000, without fraction", lambda value: 1 <= value <= 1000)
seed = number(int, "from 0 to 2**63 - 1, without fraction", lambda value: 0 <= value < 2**63)
positive = number(float, "above zero", lambda value: 0 < value < float("inf"))


def path(text: str) -> Path:
    """An argument type: the name of a file or folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file or folder, got an empty one")
    return Path(text)


def prompt(text: str) -> str:
    """An argument type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected at least one character, got none")
    return text


def device(text: str) -> torch.device:
    """An argument type: a device that is available here."""
    try:
        found = torch.empty(0, device=text).device
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError(f"expected cpu or cuda, got {found.type}")
        return found
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"device {text!r} cannot be used: {reason}") from None
