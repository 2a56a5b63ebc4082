"""The arguments of every command: a module each, which must not import what the command needs."""

from __future__ import annotations

import importlib
import pkgutil

import rnnfast
from rnnfast.cli.arguments import Parser


def build_parser() -> Parser:
    """The parser of `rnnfast`; the chosen command's name ends up in `command`."""
    parser = Parser(prog="rnnfast", description="Fast recurrent networks for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {rnnfast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}").add(commands)
    return parser
