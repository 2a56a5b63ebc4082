"""The arguments of `rnnfast doctor`."""

from __future__ import annotations

import argparse

from rnnfast.cli.arguments import Parser


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the others."""
    commands.add_parser(
        "doctor",
        help="say what was built and what will run here",
        description="Say which kernels were built, for what, and which will run on this machine.",
    )
