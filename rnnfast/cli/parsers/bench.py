"""The arguments of `rnnfast bench`."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from rnnfast.cli.arguments import HelpFormatter, Parser, add_placement, path, positive

LAYERS = ("RNN", "GRU", "LSTM")


class Size(NamedTuple):
    """Steps, sequences, features of the input and of the state."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


SIZES = (Size(1, 1, 64, 64), Size(100, 1, 256, 256), Size(100, 16, 128, 128))
_DESCRIPTION = """\
Time layers of rnnfast beside torch.nn's on this machine, in inference and in training
(forward and backward to the parameters), in float32.

Outputs and gradients are compared first. Then both run in turn, so that both meet the
same state of the machine. The median times are shown. The speed-up is that of torch.nn
over that of rnnfast: above 1, rnnfast is faster. Behind it stands its range over the five
runs that the timing is cut into, with a question mark if they disagree, as they do while
other programs use the machine. A warning at the end says so, too.
"""
_EPILOG = """\
examples:
  rnnfast bench
  rnnfast bench --layer LSTM --size 100,32,256,256 --size 50,64,512,512
  OMP_NUM_THREADS=1 rnnfast bench --seconds 2 --json one-thread.json
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the others."""
    parser = commands.add_parser(
        "bench",
        help="time the layers beside torch.nn's on this machine",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--size",
        type=_size,
        action="append",
        metavar="T,B,I,H",
        help="steps, sequences, input size and hidden size; may be given several times; if not "
        f"given, {' and '.join(map(str, SIZES))}",
    )
    parser.add_argument(
        "--layer",
        choices=LAYERS,
        action="append",
        help="may be given several times; if not given, all",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=0.5,
        metavar="S",
        help="how long to time each layer in each mode, at least, all runs together",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="also write all times to a file")
    add_placement(parser)


def _size(text: str) -> Size:
    """An argument type: four sizes of at least 1."""
    try:
        size = Size(*map(int, text.split(",")))
    except (TypeError, ValueError):
        size = Size(0, 0, 0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(
            f"expected four whole numbers of 1 or more, such as 100,16,128,128; got {text!r}"
        )
    return size
