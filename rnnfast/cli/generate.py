"""`rnnfast generate`."""

from __future__ import annotations

import argparse

import torch

from rnnfast.models import checkpoint


def run(options: argparse.Namespace) -> None:
    """Print the prompt and what a trained model makes of it."""
    model = checkpoint.load(options.model, options.device, backend=options.backend)
    generator = torch.Generator(options.device)
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    continuation = model.generate(
        options.prompt, options.length, options.temperature, generator=generator
    )
    print(options.prompt + continuation)
