"""`rnnfast translate`."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from tqdm import tqdm

from rnnfast.cli.output import prepare_folder
from rnnfast.models.checkpoint import FILE_NAME
from rnnfast.models.translation import (
    Pair,
    TrainingOptions,
    Translator,
    exact_match,
    load_pairs,
    train,
)
from rnnfast.text import TextError
from rnnfast.text.dates import date_pairs

_HELD_OUT_DATES = 2000
_SHOWN = 8


def run(options: argparse.Namespace) -> None:
    """Train a translator, or translate with one."""
    if options.model is None and not options.texts:
        _train(options)
    else:
        _translate(options)


def _translate(options: argparse.Namespace) -> None:
    """Print the translations of the arguments or, without any, of the lines of standard input."""
    if options.pairs is not None:
        raise ValueError("--pairs are for training, which goes without TEXT and --model")
    translator = Translator.load(options.model or options.out, options.device, options.backend)
    texts = [text.strip() for text in options.texts or sys.stdin]
    if not texts:
        raise TextError("expected texts to translate, as arguments or on standard input, got none")
    if "" in texts:
        raise TextError(f"expected a text, but number {texts.index('') + 1} is empty")
    for translation in translator.translate(texts, options.beam):
        print(translation)


def _train(options: argparse.Namespace) -> None:
    """Train on pairs, judge the result by others, show some, and write it down."""
    start = time.monotonic()
    pairs, held_out = _read(options)
    prepare_folder(options.out, FILE_NAME)
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
    print(
        f"pairs  {options.pairs or 'dates in many spellings'}: {len(pairs):,} to learn, "
        f"{len(held_out):,} held out; {len(translator.source)} symbols to read, "
        f"{len(translator.target)} to write\n"
        f"model  {options.layers} x {options.hidden} LSTM units, "
        f"{sum(weight.numel() for weight in translator.model.parameters()):,} parameters, "
        f"backend {options.backend}"
    )
    _learn(translator, pairs, options)
    accuracy = exact_match(translator, held_out, options.beam)
    print(f"\nexact matches on {len(held_out):,} held-out texts: {100 * accuracy:.2f} %\n")
    _show(translator, held_out[:_SHOWN], options.beam)
    translator.save(options.out / FILE_NAME)
    print(f"\nwrote {options.out / FILE_NAME}; {time.monotonic() - start:.0f} s in all")


def _read(options: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """The pairs to learn from, and those to judge by."""
    if options.pairs is None:
        return (
            date_pairs(options.examples, options.seed),
            date_pairs(_HELD_OUT_DATES, options.seed, held_out=True),
        )
    pairs = load_pairs(options.pairs)
    cut = len(pairs) - round(len(pairs) * options.validation)
    if not 0 < cut < len(pairs):
        raise TextError(
            f"{options.pairs} has too few pairs, {len(pairs)}, to keep {options.validation:g} of "
            f"them"
        )
    return pairs[:cut], pairs[cut:]


def _learn(translator: Translator, pairs: list[Pair], options: argparse.Namespace) -> None:
    """Train behind a progress bar."""
    settings = TrainingOptions(
        batch_size=options.batch_size,
        epochs=options.epochs,
        max_seconds=options.max_seconds,
        learning_rate=options.lr,
        clip=options.clip,
        teacher_forcing=options.teacher_forcing,
    )
    deadline = time.monotonic() + settings.max_seconds
    with tqdm(
        total=settings.epochs * sum(len(target) + 1 for _, target in pairs),
        desc="training",
        unit="char",
        unit_scale=True,
        smoothing=0.05,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log needs no animation
    ) as bar:
        for step in train(translator, pairs, settings):
            bar.set_postfix_str(f"loss {step.bits_per_char:.3f} bits/char", refresh=False)
            bar.update(step.characters)
    if time.monotonic() > deadline:
        print(f"the time limit of {settings.max_seconds:g} s ended the training")


def _show(translator: Translator, pairs: list[Pair], beam_size: int) -> None:
    """Print some translations, and what they should be where they are not."""
    translations = translator.translate([source for source, _ in pairs], beam_size)
    width = max(len(source) for source, _ in pairs)
    for (source, target), text in zip(pairs, translations, strict=True):
        print(f"  {source:<{width}}  {text}{'' if text == target else f' instead of {target}'}")
