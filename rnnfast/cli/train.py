"""`rnnfast train`."""

from __future__ import annotations

import argparse
import hashlib
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast import backend
from rnnfast.cli.loss_plot import plot_loss
from rnnfast.cli.output import Results, naming
from rnnfast.cli.progress import Interruption, ProgressBar, StoppedError
from rnnfast.cli.speed import compare_speed
from rnnfast.models import CharLSTM, checkpoint, run_state
from rnnfast.models.processes import Processes, is_first_process, join
from rnnfast.models.training import Run, TrainingOptions, sample
from rnnfast.models.training_log import FILE_NAME as LOG_NAME
from rnnfast.models.training_log import TrainingLog, read_log, summary_writer_class
from rnnfast.text import (
    CharVocabulary,
    TextError,
    bigram_bits_per_char,
    default_text,
    load_text,
    split,
)

PLOT_NAME = "loss.png"
_FILES = (checkpoint.FILE_NAME, LOG_NAME, PLOT_NAME, run_state.FILE_NAME)
_PROMPT_LENGTH = 4  # "The ", in the default text
_UNTIED_EMBEDDING = 128
_EPOCHS, _FEWEST_STEPS = 6, 400
_EVAL_EVERY, _EVAL_CHARACTERS, _EVAL_SHARE = 1000, 100_000, 0.05
# The plot, the sample and the speed get this many seconds, or this share of --max-seconds if less.
_REPORT_SECONDS, _REPORT_SHARE = 5.0, 0.1
_PIECE = 1 << 22  # characters that are hashed at once

_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "text": (str, type(None)),
    "validation": float,
    "hidden": int,
    "layers": int,
    "embedding": int,
    "dropout": (int, float),
    "tied_weights": bool,
    "seq_length": int,
    "batch_size": int,
    "epochs": int,
    "max_seconds": float,
    "lr": float,
    "clip": float,
    "schedule": str,
    "eval_every": (int, type(None)),
    "eval_characters": int,
    "patience": (int, type(None)),
    "seed": int,
    "device": str,
    "backend": str,
}
"""The options that the result depends on, with their types in a checkpoint."""


class _Data(NamedTuple):
    """The text, its vocabulary, and the tokens of its training part and its held-out part."""

    text: str
    vocabulary: CharVocabulary
    tokens: Tensor
    held_out: Tensor

    @property
    def description(self) -> str:
        """A description that identifies the text."""
        digest = hashlib.sha256()
        for first in range(0, len(self.text), _PIECE):
            piece = self.text[first : first + _PIECE]
            digest.update(piece.encode(errors="surrogatepass"))
        return (
            f"{len(self.text):,} characters, {len(self.vocabulary)} distinct, "
            f"SHA-256 {digest.hexdigest()[:16]}"
        )


class _Yardsticks(NamedTuple):
    """Losses on the held-out text, in bits per character, to compare the trained model with.

    Attributes:
        untrained: the loss of the model before the first step.
        ignorant: `untrained`, or the loss of the uniform distribution if that is higher.
        bigram: the loss of a bigram model of the training part; NaN in all processes but the first.
        characters: the number of characters that were read.
    """

    untrained: float
    ignorant: float
    bigram: float
    characters: int


class _Clock:
    """The time that a training has used, and the time that `--max-seconds` leaves it."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.limit = math.inf
        self.used_before = 0.0

    @property
    def elapsed(self) -> float:
        """The seconds since the start of this process."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - self.used_before - self.elapsed


def run(options: argparse.Namespace) -> None:
    """Train on a text; print the losses, a sample and the speed; write all files.

    Raises:
        SystemExit: with 1 if the model is worse than one that knows nothing, with 128 + the
            number of the signal if a signal stopped the training.
    """
    clock = _Clock()
    try:
        results = Results(options.out, *_FILES)
        state = _recall(options, results) if options.resume else None
        if state is None:
            results.check(
                options.overwrite,
                "--resume goes on with this training, --overwrite begins anew and replaces it at "
                "the end, another --out leaves it",
            )
        with join(options.device) as processes:
            options.device = processes.device
            data = _read(options)
            training = _prepare(options, data, processes)
            results.prepare()
            yardsticks = _train(training, options, data, results, state, clock)
    except (ArithmeticError, OSError, ValueError) as error:
        if not is_first_process():  # the first process reports the error for all
            raise SystemExit(2) from error
        raise
    if processes.is_first:
        sane = _report(training, options, data, results, yardsticks, clock)
        print(f"\nwrote {', '.join(_FILES)} to {results.work}; {clock.elapsed:.0f} s in all")
        if not sane:
            raise SystemExit(1)


def _recall(options: argparse.Namespace, results: Results) -> dict[str, Any]:
    """Restore the options from the checkpoint, except for those that the user gives now.

    Returns the state of the run.
    """
    results.resume(run_state.FILE_NAME)
    path = results.work / run_state.FILE_NAME
    saved, state = run_state.load(path)
    now = _settings(options)
    given = {_flag(name): now[_flag(name)] for name in _SETTINGS if name in options.given}
    merged = run_state.merge(saved, given, path)
    for name, kinds in _SETTINGS.items():
        value = merged.get(_flag(name))
        if not isinstance(value, kinds):
            raise checkpoint.CheckpointError(f"{path} has no valid {_flag(name)}: {value!r:.60}")
        setattr(options, name, value)
    options.text = None if options.text is None else Path(options.text)
    try:
        options.device = torch.device(options.device)
        probe = torch.empty(0, device=options.device)
        options.backend = backend.choose(options.backend, probe)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise checkpoint.CheckpointError(
            f"{path} is of a training with --device {options.device} --backend {options.backend}, "
            f"which cannot be used here ({reason}); give others"
        ) from error
    state["settings"] = saved
    return state


def _read(options: argparse.Namespace) -> _Data:
    """Prepare the data, and check all options that could otherwise fail only after minutes."""
    with naming("--text"):
        text = default_text() if options.text is None else load_text(options.text)
    vocabulary = CharVocabulary(text)
    tokens, held_out = split(vocabulary.encode(text).to(options.device), options.validation)
    needed = options.batch_size * options.seq_length + 1
    short = f"the text is too short: of its {len(text):,} characters --validation "
    short += f"{options.validation:g} "
    if len(held_out) < 2 <= len(text) - needed:
        raise TextError(
            f"{short}holds out {len(held_out):,}, and 2 are needed. Give a larger --validation"
        )
    if len(tokens) < needed or len(held_out) < 2:
        raise TextError(
            f"{short}leaves {len(tokens):,} to learn from, and --batch-size {options.batch_size} "
            f"with --seq-length {options.seq_length} needs {needed:,}. Give a longer --text, or a "
            f"smaller --batch-size or --seq-length"
        )
    with naming("--prompt"):
        vocabulary.encode(options.prompt or "")
    if options.tensorboard:
        summary_writer_class()
    return _Data(text, vocabulary, tokens, held_out)


def _prepare(options: argparse.Namespace, data: _Data, processes: Processes) -> Run:
    """Make a new run; set the options whose defaults depend on the text."""
    torch.manual_seed(options.seed)
    if options.embedding is None:
        options.embedding = options.hidden if options.tied_weights else _UNTIED_EMBEDDING
    if options.tied_weights and options.embedding != options.hidden:
        raise ValueError(
            f"--tied-weights needs --embedding to be --hidden, got {options.embedding} and "
            f"{options.hidden}; leave --embedding out"
        )
    streams = (len(data.tokens) - 1) // options.batch_size
    steps_per_epoch = math.ceil(streams / options.seq_length)
    if options.epochs is None:
        options.epochs = max(_EPOCHS, math.ceil(_FEWEST_STEPS / steps_per_epoch))
    if options.eval_every is None and steps_per_epoch > _EVAL_EVERY:
        options.eval_every = _EVAL_EVERY
    model = CharLSTM(
        len(data.vocabulary),
        options.hidden,
        options.layers,
        embedding_size=options.embedding,
        dropout=options.dropout,
        tied_weights=options.tied_weights,
        device=options.device,
        backend=options.backend,
        vocabulary=data.vocabulary,
    )
    if not processes.is_first:
        torch.manual_seed(options.seed + processes.rank)  # each process has its own dropout
    settings = TrainingOptions(
        seq_length=options.seq_length,
        batch_size=options.batch_size,
        epochs=options.epochs,
        max_seconds=options.max_seconds - min(_REPORT_SECONDS, _REPORT_SHARE * options.max_seconds),
        learning_rate=options.lr,
        clip=options.clip,
        schedule=options.schedule,
        eval_every=options.eval_every,
        patience=options.patience,
        eval_characters=options.eval_characters,
    )
    return Run(model, data.tokens, settings, data.held_out, processes)


def _train(
    run: Run,
    options: argparse.Namespace,
    data: _Data,
    results: Results,
    state: dict[str, Any] | None,
    clock: _Clock,
) -> _Yardsticks:
    """Take the remaining steps; return the losses to compare the result with."""
    facts: run_state.Settings = {
        "the text of --text": data.description,
        "the number of processes": run.processes.size,
    }
    state_path = results.work / run_state.FILE_NAME
    if state is not None:
        run_state.merge(state["settings"], facts, state_path)
        if state["steps"] > run.total:
            raise ValueError(f"--epochs {options.epochs}: the training has read more already")
    first = run.processes.is_first
    if first:
        _introduce(run, options, data)
    yardsticks = _measure(run, options, data)
    settings = {**_settings(options), **facts}
    if state is None:
        results.begin(run.processes)
        state_path = results.work / run_state.FILE_NAME
        run.seconds = clock.elapsed
        run_state.save(run, settings, state_path)  # before the log loses its rows
    else:
        run_state.restore(run, state)
        clock.used_before = run.seconds
        run.seconds += clock.elapsed
    clock.limit = options.max_seconds
    if not first:
        _take_steps(run, options, settings, results, None)
        return yardsticks
    if state is not None:
        print(f"resumed after step {run.steps:,} of {run.total:,}")
    tensorboard = results.work / "tensorboard" if options.tensorboard else None
    with TrainingLog(results.work / LOG_NAME, run.recorded, tensorboard) as log:
        _take_steps(run, options, settings, results, log)
    return yardsticks


def _introduce(run: Run, options: argparse.Namespace, data: _Data) -> None:
    """Print the sizes of the text and of the model."""
    parameters = sum(weight.numel() for weight in run.model.parameters())
    print(
        f"text   {options.text or 'the language reference that comes with Python'}: "
        f"{len(data.text):,} characters, {len(data.vocabulary)} distinct, "
        f"the last {len(data.held_out):,} held out\n"
        f"model  {options.layers} x {options.hidden} LSTM units, {parameters:,} parameters, "
        f"backend {options.backend}"
    )


def _measure(run: Run, options: argparse.Namespace, data: _Data) -> _Yardsticks:
    """Compute the baseline losses. Also set the default of --eval-characters."""
    if options.eval_characters is None:
        batch = options.batch_size * options.seq_length
        run.options = replace(run.options, eval_characters=batch)
        start = time.monotonic()
        run.evaluate()
        (seconds,) = run.processes.highest(time.monotonic() - start)
        affordable = max(1.0, _EVAL_SHARE * options.max_seconds / seconds) * batch
        options.eval_characters = int(min(_EVAL_CHARACTERS, affordable))
        run.options = replace(run.options, eval_characters=options.eval_characters)
    untrained = run.evaluate()
    rows = sample(data.held_out, options.batch_size, options.seq_length, options.eval_characters)
    size = len(data.vocabulary)
    bigram = math.nan
    if run.processes.is_first:
        bigram = bigram_bits_per_char(data.tokens.cpu(), rows.cpu(), size)
    ignorant = max(untrained, math.log2(size))
    return _Yardsticks(untrained, ignorant, bigram, rows.size(0) * (rows.size(1) - 1))


def _flag(name: str) -> str:
    """The name of an option on the command line."""
    return f"--{name.replace('_', '-')}"


def _settings(options: argparse.Namespace) -> run_state.Settings:
    """The options that the result depends on, in the form in which a checkpoint stores them."""
    text = None if options.text is None else str(options.text.absolute())
    values = {**vars(options), "text": text, "device": options.device.type}
    return {_flag(name): values[name] for name in _SETTINGS}


def _take_steps(
    run: Run,
    options: argparse.Namespace,
    settings: run_state.Settings,
    results: Results,
    log: TrainingLog | None,
) -> None:
    """Train with a progress bar and checkpoints; the first process also writes the log.

    Raises:
        SystemExit: with 128 + the number of the signal, if a signal stopped the training. A
            checkpoint has been written then.
    """
    model_path = results.work / checkpoint.FILE_NAME

    def save() -> None:
        if log is not None:
            log.sync()
        run_state.save(run, settings, results.work / run_state.FILE_NAME)

    with (
        Interruption() as interruption,
        ProgressBar(
            run.total_characters,
            initial=run.characters,
            seconds=run.options.max_seconds - run.seconds,
            hidden=not run.processes.is_first,
        ) as bar,
    ):

        def stop_if_asked() -> None:
            (number,) = run.processes.highest(interruption.signal)
            if number:
                raise StoppedError(int(number))

        def on_validation(part: float) -> None:
            bar.note(f"validation {part:4.0%}")
            stop_if_asked()

        run.on_validation = on_validation
        try:
            for record in run:
                bar.note("training")
                bar.set_postfix_str(f"loss {record.bits_per_char:.2f} bits/char", refresh=False)
                bar.update(record.characters - bar.n)
                if log is not None:
                    log.write(record, run.seconds)
                    if run.best_step == record.step:
                        checkpoint.save(run.model, model_path)
                if run.ended or record.step % options.checkpoint_every == 0:
                    save()
                stop_if_asked()
        except ArithmeticError as error:
            raise type(error)(f"{error}{results.remains}") from error
        except StoppedError as stop:
            number = stop.args[0]
            save()
            if log is not None and not model_path.exists():  # no validation has saved it yet
                checkpoint.save(run.model, model_path)
        else:
            return
        finally:
            run.on_validation = None
    if run.processes.is_first:
        goes_on = f"; rnnfast train --resume --out {options.out} goes on from there"
        goes_on = results.remains or goes_on
        print(
            f"rnnfast train: stopped by {signal.Signals(number).name} after step {run.steps:,} "
            f"of {run.total:,}{goes_on}",
            file=sys.stderr,
        )
    raise SystemExit(128 + number)


def _report(
    run: Run,
    options: argparse.Namespace,
    data: _Data,
    results: Results,
    yardsticks: _Yardsticks,
    clock: _Clock,
) -> bool:
    """Print and write the results; return whether the model is better than one without training."""
    limits = {
        f"the time limit of {options.max_seconds:g} s": ("--max-seconds", run.out_of_time),
        f"{options.patience} validations without a better loss": (
            "--patience",
            run.out_of_patience,
        ),
    }
    diverged = max(run.best_bits, run.last_bits) > yardsticks.ignorant
    for reason, (option, applies) in limits.items():
        if applies and run.steps < run.total:
            remedy = "" if diverged else f"; --resume with a larger {option} goes on"
            print(f"{reason} ended the training after step {run.steps:,} of {run.total:,}{remedy}")
    run.restore_best()
    checkpoint.save(run.model, results.work / checkpoint.FILE_NAME)
    plot_loss(read_log(results.work / LOG_NAME), yardsticks.bigram, results.work / PLOT_NAME)
    sane = run.best_bits <= yardsticks.ignorant
    if sane:
        results.finish()

    best = f"after step {run.best_step:,}, the best" if run.best_step < run.steps else ""
    read = yardsticks.characters
    part = "" if 2 * read > len(data.held_out) else f", of which {read:,} characters were read"
    print(
        f"\nbits per character of the held-out text{part}\n"
        f"  before training  {yardsticks.untrained:.3f}\n"
        f"  bigram model     {yardsticks.bigram:.3f}\n"
        f"  after training   {run.best_bits:.3f}  {best}".rstrip()
    )
    _warn(run, yardsticks, results)
    _show_sample(run.model, data, options, clock)
    seconds_per_round = 2 * run.seconds / max(1, run.steps)
    print("\ntraining speed of this model, characters per second")
    if clock.left < 3 * seconds_per_round:
        print("  not measured: no time is left")
        return sane
    speeds = compare_speed(run.model, data.tokens, run.options, options.backend, clock.left)
    for name, speed in speeds.items():
        print(f"  {name:<23}  {speed:>9,.0f}")
    return sane


def _warn(run: Run, yardsticks: _Yardsticks, results: Results) -> None:
    """Warn if the result is worse than expected."""
    remedy, ignorant = "a lower --lr may help", yardsticks.ignorant
    if run.best_bits > ignorant:
        words = f"the model is worse than one that knows nothing ({ignorant:.3f}): it diverged"
        remedy += results.remains
    elif run.last_bits > ignorant:
        words = f"the training diverged, to {run.last_bits:.3f}; what is kept is the best of it"
    elif run.best_bits > yardsticks.bigram:
        words = "a bigram model does better"
        remedy = "a longer training, a longer text or another --lr may help"
    else:
        return
    sys.stdout.flush()
    print(f"rnnfast train: warning: {words}; {remedy}", file=sys.stderr)


def _show_sample(model: CharLSTM, data: _Data, options: argparse.Namespace, clock: _Clock) -> None:
    """Print a sample of the model while it is generated, until there is no time left."""
    prompt = data.text[:_PROMPT_LENGTH] if options.prompt is None else options.prompt
    choice = "without chance" if options.greedy else f"at temperature {options.temperature:g}"
    print(f"\nsample from {prompt!r} {choice}\n{prompt}", end="")

    def show(piece: str) -> None:
        print(piece, end="", flush=True)
        if clock.left < 0:
            raise TimeoutError

    try:
        model.generate(
            prompt,
            options.sample_length,
            options.temperature,
            greedy=options.greedy,
            seed=options.seed,
            callback=show,
        )
    except TimeoutError:
        print(" (no time is left)", end="")
    print()
