"""The arguments of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

DEFAULT_FOLDER = Path("char-lstm")


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults other than None, and keeps the line breaks of descriptions and examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> Parser:
    """The parser of `rnnfast`; the chosen command's name ends up in `command`."""
    parser = Parser(prog="rnnfast", description="Fast recurrent networks for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_generate(commands)
    commands.add_parser(
        "doctor",
        help="say what was built and what will run here",
        description="Say which kernels were built, for what, and which will run on this machine.",
    )
    return parser


def _add_train(commands: argparse._SubParsersAction[Parser]) -> None:
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
        type=_number(float, "between 0 and 1", lambda value: 0 < value < 1),
        default=0.1,
        metavar="FRACTION",
        help="how much of the text, at its end, is kept to judge the model by",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--hidden", type=_count, default=256, metavar="N", help="size of the state")
    model.add_argument("--layers", type=_count, default=1, metavar="N", help="LSTM layers")
    model.add_argument(
        "--embedding", type=_count, default=128, metavar="N", help="size of a character's vector"
    )
    model.add_argument(
        "--dropout",
        type=_number(float, "at least 0 and below 1", lambda value: 0 <= value < 1),
        default=0.1,
        metavar="P",
        help="fraction of the activations zeroed in training",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--seq-length", type=_count, default=64, metavar="N", help="characters a gradient spans"
    )
    training.add_argument(
        "--batch-size", type=_count, default=32, metavar="N", help="places read in parallel"
    )
    training.add_argument(
        "--epochs", type=_count, default=6, metavar="N", help="times the text is read"
    )
    training.add_argument(
        "--max-seconds",
        type=_positive,
        default=110.0,
        metavar="S",
        help="end the training by then, whatever the epochs",
    )
    training.add_argument(
        "--lr", type=_positive, default=4e-3, metavar="RATE", help="highest learning rate of Adam"
    )
    training.add_argument(
        "--clip", type=_positive, default=1.0, metavar="NORM", help="longest gradient allowed"
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
        type=_prompt,
        metavar="TEXT",
        help="what the sample continues; if not given, the first four characters of the text",
    )
    output.add_argument(
        "--sample-length", type=_count, default=400, metavar="N", help="characters to sample"
    )
    _add_temperature(output)
    _add_placement(parser)


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
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
        "--prompt", type=_prompt, required=True, metavar="TEXT", help="what to continue"
    )
    parser.add_argument("--length", type=_count, default=400, metavar="N", help="characters to add")
    _add_temperature(parser)
    parser.add_argument(
        "--seed", type=int, metavar="N", help="makes the choice repeatable; if not given, it varies"
    )
    _add_placement(parser)


def _add_temperature(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--temperature",
        type=_number(float, "zero or more", lambda value: 0 <= value < float("inf")),
        default=0.8,
        metavar="T",
        help="0 always takes the likeliest character; higher values dare more",
    )


def _add_placement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where to run")
    group.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:N")
    group.add_argument(
        "--backend",
        choices=("fused", "aten", "reference"),
        help="what runs the LSTM; if not given, the best that can (see rnnfast doctor)",
    )


def _number(
    kind: type[int] | type[float], expected: str, accepts: Callable[[float], bool]
) -> Callable[[str], float]:
    """An argument type: a number that `accepts` agrees to."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected a number {expected}, got {text!r}")
        return value

    return parse


_count = _number(int, "of 1 or more, without fraction", lambda value: value >= 1)
_positive = _number(float, "above zero", lambda value: 0 < value < float("inf"))


def _prompt(text: str) -> str:
    """An argument type: text that can be continued."""
    if not text:
        raise argparse.ArgumentTypeError("expected at least one character, got none")
    return text


def _device(text: str) -> torch.device:
    """An argument type: a device that this machine and this torch have."""
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"device {text!r} cannot be used: {reason}") from None
