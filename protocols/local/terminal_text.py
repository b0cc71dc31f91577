"""Text that is safe for a terminal: no control characters; for plain consoles only ASCII. Pure.

"Trojan Source" (Boucher, Anderson, 2021) shows what hidden characters do to a reviewer of code.
"""

from __future__ import annotations

import re
import unicodedata
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
    ">": "◐◔→⏵▶",
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


#: Characters that `str.isprintable` passes and that a terminal shows as nothing, or as a space.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


def show_hidden(text: str) -> str:
    """`text` with `<U+202E>` for each character that a terminal obeys, hides, or shows as a space
    or in another order: controls but tabs, format characters, and letters from right to left."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c == "\t" or _is_visible(c) else f"<U+{ord(c):04X}>" for c in text)


def _is_visible(char: str) -> bool:
    is_ordered = unicodedata.bidirectional(char) not in ("R", "AL", "AN")
    return char.isprintable() and is_ordered and not _BLANK.match(char)


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
