"""`rnnfast doctor`."""

from __future__ import annotations

import argparse

import rnnfast


def run(options: argparse.Namespace) -> None:
    """Print what was built and what will run here."""
    print(rnnfast.doctor())
