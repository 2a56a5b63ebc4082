"""The arguments of `rnnfast generate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rnnfast.cli.arguments import (
    DEFAULT_FOLDER,
    HelpFormatter,
    Parser,
    add_placement,
    add_temperature,
    count,
    prompt,
)


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the others."""
    parser = commands.add_parser(
        "generate",
        help="continue a text with a trained model",
        description="Continue a prompt, character by character, with a model of rnnfast train.",
        epilog='example:\n  rnnfast generate --prompt "The " --length 200 --temperature 0.5',
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=DEFAULT_FOLDER,
        metavar="DIR",
        help="folder that rnnfast train wrote, or a .safetensors file",
    )
    parser.add_argument(
        "--prompt", type=prompt, required=True, metavar="TEXT", help="what to continue"
    )
    parser.add_argument("--length", type=count, default=400, metavar="N", help="characters to add")
    add_temperature(parser)
    parser.add_argument(
        "--seed", type=int, metavar="N", help="makes the choice repeatable; if not given, it varies"
    )
    add_placement(parser)
