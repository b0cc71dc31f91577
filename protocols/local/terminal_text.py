"""Text that is safe for a terminal: no control characters; for plain consoles only ASCII. Pure."""

from __future__ import annotations

import re
from functools import lru_cache

from rich.cells import cell_len, set_cell_size

#: ASCII characters of the same width for each of our glyphs.
_REPLACEMENTS = {
    "*": "●★█•",
    "+": "╭╮╰╯┌┐└┘├┤┬┴┼▅",
    "=": "‖━▆",
    "-": "–—─┄▃",
    "_": "▁▔␣",
    ".": "·╌▂▱",
    ":": "▄",
    "#": "▇▐▌▰■",
    "|": "│┃▏▎▊▕",
    "~": "◌…",
    ">": "◐→⏵▶",
    "<": "←◀",
    "^": "▲↑△",
    "v": "✓↓▼▽",
    "x": "✕×",
    "o": "○⭘◯°",
    "e": "ε",
    "d": "δ",
    '"': "“”",
    "'": "‘’",
}
_ASCII = str.maketrans({char: plain for plain, chars in _REPLACEMENTS.items() for char in chars})
# Braille keeps only its height: dots in the upper half, in the lower half, or in both.
_UPPER, _LOWER = 0b00011011, 0b11100100
_ASCII |= {
    0x2800 + dots: " '.:"[bool(dots & _UPPER) + 2 * bool(dots & _LOWER)] for dots in range(256)
}
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)


def strip_controls(text: str) -> str:
    """`text` without control characters and without marks that change its direction."""
    return text if text.isascii() and text.isprintable() else _CONTROLS.sub("", text)


@lru_cache(4096)
def ascii_only(text: str) -> str:
    """`text` in ASCII, of the same width: our glyphs as similar characters, all others as `?`."""
    if text.isascii():
        return text
    known = text.translate(_ASCII)
    return "".join(char if char.isascii() else "?" * cell_len(char) for char in known)


def fit_width(text: str, width: int, *, right: bool = False) -> str:
    """`text` truncated or padded to exactly `width` cells; wide characters take two."""
    if not text.isascii() and (wide := cell_len(text)) != len(text):
        return set_cell_size(text, width) if wide > width else text + " " * (width - wide)
    text = text[:width]
    return text.rjust(width) if right else text.ljust(width)
