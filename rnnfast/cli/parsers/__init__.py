"""The arguments of the commands, one module for each.

These modules must not import the optional packages that a command needs, so that `--help` works
without them.
"""

from __future__ import annotations

import importlib
import pkgutil

import rnnfast
from rnnfast.cli.arguments import Parser


def build_parser() -> Parser:
    """The parser of `rnnfast`, which stores the name of the chosen command in `command`."""
    parser = Parser(prog="rnnfast", description="Fast recurrent networks for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {rnnfast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}").add(commands)
    return parser
