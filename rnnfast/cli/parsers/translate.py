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
        description="Without TEXT and --model: train a sequence-to-sequence model (an LSTM\n"
        "encoder and an LSTM decoder) on pairs of texts, character by character. Then\n"
        "show how many held-out texts it translates exactly. Without --pairs, the texts\n"
        "are dates in many spellings, and the translations are their ISO 8601 forms.\n"
        "With TEXT or --model: print the translation of every TEXT, or of every line of\n"
        "standard input. For a text that cannot be translated, print an empty line and an\n"
        "error on standard error, translate the other texts, and exit with status 1.\n\n"
        "Ctrl-C or SIGTERM end the training. The model trained so far is written to DIR,\n"
        "or to DIR/unfinished if DIR has an older model, which is kept.\n\n"
        "In dates of numbers only, the day comes before the month (03/04/1997 is 3 April),\n"
        "unless the year comes first. Years of two digits lie between 1950 and 2049.",
        epilog="examples:\n"
        "  rnnfast translate\n"
        '  rnnfast translate "4 March 1997" "Tuesday the 4th of March, 1997"\n'
        "  rnnfast translate --model seq2seq-lstm --beam 5 < dates.txt\n"
        "  rnnfast translate --pairs words.tsv --hidden 256 --layers 2 --out words",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="a text to translate")
    parser.add_argument(
        "--model",
        type=path,
        metavar="DIR",
        help="folder that the training wrote, or a .safetensors file; by default the folder --out "
        "if TEXT is given",
    )
    parser.add_argument(
        "--beam",
        type=number(int, "from 1 to 1000, without fraction", lambda value: 1 <= value <= 1000),
        default=1,
        metavar="K",
        help="number of hypotheses in the beam search; 1 always takes the likeliest next character",
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
        help="UTF-8 file with a source, a tab and its target on each line; by default dates",
    )
    data.add_argument(
        "--validation",
        type=number(float, "between 0 and 1", lambda value: 0 < value < 1),
        default=0.1,
        metavar="FRACTION",
        help="fraction of the distinct sources, at the end of FILE, whose pairs are held out",
    )
    data.add_argument(
        "--examples", type=count, default=30000, metavar="N", help="number of dates to learn from"
    )
    model = parser.add_argument_group("training: model")
    model.add_argument("--hidden", type=count, default=128, metavar="N", help="hidden size")
    model.add_argument(
        "--layers",
        type=layers,
        default=1,
        metavar="N",
        help="number of layers in the encoder and in the decoder each",
    )
    model.add_argument(
        "--embedding", type=count, default=32, metavar="N", help="embedding size of a character"
    )
    model.add_argument(
        "--dropout",
        type=number(float, "at least 0 and below 1", lambda value: 0 <= value < 1),
        default=0.0,
        metavar="P",
        help="probability of dropout in training",
    )
    model.add_argument("--reverse", action="store_true", help="read the source backwards")
    training = parser.add_argument_group("training: course and result")
    training.add_argument(
        "--batch-size", type=count, default=64, metavar="N", help="number of pairs in a step"
    )
    training.add_argument(
        "--epochs", type=count, default=4, metavar="N", help="number of times all pairs are seen"
    )
    training.add_argument(
        "--max-seconds",
        type=number(float, "above zero, or inf", lambda value: value > 0),
        default=float("inf"),
        metavar="S",
        help="time limit for the training and the held-out texts together",
    )
    training.add_argument(
        "--lr", type=positive, default=6e-3, metavar="RATE", help="maximum learning rate of Adam"
    )
    training.add_argument(
        "--clip", type=positive, default=1.0, metavar="NORM", help="maximum norm of the gradient"
    )
    training.add_argument(
        "--teacher-forcing",
        type=number(float, "from 0 to 1", lambda value: 0 <= value <= 1),
        default=1.0,
        metavar="P",
        help="probability that the decoder reads the true previous character instead of its own; "
        "training is slower below 1",
    )
    training.add_argument("--seed", type=seed, default=0, metavar="N", help="random seed")
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
        help="replace the model in DIR when the training has ended",
    )
