"""The arguments of `rnnfast bench`."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from rnnfast.cli.arguments import HelpFormatter, Parser, add_placement, path, positive

LAYERS = ("RNN", "GRU", "LSTM")


class Size(NamedTuple):
    """The time steps, batch size, input size and hidden size of a case."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


SIZES = (Size(1, 1, 64, 64), Size(100, 1, 256, 256), Size(100, 16, 128, 128))
_DESCRIPTION = """\
Time the layers of rnnfast and of torch.nn on this machine, in float32. Inference is the
forward pass; training is the forward and backward pass.

The outputs and gradients are compared first. Then both libraries run in turn, so that
changes in the machine's speed affect both. The table shows median times. The speed-up is
the time of torch.nn divided by the time of rnnfast: above 1, rnnfast is faster. The last
column shows the range of the speed-up over the five runs of a timing. A question mark
means that the runs disagree, usually because other programs use the machine. A warning
at the end then says so, too.
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
        help="compare the speed of the layers with torch.nn's on this machine",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--size",
        type=_size,
        action="append",
        metavar="T,B,I,H",
        help="time steps, batch size, input size and hidden size; may be repeated; by default "
        f"{', '.join(map(str, SIZES[:-1]))} and {SIZES[-1]}",
    )
    parser.add_argument(
        "--layer",
        choices=LAYERS,
        action="append",
        help="the layer to time; may be repeated; by default all layers",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=0.5,
        metavar="S",
        help="minimum time for each layer, size and mode, over all runs",
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
