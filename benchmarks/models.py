"""Compares the layers of well-known models with their peers: `python -m benchmarks.models --help`.

Each model stands for one recurrent module in sizes that are typical of it. Results are checked, and
then all implementations are timed in turn, in several new processes. A ratio is the peer's time
divided by rnnfast's: above 1, rnnfast is faster. A case is a win if it is above 1 in every process,
a loss if it is below 1 in every process, and else level.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import suite
from .steps import MODES, Case, make_problem
from .suite import Item, Row


class Model(NamedTuple):
    """A recurrent module of a model. `options` are more arguments of its class in torch.nn."""

    name: str
    part: str
    cell: str
    case: Case
    options: dict[str, Any]


STACK_OF_2 = {"num_layers": 2}
BOTH = {"bidirectional": True}

# The models that the sizes are modelled on. Sizes are those of the paper or of a common
# implementation as far as known; where a model does not fix T, T is typical of the task.
#
# RNN-T: Graves, arXiv:1211.3711; prediction network of NVIDIA's Parakeet, 30 tokens.
# DeepSpeech 2: Amodei et al., arXiv:1512.02595; the sizes of deepspeech.pytorch and of MLPerf
#   (672 features, five layers of 800), without the normalisation between layers. torch.nn
#   concatenates the directions of a layer, which these implementations add.
# Tacotron 2: Shen et al., arXiv:1712.05884; the attention LSTM of one decoder step: 256 values of
#   the pre-net and 512 of the encoder.
# Silero VAD 5: github.com/snakers4/silero-vad; the LSTM of one chunk of audio.
# Demucs: Defossez, Synnaeve, Adi, arXiv:2006.12847, 48 channels doubled four times; the
#   bidirectional form.
# RNNoise: Valin, arXiv:1709.08243; the GRU of noise suppression, one second of 10 ms frames.
# CRNN: Shi, Bai, Yao, arXiv:1507.05717; the first bidirectional LSTM for images 100 pixels wide.
# AWD-LSTM: Merity, Keskar, Socher, arXiv:1708.02182; the second of three layers, Penn Treebank.
# char-RNN: Karpathy, "The unreasonable effectiveness of recurrent neural networks", 2015; defaults
#   of its code, 65 one-hot characters.
# GNMT: Wu et al., arXiv:1609.08144; an encoder of four layers of 1024, as NVIDIA's and MLPerf's.
# ELMo: Peters et al., arXiv:1802.05365; one direction, 4096 units projected to 512.
# BiLSTM-CRF: Lample et al., arXiv:1603.01360; words of 100 and characters of 50 values.
# DeepAR: Salinas et al., arXiv:1704.04110; two layers of 40, the defaults of GluonTS.
# LSTNet: Lai et al., arXiv:1703.07015; 100 channels, a window of 168 less the width of the
#   convolution plus 1.
# Dreamer: Hafner et al., arXiv:1912.01603; the GRU of the RSSM (arXiv:1811.04551), called once for
#   each of 50 steps of 50 sequences.
# R2D2: Kapturowski et al., "Recurrent experience replay in distributed reinforcement learning",
#   ICLR 2019; 64 sequences of 80 steps.
MODELS = (
    Model("RNN-T", "prediction network", "LSTM", Case(30, 4, 640, 640), STACK_OF_2),
    Model("DeepSpeech 2", "stack", "GRU", Case(100, 4, 672, 800), {"num_layers": 5, **BOTH}),
    Model("Tacotron 2", "decoder step", "LSTMCell", Case(1, 1, 768, 1024), {}),
    Model("Silero VAD 5", "one chunk", "LSTMCell", Case(1, 1, 128, 128), {}),
    Model("Demucs", "bottleneck", "LSTM", Case(200, 1, 768, 768), {**STACK_OF_2, **BOTH}),
    Model("RNNoise", "noise suppression", "GRU", Case(100, 1, 114, 96), {}),
    Model("CRNN", "first layer", "LSTM", Case(26, 16, 512, 256), BOTH),
    Model("AWD-LSTM", "second layer", "LSTM", Case(70, 20, 1150, 1150), {}),
    Model("char-RNN", "stack", "LSTM", Case(50, 50, 65, 128), STACK_OF_2),
    Model("GNMT", "encoder", "LSTM", Case(30, 16, 1024, 1024), {"num_layers": 4}),
    Model(
        "ELMo", "one direction", "LSTM", Case(20, 16, 512, 4096), {**STACK_OF_2, "proj_size": 512}
    ),
    Model("BiLSTM-CRF", "tagger", "LSTM", Case(25, 10, 150, 100), BOTH),
    Model("DeepAR", "stack", "LSTM", Case(60, 64, 40, 40), STACK_OF_2),
    Model("LSTNet", "layer", "GRU", Case(163, 128, 100, 100), {}),
    Model("Dreamer", "RSSM", "GRUCell", Case(50, 50, 200, 200), {}),
    Model("R2D2", "layer", "LSTM", Case(80, 64, 512, 512), {}),
)


def items(args: argparse.Namespace) -> Iterator[Item]:
    """Yields an item for each mode and model."""
    chosen = [model for model in MODELS if model.name in args.name]
    for mode, (name, part, cell, case, options) in itertools.product(args.mode, chosen):
        where = {"mode": mode, "name": name, "part": part, "cell": cell, "dtype": "float32"}
        given = (cell, case, "cpu", torch.float32, mode, args.input_grad)
        yield Item(
            where | case._asdict() | {"options": options},
            functools.partial(make_problem, *given, **options),
        )


def describe_layers(row: Row) -> str:
    """Returns the class and the options of a row in words, such as "LSTM, 2 layers, both ways"."""
    options, words = row["options"], [row["cell"]]
    if layers := options.get("num_layers"):
        words.append(f"{layers} layers")
    if options.get("bidirectional"):
        words.append("both directions")
    if projected := options.get("proj_size"):
        words.append(f"projected to {projected}")
    return ", ".join(words)


def format_row(row: Row) -> str:
    case = "{T},{B},{I},{H}".format(**row)
    where = f"{row['mode']:9} {row['name']:12} {describe_layers(row):32} {case:>15} "
    return f"{where}{row['threads']:>7}  {row['peer']:12} {suite.format_numbers(row)}"


HEADER = (
    f"{'mode':9} {'model':12} {'module':32} {'T,B,I,H':>15} {'threads':>7}  {'peer':12} "
    f"{suite.NUMBERS}"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [model.name for model in MODELS]
    parser.add_argument("--name", nargs="+", choices=names, default=names, help="default: all")
    suite.add_options(parser, MODES, peers=["torch", "onnxruntime"], processes=5)
    args = parser.parse_args(argv)
    suite.check_options(parser, args)
    return suite.run("benchmarks.models", items, HEADER, format_row, args, argv)


if __name__ == "__main__":
    sys.exit(main())
