"""The arguments of `rnnfast translate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rnnfast.cli.arguments import (
    HelpFormatter,
    Parser,
    add_placement,
    count,
    layers,
    number,
    path,
    positive,
    seed,
)


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the others."""
    parser = commands.add_parser(
        "translate",
        help="train a sequence-to-sequence model on dates, and translate with it",
        description="Without TEXT and --model: train one LSTM to read a text and another to write\n"
        "its translation, character by character, and show how many held-out texts\n"
        "come out right. Unless --pairs says otherwise, the texts are dates in many\n"
        "spellings, and their translations the ISO 8601 form.\n"
        "With TEXT or --model: print the translation of every TEXT, or of every line of\n"
        "standard input. A text that cannot be translated gets an empty line, a notice on\n"
        "standard error, and in the end exit status 1; the others go on.\n\n"
        "Ctrl-C or SIGTERM end the training; what it has learnt so far is kept in DIR, or\n"
        "in DIR/unfinished if DIR has an older model, which stays.\n\n"
        "In dates of numbers alone the day comes before the month (03/04/1997 is 3 April),\n"
        "unless the year comes first; years of two digits are 1950 to 2049.",
        epilog="examples:\n"
        "  rnnfast translate\n"
        '  rnnfast translate "4 March 1997" "Tuesday the 4th of March, 1997"\n'
        "  rnnfast translate --model seq2seq-lstm --beam 5 < dates.txt\n"
        "  rnnfast translate --pairs words.tsv --hidden 256 --layers 2 --out words",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to translate")
    parser.add_argument(
        "--model",
        type=path,
        metavar="DIR",
        help="folder that the training wrote, or a .safetensors file; if only TEXT is given, the "
        "folder of --out",
    )
    parser.add_argument(
        "--beam",
        type=number(int, "from 1 to 1000, without fraction", lambda value: 1 <= value <= 1000),
        default=1,
        metavar="K",
        help="hypotheses to follow; 1 always takes the likeliest next character",
    )
    _add_training(parser)
    add_placement(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    """The arguments that only the training reads."""
    data = parser.add_argument_group("training: what to learn")
    data.add_argument(
        "--pairs",
        type=path,
        metavar="FILE",
        help="UTF-8 lines of source, tab, target to learn; if not given, dates",
    )
    data.add_argument(
        "--validation",
        type=number(float, "between 0 and 1", lambda value: 0 < value < 1),
        default=0.1,
        metavar="FRACTION",
        help="how many of the different sources, at the end of FILE, are kept with their pairs "
        "to judge the model by",
    )
    data.add_argument(
        "--examples", type=count, default=30000, metavar="N", help="dates to learn from"
    )
    model = parser.add_argument_group("training: model")
    model.add_argument("--hidden", type=count, default=128, metavar="N", help="size of the state")
    model.add_argument(
        "--layers", type=layers, default=1, metavar="N", help="LSTM layers of encoder and decoder"
    )
    model.add_argument(
        "--embedding", type=count, default=32, metavar="N", help="size of a character's vector"
    )
    model.add_argument(
        "--dropout",
        type=number(float, "at least 0 and below 1", lambda value: 0 <= value < 1),
        default=0.0,
        metavar="P",
        help="fraction of the activations zeroed in training",
    )
    model.add_argument("--reverse", action="store_true", help="read the source backwards")
    training = parser.add_argument_group("training: course and result")
    training.add_argument(
        "--batch-size", type=count, default=64, metavar="N", help="pairs in a step"
    )
    training.add_argument(
        "--epochs", type=count, default=4, metavar="N", help="times all pairs are seen"
    )
    training.add_argument(
        "--max-seconds",
        type=number(float, "above zero, or inf", lambda value: value > 0),
        default=float("inf"),
        metavar="S",
        help="end by then, whatever the epochs, and however many held-out texts are left to judge",
    )
    training.add_argument(
        "--lr", type=positive, default=6e-3, metavar="RATE", help="highest learning rate of Adam"
    )
    training.add_argument(
        "--clip", type=positive, default=1.0, metavar="NORM", help="longest gradient allowed"
    )
    training.add_argument(
        "--teacher-forcing",
        type=number(float, "from 0 to 1", lambda value: 0 <= value <= 1),
        default=1.0,
        metavar="P",
        help="how often the decoder reads the true character rather than its own; below 1 slower",
    )
    training.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="makes a run repeatable"
    )
    training.add_argument(
        "--out",
        type=path,
        default=Path("seq2seq-lstm"),
        metavar="DIR",
        help="folder for model.safetensors",
    )
    training.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the model that is in DIR, once the training has ended",
    )
