"""`rnnfast train`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from rnnfast.cli.speed import compare_speed
from rnnfast.models import CharLSTM, checkpoint
from rnnfast.models.training import TrainingOptions, evaluate, train
from rnnfast.text import (
    CharVocabulary,
    bigram_bits_per_char,
    default_text,
    load_text,
    split,
    streams,
)

_PROMPT_LENGTH = 4  # "The ", in the default text


class _Data(NamedTuple):
    """The text, cut and encoded: what a run learns from, what it is judged by, its vocabulary."""

    text: str
    vocabulary: CharVocabulary
    tokens: Tensor
    held_out: Tensor


def run(options: argparse.Namespace) -> None:
    """Train on a text, judge the result, sample from it, time it, and write it down."""
    start = time.monotonic()
    data = _read(options)
    torch.manual_seed(options.seed)
    model = CharLSTM(
        len(data.vocabulary),
        options.hidden,
        options.layers,
        embedding_size=options.embedding,
        dropout=options.dropout,
        device=options.device,
        backend=options.backend,
        vocabulary=data.vocabulary,
    )
    settings = TrainingOptions(
        seq_length=options.seq_length,
        batch_size=options.batch_size,
        epochs=options.epochs,
        max_seconds=options.max_seconds,
        learning_rate=options.lr,
        clip=options.clip,
    )
    print(
        f"text   {options.text or 'the manual that comes with Python'}: {len(data.text):,} "
        f"characters, {len(data.vocabulary)} distinct, the last {len(data.held_out):,} held out\n"
        f"model  {options.layers} x {options.hidden} LSTM units, "
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters, "
        f"backend {options.backend}"
    )

    before = evaluate(model, data.held_out, settings.batch_size, settings.seq_length)
    curve = _train(model, data.tokens, settings)
    after = evaluate(model, data.held_out, settings.batch_size, settings.seq_length)
    bigram = bigram_bits_per_char(data.tokens.cpu(), data.held_out.cpu(), len(data.vocabulary))
    print(
        "\nbits per character of the held-out text\n"
        f"  before training  {before:.3f}\n"
        f"  bigram model     {bigram:.3f}\n"
        f"  after training   {after:.3f}"
    )

    weights, plot = options.out / checkpoint.FILE_NAME, options.out / "loss.png"
    checkpoint.save(model, weights)
    _plot(curve, {"bigram model, held-out": bigram, "this model, held-out": after}, plot)

    prompt = data.text[:_PROMPT_LENGTH] if options.prompt is None else options.prompt
    generator = torch.Generator(options.device).manual_seed(options.seed)
    sample = model.generate(prompt, options.sample_length, options.temperature, generator=generator)
    print(f"\nsample from {prompt!r} at temperature {options.temperature:g}\n{prompt}{sample}")

    print("\ntraining speed of this model, characters per second")
    for name, speed in compare_speed(model, data.tokens, settings, options.backend).items():
        print(f"  {name:<23}  {speed:>9,.0f}")
    print(f"\nwrote {weights} and {plot}; {time.monotonic() - start:.0f} s in all")


def _read(options: argparse.Namespace) -> _Data:
    """Prepare the data; what would stop the run minutes later, stops it here."""
    text = default_text() if options.text is None else load_text(options.text)
    vocabulary = CharVocabulary(text)
    tokens, held_out = split(vocabulary.encode(text).to(options.device), options.validation)
    streams(tokens, options.batch_size, options.seq_length)
    streams(held_out, 1, 1)
    vocabulary.encode(options.prompt or "")
    options.out.mkdir(parents=True, exist_ok=True)
    return _Data(text, vocabulary, tokens, held_out)


def _train(
    model: CharLSTM, tokens: Tensor, settings: TrainingOptions
) -> tuple[list[int], list[float]]:
    """Train behind a progress bar; returns characters read so far, and loss, for each step."""
    characters, losses = [0], []
    deadline = time.monotonic() + settings.max_seconds
    with tqdm(
        total=settings.epochs * len(tokens),
        desc="training",
        unit="char",
        unit_scale=True,
        smoothing=0.05,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log needs no animation
    ) as bar:
        for step in train(model, tokens, settings):
            characters.append(characters[-1] + step.characters)
            losses.append(step.bits_per_char)
            bar.set_postfix_str(f"loss {step.bits_per_char:.2f} bits/char", refresh=False)
            bar.update(step.characters)
    if time.monotonic() > deadline:
        print(f"the time limit of {settings.max_seconds:g} s ended the training")
    return characters[1:], losses


def _plot(curve: tuple[list[int], list[float]], levels: dict[str, float], path: Path) -> None:
    """Draw the training loss, and single figures as level lines."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*curve, linewidth=0.8, label="training")
    for number, (name, level) in enumerate(levels.items(), start=1):
        axes.axhline(level, color=f"C{number}", linestyle="--", label=f"{name} ({level:.2f})")
    axes.set(xlabel="characters read", ylabel="loss, bits per character", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
