"""The arguments of `rnnfast train`."""

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
    number,
    positive,
    prompt,
)


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the others."""
    parser = commands.add_parser(
        "train",
        help="train a character model on a text",
        description="Train an LSTM to predict a text character by character, and show what it\n"
        "learnt: validation loss beside a bigram model's, a sample, the speed beside\n"
        "torch.nn.LSTM, a plot of the loss, and the weights for rnnfast generate.",
        epilog="examples:\n"
        "  rnnfast train\n"
        "  rnnfast train --text book.txt --hidden 512 --layers 2 --dropout 0.2 --max-seconds 1800",
        formatter_class=HelpFormatter,
    )
    data = parser.add_argument_group("text")
    data.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to learn; if not given, the manual that comes with Python",
    )
    data.add_argument(
        "--validation",
        type=number(float, "between 0 and 1", lambda value: 0 < value < 1),
        default=0.1,
        metavar="FRACTION",
        help="how much of the text, at its end, is kept to judge the model by",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--hidden", type=count, default=256, metavar="N", help="size of the state")
    model.add_argument("--layers", type=count, default=1, metavar="N", help="LSTM layers")
    model.add_argument(
        "--embedding", type=count, default=128, metavar="N", help="size of a character's vector"
    )
    model.add_argument(
        "--dropout",
        type=number(float, "at least 0 and below 1", lambda value: 0 <= value < 1),
        default=0.1,
        metavar="P",
        help="fraction of the activations zeroed in training",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--seq-length", type=count, default=64, metavar="N", help="characters a gradient spans"
    )
    training.add_argument(
        "--batch-size", type=count, default=32, metavar="N", help="places read in parallel"
    )
    training.add_argument(
        "--epochs", type=count, default=6, metavar="N", help="times the text is read"
    )
    training.add_argument(
        "--max-seconds",
        type=positive,
        default=110.0,
        metavar="S",
        help="end the training by then, whatever the epochs",
    )
    training.add_argument(
        "--lr", type=positive, default=4e-3, metavar="RATE", help="highest learning rate of Adam"
    )
    training.add_argument(
        "--clip", type=positive, default=1.0, metavar="NORM", help="longest gradient allowed"
    )
    training.add_argument("--seed", type=int, default=0, metavar="N", help="makes a run repeatable")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_FOLDER,
        metavar="DIR",
        help="folder for model.safetensors and loss.png",
    )
    output.add_argument(
        "--prompt",
        type=prompt,
        metavar="TEXT",
        help="what the sample continues; if not given, the first four characters of the text",
    )
    output.add_argument(
        "--sample-length", type=count, default=400, metavar="N", help="characters to sample"
    )
    add_temperature(output)
    add_placement(parser)
