"""The arguments of `rnnfast doctor`."""

from __future__ import annotations

import argparse

from rnnfast.cli.arguments import Parser


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the others."""
    commands.add_parser(
        "doctor",
        help="show which kernels were built and which will run here",
        description="Show which kernels were built, for which instruction sets and GPUs, and which "
        "backend will run on this machine.",
    )
