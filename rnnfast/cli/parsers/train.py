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

SCHEDULES = ("one-cycle", "cosine", "constant", "plateau")
"""Those of rnnfast.models.schedule, which imports optional packages."""

_DESCRIPTION = """\
Train an LSTM to predict a text character by character. Then show the loss on a held-out
part of the text in bits per character, compared with a bigram model; a sample; and the
training speed, compared with torch.nn.LSTM. The files in the folder --out are

  model.safetensors  the weights of the best validation, for rnnfast generate
  log.csv            a row for every step
  loss.png           a plot of the losses
  training.pt        the checkpoint that --resume reads

If the folder has such files already, the command stops with an error unless --resume or
--overwrite is given. With --overwrite the new files are written to DIR/unfinished. They
replace the old ones when the training has ended well. If it is interrupted or diverges,
--resume continues in DIR/unfinished. Delete that folder to return to the old training.

After Ctrl-C, SIGTERM or a crash, rnnfast train --resume --out DIR continues from the last
checkpoint. The weights and the log are then those of an uninterrupted training, bit for
bit on the same CPU with the same number of threads. Only if more than half of
--max-seconds is used, the learning rate depends on the clock and no two trainings agree.

--resume reads the options from the checkpoint, so they need not be given again. Most of
them must not change. These may change:

  --epochs, --max-seconds, --patience  A training that has ended continues if they now
                     allow more steps. Its learning rate is then that of the longer
                     training, which may be higher than before.
  --eval-every       The validations come at other steps.
  --device, --backend  The numbers agree up to rounding.
  --text             The same text may be in another file.
  all under "output"
"""
_EPILOG = """\
exit status:
  0    the training has ended; a warning says if a bigram model does better
  1    the training has ended, but it diverged: the model is worse than an untrained one
  2    an error, for example an invalid option or a loss that is not finite
  130  Ctrl-C stopped the training
  143  SIGTERM stopped the training

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
        help="UTF-8 text to learn; by default the language reference that comes with Python",
    )
    group.add_argument(
        "--validation",
        type=number(float, "between 0 and 1", lambda value: 0 < value < 1),
        default=0.1,
        metavar="FRACTION",
        help="fraction of the text, at its end, that is held out for validation",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hidden", type=count, default=256, metavar="N", help="hidden size")
    group.add_argument("--layers", type=layers, default=1, metavar="N", help="number of layers")
    group.add_argument(
        "--embedding",
        type=count,
        metavar="N",
        help="embedding size; by default 128, or the hidden size with --tied-weights",
    )
    group.add_argument(
        "--tied-weights",
        action="store_true",
        help="use the embedding's weights in the output layer, too, which saves parameters",
    )
    group.add_argument(
        "--dropout",
        type=number(float, "at least 0 and below 1", lambda value: 0 <= value < 1),
        default=0.1,
        metavar="P",
        help="probability of dropout in training",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seq-length",
        type=count,
        default=64,
        metavar="N",
        help="number of characters that the gradient reaches back",
    )
    group.add_argument(
        "--batch-size",
        type=count,
        default=32,
        metavar="N",
        help="number of streams of text read in parallel, over all processes",
    )
    group.add_argument(
        "--lr", type=positive, default=4e-3, metavar="RATE", help="maximum learning rate of Adam"
    )
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default=SCHEDULES[0],
        help="learning-rate schedule; one-cycle: a short rise, then half a cosine down to 0; "
        "cosine: half a cosine down to 0; constant: no change; plateau: halved after two "
        "validations without a better loss",
    )
    group.add_argument(
        "--clip", type=positive, default=1.0, metavar="NORM", help="maximum norm of the gradient"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="random seed")


def _add_ending(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--epochs",
        type=count,
        metavar="N",
        help="number of times the text is read; by default 6, or more for a short text, so that "
        "there are at least 400 steps",
    )
    group.add_argument(
        "--max-seconds",
        type=number(float, "above zero, or inf", lambda value: value > 0),
        default=110.0,
        metavar="S",
        help="time limit for the whole command, from reading the text to the last line; a resumed "
        "training counts the time before its checkpoint, too; the current step is finished",
    )
    group.add_argument(
        "--eval-every",
        type=count,
        metavar="STEPS",
        help="steps between validations, besides the one after each epoch; by default 1000 if an "
        "epoch is longer",
    )
    group.add_argument(
        "--eval-characters",
        type=count,
        metavar="N",
        help="approximate number of characters that a validation reads, spread over the held-out "
        "text; by default 100000, or fewer if they would take a twentieth of --max-seconds",
    )
    group.add_argument(
        "--patience",
        type=count,
        metavar="N",
        help="end the training after N validations without a better loss; by default never",
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
        help="number of steps between checkpoints; there is also one at the end",
    )
    again = group.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue from training.pt in DIR, with the options stored there",
    )
    again.add_argument(
        "--overwrite",
        action="store_true",
        help="start a new training; its files replace those in DIR when it has ended well",
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
        help="the text that the sample continues; by default the first four characters of the text",
    )
    group.add_argument(
        "--sample-length", type=count, default=400, metavar="N", help="length of the sample"
    )
    add_temperature(group)
