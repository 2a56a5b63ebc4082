"""The arguments of `rnnfast explain`."""

from __future__ import annotations

import argparse
import math

from rnnfast.cli.arguments import (
    DEFAULT_FOLDER,
    HelpFormatter,
    Parser,
    count,
    number,
    path,
    positive,
    prompt,
    seed,
)

_CELLS = {  # title, rows of the weights, their order, states
    "lstm": ("an LSTM cell", "4*H", "those of gate i, then f, g and o", ("h", "c")),
    "gru": ("a gated recurrent unit", "3*H", "those of gate r, then z and n", ("h",)),
    "elman": ("an Elman cell with tanh", "H", "one for each unit", ("h",)),
}
_FILE_FORMAT = """the file, for I inputs and H units:
  {{"x": [...], {states}"weight_ih": [[...], ...], "weight_hh": [[...], ...],
   "bias_ih": [...], "bias_hh": [...]}}
  x                 the input, I numbers
  {names:<16}  the state before the step, H numbers{each}
  weight_ih         {rows} rows of I numbers: {order}
  weight_hh         {rows} rows of H numbers, in that order
  bias_ih, bias_hh  {rows} numbers, in that order"""
_GATES = ("input", "forget", "cell", "output", "cell_state", "hidden")

_index = number(int, "of 0 or more, without fraction", lambda value: value >= 0)
_finite = number(float, "that is finite", math.isfinite)


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the others."""
    parser = commands.add_parser(
        "explain",
        help="show the numbers of a step, vanishing gradients, or the gates of a model",
        description="Show what happens inside recurrent networks.",
        formatter_class=HelpFormatter,
    )
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for cell in _CELLS:
        _add_step(subjects, cell)
    _add_gradients(subjects)
    _add_gates(subjects)


def _add_step(subjects: argparse._SubParsersAction[Parser], cell: str) -> None:
    title, rows, order, states = _CELLS[cell]
    parser = subjects.add_parser(
        cell,
        help=f"write out one step of {title}",
        description=f"Write out one step of {title} term by term, by the formulas of torch.nn.",
        epilog=_FILE_FORMAT.format(
            rows=rows,
            order=order,
            states="".join(f'"{state}": [...], ' for state in states),
            names=", ".join(states),
            each=" each" if len(states) > 1 else "",
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--file",
        type=path,
        metavar="FILE",
        help="JSON file with the numbers, see below; by default an example of 3 inputs and 2 units",
    )
    _add_plot(parser, "a bar chart of the pre-activations, gates and states")


def _add_gradients(subjects: argparse._SubParsersAction[Parser]) -> None:
    parser = subjects.add_parser(
        "gradients",
        help="show how gradients vanish on their way back through time",
        description="Show the norms of the gradients of a loss at the end of a sequence with\n"
        "respect to the states at earlier steps. An untrained Elman layer, GRU and LSTM run\n"
        "on the same random sequence.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--length", type=count, default=100, metavar="T", help="time steps")
    parser.add_argument("--input", type=count, default=8, metavar="I", help="input size")
    parser.add_argument("--hidden", type=count, default=32, metavar="H", help="hidden size")
    parser.add_argument(
        "--scale",
        type=positive,
        default=1.0,
        metavar="FACTOR",
        help="factor for torch's initial weights",
    )
    parser.add_argument(
        "--forget-bias",
        type=_finite,
        default=1.0,
        metavar="B",
        help="bias of the LSTM's forget gates; with a higher one the LSTM forgets less",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="random seed of the weights and inputs"
    )
    _add_plot(parser, "a line chart of the norms")


def _add_gates(subjects: argparse._SubParsersAction[Parser]) -> None:
    parser = subjects.add_parser(
        "gates",
        help="plot the gates of a trained model while it reads a text",
        description="Plot the gates of a model of rnnfast train over the characters of a text.",
        epilog='example:\n  rnnfast explain gates --text "The cat sat." --gate forget --plot f.png',
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=path,
        default=DEFAULT_FOLDER,
        metavar="DIR",
        help="folder that rnnfast train wrote, or a .safetensors file",
    )
    parser.add_argument("--text", type=prompt, required=True, help="the text that the model reads")
    parser.add_argument("--gate", choices=_GATES, default="forget", help="the gate to plot")
    parser.add_argument(
        "--layer", type=_index, default=0, metavar="N", help="the layer; 0 is the first"
    )
    parser.add_argument(
        "--units",
        type=_index,
        nargs="+",
        metavar="N",
        help="hidden units to plot; by default the 24 that vary most",
    )
    _add_plot(parser, "the heat map", required=True)


def _add_plot(parser: Parser, picture: str, required: bool = False) -> None:
    parser.add_argument(
        "--plot", type=path, required=required, metavar="FILE", help=f"image file for {picture}"
    )
