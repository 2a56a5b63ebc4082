"""The command line: `rnnfast train`, `generate`, `translate`, `explain`, `bench` and `doctor`."""

from rnnfast.cli.main import main

__all__ = ["main"]
