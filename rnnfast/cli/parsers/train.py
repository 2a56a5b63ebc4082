"""The arguments of `rnnfast train`."""

from __future__ import annotations

import argparse

from rnnfast.cli.arguments import (
    DEFAULT_FOLDER,
    HelpFormatter,
    Noted,
    NotedFlag,
    Parser,
    add_placement,
    add_temperature,
    count,
    layers,
    number,
    path,
    positive,
    prompt,
    seed,
)
from rnnfast.models.schedule import SCHEDULES

_DESCRIPTION = """\
Train an LSTM to predict a text character by character, and show what it learnt:
bits per character of a held-out part of the text beside a bigram model's, a sample,
and the speed beside torch.nn.LSTM. The folder --out then has

  model.safetensors  the weights of the best validation, for rnnfast generate
  log.csv            a row for every step
  loss.png           the losses, drawn
  training.pt        all that --resume needs

A folder that has such files already is left alone, unless --resume or --overwrite says
what to do with them. With --overwrite the new files are in DIR/unfinished. They replace
the old ones only once the training has ended well. Where it was interrupted or diverged,
--resume goes on with DIR/unfinished. Delete that folder to return to the old training.

Ctrl-C, SIGTERM, or the end of the machine: rnnfast train --resume --out DIR goes on from
the last checkpoint, and ends with the weights and the log of a training that was never
interrupted, bit for bit on a CPU with as many threads. Only where the clock decides,
that is once half of --max-seconds is used up, no two trainings are quite alike.

--resume reads the options from the checkpoint. They need not be given again. Most must
stay as they were. These may change:

  --epochs, --max-seconds, --patience  A training that has ended goes on if they now allow
                     more. Its learning rate is then that of the longer training: it rises
                     again where it had come down.
  --eval-every       The validations come at other steps.
  --device, --backend  Numbers agree up to rounding.
  --text             The same text may lie elsewhere.
  all under "output"
"""
_EPILOG = """\
exit status:
  0    the training has ended; a warning tells if a bigram model does better
  1    it has ended, and the model is worse than one that knows nothing: it diverged
  2    it could not be done, or a loss was not finite
  130  it was stopped by Ctrl-C, or 143 by SIGTERM

examples:
  rnnfast train
  rnnfast train --text book.txt --hidden 512 --layers 2 --dropout 0.2 --max-seconds 1800
  rnnfast train --text book.txt --epochs 50 --max-seconds inf --patience 5
  rnnfast train --resume
  rnnfast train --resume --max-seconds 600
  torchrun --nproc-per-node 2 -m rnnfast train --text book.txt --batch-size 64
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the others."""
    parser = commands.add_parser(
        "train",
        help="train a character model on a text",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(given=set())
    parser.register("action", None, Noted)
    parser.register("action", "store_true", NotedFlag)
    _add_text(parser.add_argument_group("text"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_ending(parser.add_argument_group("validation, and when to end"))
    _add_output(parser.add_argument_group("output"))
    add_placement(parser)


def _add_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text",
        type=path,
        metavar="FILE",
        help="UTF-8 text to learn; if not given, the manual that comes with Python",
    )
    group.add_argument(
        "--validation",
        type=number(float, "between 0 and 1", lambda value: 0 < value < 1),
        default=0.1,
        metavar="FRACTION",
        help="how much of the text, at its end, is held out to judge the model by",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hidden", type=count, default=256, metavar="N", help="size of the state")
    group.add_argument("--layers", type=layers, default=1, metavar="N", help="LSTM layers")
    group.add_argument(
        "--embedding",
        type=count,
        metavar="N",
        help="size of a character's vector; if not given, 128, or that of the state if tied",
    )
    group.add_argument(
        "--tied-weights",
        action="store_true",
        help="score a character with the vector that stands for it: fewer parameters",
    )
    group.add_argument(
        "--dropout",
        type=number(float, "at least 0 and below 1", lambda value: 0 <= value < 1),
        default=0.1,
        metavar="P",
        help="fraction of the activations zeroed in training",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seq-length", type=count, default=64, metavar="N", help="characters a gradient spans"
    )
    group.add_argument(
        "--batch-size",
        type=count,
        default=32,
        metavar="N",
        help="places read in parallel, by all processes together",
    )
    group.add_argument(
        "--lr", type=positive, default=4e-3, metavar="RATE", help="highest learning rate of Adam"
    )
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default=SCHEDULES[0],
        help="how the learning rate changes; one-cycle: a short rise, then half a cosine down "
        "to 0; cosine: half a cosine down to 0; constant: no change; plateau: halved after two "
        "validations without a better loss",
    )
    group.add_argument(
        "--clip", type=positive, default=1.0, metavar="NORM", help="longest gradient allowed"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="makes a run repeatable")


def _add_ending(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--epochs",
        type=count,
        metavar="N",
        help="times the text is read; if not given, 6, and of a short text as many as make 400 "
        "steps",
    )
    group.add_argument(
        "--max-seconds",
        type=number(float, "above zero, or inf", lambda value: value > 0),
        default=110.0,
        metavar="S",
        help="end by then, whatever the epochs: all is counted, from the reading of the text to "
        "the last line, and what was used before --resume, up to its checkpoint; only the step "
        "under way is finished",
    )
    group.add_argument(
        "--eval-every",
        type=count,
        metavar="STEPS",
        help="look at the held-out text every so many steps, besides once after each epoch; if "
        "not given, 1000 where an epoch has more",
    )
    group.add_argument(
        "--eval-characters",
        type=count,
        metavar="N",
        help="characters that such a look reads, about, spread over the held-out text; if not "
        "given, 100000, or fewer where these would take a twentieth of --max-seconds",
    )
    group.add_argument(
        "--patience",
        type=count,
        metavar="N",
        help="end the training after N such looks without a better loss; if not given, never",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out", type=path, default=DEFAULT_FOLDER, metavar="DIR", help="folder for all files"
    )
    group.add_argument(
        "--checkpoint-every",
        type=count,
        default=200,
        metavar="STEPS",
        help="write training.pt every so many steps, and at the end",
    )
    again = group.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on from training.pt in DIR, with the options it was begun with",
    )
    again.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew, and replace what is in DIR only once that has ended well",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also log to DIR/tensorboard (needs the package tensorboard)",
    )
    group.add_argument(
        "--prompt",
        type=prompt,
        metavar="TEXT",
        help="what the sample continues; if not given, the first four characters of the text",
    )
    group.add_argument(
        "--sample-length", type=count, default=400, metavar="N", help="characters to sample"
    )
    add_temperature(group)
