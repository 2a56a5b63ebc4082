"""The arguments of `rnnfast generate`."""

from __future__ import annotations

import argparse

from rnnfast.cli.arguments import (
    DEFAULT_FOLDER,
    HelpFormatter,
    Parser,
    add_placement,
    add_temperature,
    count,
    number,
    path,
    prompt,
    seed,
)


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the others."""
    parser = commands.add_parser(
        "generate",
        help="continue a text with a trained model",
        description="Continue a prompt, character by character, with a model of rnnfast train.\n"
        "The next character is drawn at random from the model's probabilities; --temperature,\n"
        "--top-k and --top-p change these probabilities.",
        epilog="examples:\n"
        '  rnnfast generate --prompt "The " --length 200 --temperature 0.5\n'
        '  rnnfast generate --prompt "The " --top-p 0.9 --stop ". " --seed 1\n'
        '  rnnfast generate --prompt "The " "A class " --greedy',
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=path,
        default=DEFAULT_FOLDER,
        metavar="DIR",
        help="folder that rnnfast train wrote, or a .safetensors file",
    )
    parser.add_argument(
        "--prompt",
        type=prompt,
        nargs="+",
        required=True,
        metavar="TEXT",
        help="the text to continue; several texts are continued together",
    )
    parser.add_argument("--length", type=count, default=400, metavar="N", help="characters to add")
    add_temperature(parser)
    parser.add_argument(
        "--top-k", type=count, metavar="N", help="draw from the N likeliest characters only"
    )
    parser.add_argument(
        "--top-p",
        type=number(float, "above 0 and at most 1", lambda value: 0 < value <= 1),
        metavar="P",
        help="draw from the fewest likeliest characters whose probabilities sum to P or more",
    )
    parser.add_argument(
        "--stop", type=prompt, metavar="TEXT", help="end before the first occurrence of this text"
    )
    parser.add_argument(
        "--seed",
        type=seed,
        metavar="N",
        help="random seed; by default the result varies",
    )
    add_placement(parser)
