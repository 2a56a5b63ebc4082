"""`rnnfast translate`."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Iterator
from itertools import islice

import torch

from rnnfast.cli.output import Results, naming
from rnnfast.cli.progress import Interruption, ProgressBar
from rnnfast.models.checkpoint import FILE_NAME
from rnnfast.models.processes import Processes
from rnnfast.models.translation import (
    Pair,
    TrainingOptions,
    Translator,
    exact_match,
    load_pairs,
    split_pairs,
    train,
)
from rnnfast.text import TextError
from rnnfast.text.dates import date_pairs

_HELD_OUT_DATES = 2000
_SHOWN = 8
_TEXTS_AT_ONCE = 256
# The held-out texts get this many seconds, or this share of --max-seconds if less.
_JUDGING_SECONDS, _JUDGING_SHARE = 10.0, 0.1


def run(options: argparse.Namespace) -> None:
    """Train a translator, or translate with one.

    Raises:
        SystemExit: with 1 if a text could not be translated or the training diverged, with 128 +
            the number of the signal if a signal stopped the training.
    """
    if options.model is None and not options.texts:
        _train(options)
    else:
        _translate(options)


def _translate(options: argparse.Namespace) -> None:
    """Print the translations of the arguments or, if there are none, of standard input's lines."""
    if options.pairs is not None:
        raise ValueError("--pairs are for training, which goes without TEXT and --model")
    with naming("--out" if options.model is None else "--model"):
        folder = options.model or options.out
        translator = Translator.load(folder, options.device, options.backend)
    texts = (text.strip() for text in options.texts or sys.stdin)
    count, failed = 0, 0
    at_once = 1 if not options.texts and sys.stdin.isatty() else _TEXTS_AT_ONCE
    while piece := list(islice(texts, at_once)):
        for translation in _translate_each(translator, piece, options.beam):
            count += 1
            if isinstance(translation, TextError):
                failed += 1
                print(f"rnnfast translate: text {count}: {translation}", file=sys.stderr)
            print("" if isinstance(translation, TextError) else translation)
        sys.stdout.flush()
    if not count:
        raise TextError("expected texts to translate, as arguments or on standard input, got none")
    if failed:
        raise SystemExit(1)


def _translate_each(
    translator: Translator, texts: list[str], beam_size: int
) -> Iterator[str | TextError]:
    """Yield the translation of each text, or the error that prevents it."""
    errors: dict[int, TextError] = {}
    for number, text in enumerate(texts):
        try:
            translator.encode_sources([text])
        except TextError as error:
            errors[number] = error
    readable = [text for number, text in enumerate(texts) if number not in errors]
    translations = iter(translator.translate(readable, beam_size))
    for number in range(len(texts)):
        yield errors[number] if number in errors else next(translations)


def _train(options: argparse.Namespace) -> None:
    """Train on pairs, print the exact matches on held-out pairs and some examples, and save."""
    start = time.monotonic()
    deadline = start + options.max_seconds
    results = Results(options.out, FILE_NAME)
    results.check(
        options.overwrite,
        "--overwrite trains anew and replaces it at the end, another --out leaves it, --model "
        "translates with it",
    )
    pairs, held_out = _read(options)
    torch.manual_seed(options.seed)
    translator = Translator.for_pairs(
        [*pairs, *held_out],
        options.hidden,
        num_layers=options.layers,
        embedding_size=options.embedding,
        dropout=options.dropout,
        reverse_source=options.reverse,
        device=options.device,
        backend=options.backend,
    )
    results.prepare()
    print(
        f"pairs  {options.pairs or 'dates in many spellings'}: {len(pairs):,} to learn, "
        f"{len(held_out):,} held out; {len(translator.source)} symbols to read, "
        f"{len(translator.target)} to write\n"
        f"model  {options.layers} x {options.hidden} LSTM units, "
        f"{sum(weight.numel() for weight in translator.model.parameters()):,} parameters, "
        f"backend {options.backend}"
    )
    results.begin(Processes())
    untrained, bits = _learn(translator, pairs, options, results, deadline)
    translator.save(results.work / FILE_NAME)
    ignorant = max(untrained, math.log2(len(translator.target)))
    if bits <= ignorant:
        results.finish()
    _judge(translator, held_out, options.beam, deadline)
    _show(translator, held_out[:_SHOWN], options.beam)
    print(f"\nwrote {results.work / FILE_NAME}; {time.monotonic() - start:.0f} s in all")
    if bits > ignorant:
        sys.stdout.flush()
        print(
            f"rnnfast translate: warning: the loss, {bits:.3f} bits per character, is worse than "
            f"that of a model that knows nothing ({ignorant:.3f}): it diverged; a lower --lr may "
            f"help",
            file=sys.stderr,
        )
        raise SystemExit(1)


def _read(options: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """The training pairs and the held-out pairs."""
    if options.pairs is None:
        return (
            date_pairs(options.examples, options.seed),
            date_pairs(_HELD_OUT_DATES, options.seed, held_out=True),
        )
    with naming("--pairs"):
        return split_pairs(load_pairs(options.pairs), options.validation)


def _learn(
    translator: Translator,
    pairs: list[Pair],
    options: argparse.Namespace,
    results: Results,
    deadline: float,
) -> tuple[float, float]:
    """Train with a progress bar; return the losses of the first step and of the last.

    Raises:
        SystemExit: with 128 + the number of the signal, if a signal stopped the training. The
            translator has been saved then.
    """
    judging = min(_JUDGING_SECONDS, _JUDGING_SHARE * options.max_seconds)
    settings = TrainingOptions(
        batch_size=options.batch_size,
        epochs=options.epochs,
        max_seconds=max(deadline - judging - time.monotonic(), 1e-9),
        learning_rate=options.lr,
        clip=options.clip,
        teacher_forcing=options.teacher_forcing,
    )
    total = settings.epochs * sum(len(target) + 1 for _, target in pairs)
    steps, first, last = train(translator, pairs, settings), None, math.inf
    with (
        Interruption() as interruption,
        ProgressBar(total, seconds=settings.max_seconds) as bar,
    ):
        for step in steps:
            last = step.bits_per_char
            first = last if first is None else first
            bar.set_postfix_str(f"loss {last:.3f} bits/char", refresh=False)
            bar.update(step.characters)
            if interruption.signal:
                translator.save(results.work / FILE_NAME)
                break
        done = bar.n
    if interruption.signal:
        print(
            f"rnnfast translate: stopped by {signal.Signals(interruption.signal).name} after "
            f"{done / total:.1%} of the training; what was learnt is in {results.work / FILE_NAME}",
            file=sys.stderr,
        )
        raise SystemExit(128 + interruption.signal)
    if done < total:
        print(
            f"the time limit of {options.max_seconds:g} s ended the training after "
            f"{done / total:.1%} of it"
        )
    return last if first is None else first, last


def _judge(translator: Translator, held_out: list[Pair], beam_size: int, deadline: float) -> None:
    """Print the fraction of exact matches on the held-out texts that the time allows."""
    done, right = 0, 0
    while done < len(held_out) and (not done or time.monotonic() < deadline):
        pairs = held_out[done : done + max(1, _TEXTS_AT_ONCE // beam_size)]
        right += round(exact_match(translator, pairs, beam_size) * len(pairs))
        done += len(pairs)
    first = "" if done == len(held_out) else f" (no time is left for {len(held_out) - done:,})"
    print(f"\nexact matches on {done:,} held-out texts{first}: {100 * right / done:.2f} %\n")


def _show(translator: Translator, pairs: list[Pair], beam_size: int) -> None:
    """Print some translations; a wrong one is followed by the right one."""
    translations = translator.translate([source for source, _ in pairs], beam_size)
    width = max(len(source) for source, _ in pairs)
    for (source, target), text in zip(pairs, translations, strict=True):
        print(f"  {source:<{width}}  {text}{'' if text == target else f' instead of {target}'}")
