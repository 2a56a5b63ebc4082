"""`rnnfast generate`."""

from __future__ import annotations

import argparse
import random
from typing import Any

from rnnfast.cli.output import naming
from rnnfast.models import checkpoint


def run(options: argparse.Namespace) -> None:
    """Print the prompts and their continuations; print a single one while it is generated."""
    with naming("--model"):
        model = checkpoint.load(options.model, options.device, backend=options.backend)
    if model.vocabulary is not None:
        for option, texts in (("--prompt", options.prompt), ("--stop", [options.stop or ""])):
            for text in texts:
                with naming(option):
                    model.vocabulary.encode(text)
    choice: dict[str, Any] = {
        "greedy": options.greedy,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "stop": options.stop,
        "seed": random.SystemRandom().getrandbits(63) if options.seed is None else options.seed,
    }
    if len(options.prompt) > 1:
        texts = model.generate(options.prompt, options.length, options.temperature, **choice)
        print("\n\n".join(a + b for a, b in zip(options.prompt, texts, strict=True)))
        return
    (prompt,) = options.prompt
    begun = False

    def show(piece: str) -> None:
        nonlocal begun
        print(piece if begun else prompt + piece, end="", flush=True)
        begun = True

    model.generate(prompt, options.length, options.temperature, callback=show, **choice)
    print("" if begun else prompt)
