"""`rnnfast doctor`."""

from __future__ import annotations

import argparse

import rnnfast


def run(options: argparse.Namespace) -> None:
    """Print which kernels were built and which backends will run here."""
    print(rnnfast.doctor())
