"""The one exception of the text layer."""

from __future__ import annotations


class TextError(ValueError):
    """A text, vocabulary or tokens cannot be used: empty, too short, unknown or damaged."""
