"""What a terminal may be sent: nothing that steers it; for plain consoles only ASCII. Pure."""

from __future__ import annotations

import re
from functools import lru_cache

from rich.cells import cell_len, set_cell_size

#: Each of ours by one that any console has, of the same width.
_REPLACEMENTS = {
    "*": "●★█•",
    "+": "╭╮╰╯┌┐└┘├┤┬┴┼▅",
    "=": "‖━▆",
    "-": "–—─▃",
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
    "o": "○⭘◯",
    '"': "“”",
    "'": "‘’",
}
_ASCII = str.maketrans({sign: like for like, signs in _REPLACEMENTS.items() for sign in signs})
# Of braille only the height is kept: dots in the upper half, in the lower half, in both.
_UPPER, _LOWER = 0b00011011, 0b11100100
_ASCII |= {
    0x2800 + dots: " '.:"[bool(dots & _UPPER) + 2 * bool(dots & _LOWER)] for dots in range(256)
}
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)


def strip_controls(text: str) -> str:
    """`text` without escape codes and without what turns the direction of writing."""
    return text if text.isascii() and text.isprintable() else _CONTROLS.sub("", text)


@lru_cache(4096)
def ascii_only(text: str) -> str:
    """`text` in ASCII and of the same width: our signs by their likes, all else by `?`."""
    if text.isascii():
        return text
    known = text.translate(_ASCII)
    return "".join(sign if sign.isascii() else "?" * cell_len(sign) for sign in known)


def fit_width(text: str, width: int, *, right: bool = False) -> str:
    """`text` in exactly `width` cells; wide letters count for two."""
    if not text.isascii() and (wide := cell_len(text)) != len(text):
        return set_cell_size(text, width) if wide > width else text + " " * (width - wide)
    text = text[:width]
    return text.rjust(width) if right else text.ljust(width)
