"""Finds fonts for the characters of a text (needs the extra cli, for matplotlib)."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.font_manager import FontEntry

_PREFERRED = (
    *("Noto Sans Mono CJK", "Noto Sans CJK", "Source Han Sans", "WenQuanYi Zen Hei Mono"),
    *("WenQuanYi", "Sarasa Mono", "Droid Sans Fallback", "Noto Sans", "Symbola", "Unifont"),
)
# The first four draw a box or nothing for every character, the others a symbol of their own.
_USELESS = ("Last Resort", "LastResort", "Adobe Blank", "cm", "STIXNonUnicode", "STIXSize")
_EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "IDEOGRAPHIC")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def drawable(text: Iterable[str], family: str) -> tuple[list[str], list[str]]:
    """Choose font families for the characters of a text.

    If no installed font has a character, a warning names the packages to install.

    Args:
        text: The characters.
        family: The preferred font family, such as "monospace".

    Returns:
        The characters, with U+FFFD in place of those that cannot be drawn; and the font families,
        starting with ``family``.
    """
    from matplotlib.font_manager import FontProperties, findfont

    characters = [char if char.isprintable() else _UNKNOWN for char in text]
    families = [family]
    missing = set(characters) - _glyphs(findfont(FontProperties(family=family)))
    if missing:
        for name, path in _installed():
            found = missing & _glyphs(path)
            if found:
                families.append(name)
                missing -= found
            if not missing:
                break
    if missing:
        some = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in sorted(missing)[:3])
        warnings.warn(
            f"no installed font has {some}{' and others' if len(missing) > 3 else ''}; install "
            f"{' and '.join(sorted(set(map(_package, missing))))}, or their like",
            stacklevel=3,
        )
    return [_UNKNOWN if char in missing else char for char in characters], families


def _package(char: str) -> str:
    """The package of Debian and Ubuntu that has a font with this character."""
    name = unicodedata.name(char, "")
    if name.startswith(_EAST_ASIAN):
        return "fonts-noto-cjk"
    return "fonts-symbola" if unicodedata.category(char).startswith("S") else "fonts-noto-core"


@cache
def _glyphs(path: str) -> frozenset[str]:
    """The characters that matplotlib can draw with a font file; none if it cannot read the file."""
    from matplotlib.font_manager import get_font

    try:
        font = get_font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


def _installed() -> list[tuple[str, str]]:
    """The name and file of each installed font family, the most suitable ones first.

    The system is searched again, because matplotlib caches the fonts that were installed when it
    first ran.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:
        with suppress(OSError, RuntimeError):
            fontManager.addfont(path)

    def rank(font: FontEntry) -> tuple[int, bool, bool, str]:
        starts = [i for i, start in enumerate(_PREFERRED) if font.name.startswith(start)]
        usual = font.weight in (400, "normal", "regular", "book")
        return min(starts, default=len(_PREFERRED)), font.style != "normal", not usual, font.name

    families: dict[str, str] = {}
    for font in sorted(fontManager.ttflist, key=rank):
        if not font.name.startswith(_USELESS):
            families.setdefault(font.name, font.fname)
    return list(families.items())
