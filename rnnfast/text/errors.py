"""The one exception of the text layer."""

from __future__ import annotations


class TextError(ValueError):
    """A text that cannot be used: empty, too short, not UTF-8, or with unknown characters."""
