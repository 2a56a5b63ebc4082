"""`rnnfast train`."""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from rnnfast.cli.loss_plot import plot_loss
from rnnfast.cli.output import prepare_folder
from rnnfast.cli.speed import compare_speed
from rnnfast.models import CharLSTM, checkpoint, run_state
from rnnfast.models.processes import Processes, join
from rnnfast.models.training import Run, TrainingOptions, evaluate
from rnnfast.models.training_log import FILE_NAME as LOG_NAME
from rnnfast.models.training_log import TrainingLog, read_log, summary_writer_class
from rnnfast.text import (
    CharVocabulary,
    bigram_bits_per_char,
    default_text,
    load_text,
    split,
    streams,
)

PLOT_NAME = "loss.png"
_PROMPT_LENGTH = 4  # "The ", in the default text
_UNTIED_EMBEDDING = 128


class _Data(NamedTuple):
    """The text, cut and encoded: what a run learns from, what it is judged by, its vocabulary."""

    text: str
    vocabulary: CharVocabulary
    tokens: Tensor
    held_out: Tensor


def run(options: argparse.Namespace) -> None:
    """Train on a text, judge the result, sample from it, time it, and write it down."""
    start = time.monotonic()
    with join(options.device) as processes:
        options.device = processes.device
        try:
            data = _read(options)
            training = _prepare(options, data, processes)
            before = _train(training, options, data)
        except (ArithmeticError, OSError, ValueError) as error:
            if not processes.is_first:  # which says it for all
                raise SystemExit(2) from error
            raise
    if processes.is_first:
        _report(training, options, data, before)
        files = ", ".join((checkpoint.FILE_NAME, LOG_NAME, PLOT_NAME, run_state.FILE_NAME))
        print(f"\nwrote {files} to {options.out}; {time.monotonic() - start:.0f} s in all")


def _read(options: argparse.Namespace) -> _Data:
    """Prepare the data; what would stop the run minutes later, stops it here."""
    text = default_text() if options.text is None else load_text(options.text)
    vocabulary = CharVocabulary(text)
    tokens, held_out = split(vocabulary.encode(text).to(options.device), options.validation)
    streams(tokens, options.batch_size, options.seq_length)
    streams(held_out, 1, 1)
    vocabulary.encode(options.prompt or "")
    if options.tensorboard:
        summary_writer_class()
    names = (checkpoint.FILE_NAME, LOG_NAME, PLOT_NAME, run_state.FILE_NAME)
    prepare_folder(options.out, *names)
    return _Data(text, vocabulary, tokens, held_out)


def _prepare(options: argparse.Namespace, data: _Data, processes: Processes) -> Run:
    """A run that has taken no step yet."""
    torch.manual_seed(options.seed)
    if options.embedding is None:
        options.embedding = options.hidden if options.tied_weights else _UNTIED_EMBEDDING
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
        torch.manual_seed(options.seed + processes.rank)  # same weights, but dropout of its own
    settings = TrainingOptions(
        seq_length=options.seq_length,
        batch_size=options.batch_size,
        epochs=options.epochs,
        max_seconds=options.max_seconds,
        learning_rate=options.lr,
        clip=options.clip,
        schedule=options.schedule,
        eval_every=options.eval_every,
        patience=options.patience,
    )
    return Run(model, data.tokens, settings, data.held_out, processes)


def _train(run: Run, options: argparse.Namespace, data: _Data) -> float:
    """Take the steps that remain; returns the bits per character before the first one."""
    settings = _settings(options, data, run.processes)
    state_path = options.out / run_state.FILE_NAME
    state = run_state.load(settings, state_path) if options.resume else None
    if run.processes.is_first:
        _introduce(run, options, data)
    before = evaluate(
        run.model, data.held_out, options.batch_size, options.seq_length, run.processes
    )
    if state is None:
        run_state.save(run, settings, state_path)  # first, for the log has no step any more
        if run.processes.is_first:
            (options.out / checkpoint.FILE_NAME).unlink(missing_ok=True)  # of another training
    else:
        run_state.restore(run, state)
    if not run.processes.is_first:
        _take_steps(run, options, settings, None)
        return before
    if options.resume:
        print(f"resumed after step {run.steps:,} of {run.total:,}")
    tensorboard = options.out / "tensorboard" if options.tensorboard else None
    with TrainingLog(options.out / LOG_NAME, run.steps, tensorboard) as log:
        _take_steps(run, options, settings, log)
    return before


def _introduce(run: Run, options: argparse.Namespace, data: _Data) -> None:
    """Print what is learnt by what."""
    parameters = sum(weight.numel() for weight in run.model.parameters())
    print(
        f"text   {options.text or 'the manual that comes with Python'}: {len(data.text):,} "
        f"characters, {len(data.vocabulary)} distinct, the last {len(data.held_out):,} held out\n"
        f"model  {options.layers} x {options.hidden} LSTM units, {parameters:,} parameters, "
        f"backend {options.backend}"
    )


def _settings(options: argparse.Namespace, data: _Data, processes: Processes) -> run_state.Settings:
    """All that the result of a training depends on, by the name that the user gave it."""
    digest = hashlib.sha256(data.text.encode(errors="surrogatepass")).hexdigest()
    names = (
        *("validation", "hidden", "layers", "embedding", "dropout", "tied_weights"),
        *("seq_length", "batch_size", "epochs", "max_seconds", "lr", "clip", "schedule"),
        *("eval_every", "patience", "seed", "backend"),
    )
    return {
        "--text": f"{len(data.text):,} characters, {len(data.vocabulary)} distinct, "
        f"SHA-256 {digest[:16]}",
        **{f"--{name.replace('_', '-')}": getattr(options, name) for name in names},
        "--device": options.device.type,
        "the number of processes": processes.size,
    }


def _take_steps(
    run: Run,
    options: argparse.Namespace,
    settings: run_state.Settings,
    log: TrainingLog | None,
) -> None:
    """Train behind a progress bar, with checkpoints, and with a log in the first process.

    Raises:
        SystemExit: with 128 + the signal's number, after an interruption and a checkpoint.
    """
    with _Interruption() as interruption, _progress_bar(run) as bar:
        for record in run:
            bar.set_postfix_str(f"loss {record.bits_per_char:.2f} bits/char", refresh=False)
            bar.update(record.characters - bar.n)
            if log is not None:
                log.write(record, run.seconds)
                if run.best_step == record.step:
                    checkpoint.save(run.model, options.out / checkpoint.FILE_NAME)
            (stop,) = run.processes.highest(interruption.signal)
            if stop or run.ended or record.step % options.checkpoint_every == 0:
                if log is not None:
                    log.sync()
                run_state.save(run, settings, options.out / run_state.FILE_NAME)
            if stop:
                break
        else:
            return
    if run.processes.is_first:
        print(
            f"rnnfast train: stopped by {signal.Signals(int(stop)).name} after step {run.steps:,} "
            f"of {run.total:,}; the same command with --resume goes on from there",
            file=sys.stderr,
        )
    raise SystemExit(128 + int(stop))


class _Interruption:
    """Takes note of SIGINT and SIGTERM, so that the step under way is finished first.

    A second one changes nothing: torchrun passes on what the terminal has sent to all already.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> _Interruption:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def _progress_bar(run: Run) -> tqdm[None]:
    return tqdm(
        total=run.total_characters,
        initial=run.characters,
        desc="training",
        unit="char",
        unit_scale=True,
        smoothing=0.05,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log needs no animation
        disable=not run.processes.is_first,
    )


def _report(run: Run, options: argparse.Namespace, data: _Data, before: float) -> None:
    """Print and write what came of a training."""
    limits = {
        f"the time limit of {options.max_seconds:g} s": run.out_of_time,
        f"{options.patience} validations without a better loss": run.out_of_patience,
    }
    for reason, applies in limits.items():
        if applies and run.steps < run.total:
            print(f"{reason} ended the training after step {run.steps:,} of {run.total:,}")
    run.restore_best()
    checkpoint.save(run.model, options.out / checkpoint.FILE_NAME)
    bigram = bigram_bits_per_char(data.tokens.cpu(), data.held_out.cpu(), len(data.vocabulary))
    best = f"after step {run.best_step:,}, the best" if run.best_step < run.steps else ""
    print(
        "\nbits per character of the held-out text\n"
        f"  before training  {before:.3f}\n"
        f"  bigram model     {bigram:.3f}\n"
        f"  after training   {run.best_bits:.3f}  {best}".rstrip()
    )
    plot_loss(read_log(options.out / LOG_NAME), bigram, options.out / PLOT_NAME)

    prompt = data.text[:_PROMPT_LENGTH] if options.prompt is None else options.prompt
    sample = run.model.generate(
        prompt,
        options.sample_length,
        options.temperature,
        greedy=options.greedy,
        seed=options.seed,
    )
    choice = "without chance" if options.greedy else f"at temperature {options.temperature:g}"
    print(f"\nsample from {prompt!r} {choice}\n{prompt}{sample}")

    print("\ntraining speed of this model, characters per second")
    for name, speed in compare_speed(run.model, data.tokens, run.options, options.backend).items():
        print(f"  {name:<23}  {speed:>9,.0f}")
