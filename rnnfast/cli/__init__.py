"""The command line: `rnnfast train`, `rnnfast generate`, `rnnfast doctor`."""

from rnnfast.cli.main import main

__all__ = ["main"]
