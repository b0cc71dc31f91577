"""What reaches the terminal: no character that could steer it and, on request, only ASCII."""

from __future__ import annotations

import re
from functools import lru_cache

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

#: Each of ours by one that any console has, of the same width.
_LIKES = {
    "*": "●★█•",
    "+": "╭╮╰╯┌┐└┘├┤┬┴┼▅",
    "=": "‖━▆",
    "-": "–—─▃",
    "_": "▁▔␣",
    ".": "·╌▂",
    ":": "▄",
    "#": "▇▐▌",
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
_ASCII = str.maketrans({sign: like for like, signs in _LIKES.items() for sign in signs})
_STEERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)


def harmless(text: str) -> str:
    """`text` without escape codes and without what turns the direction of writing."""
    return text if text.isascii() and text.isprintable() else _STEERS.sub("", text)


@lru_cache(4096)
def ascii_only(text: str) -> str:
    """`text` in ASCII and of the same width: our signs by their likes, all else by `?`."""
    if text.isascii():
        return text
    known = text.translate(_ASCII)
    return "".join(sign if sign.isascii() else "?" * cell_len(sign) for sign in known)


class PlainFilter(LineFilter):
    """The last gate before the terminal, for every screen and widget."""

    def __init__(self, *, ascii_too: bool) -> None:
        super().__init__(enabled=True)
        self._ascii_too = ascii_too

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """The same segments with harmless text."""
        done = []
        for segment in segments:
            text = segment.text
            if not segment.control and not (text.isascii() and text.isprintable()):
                clean = harmless(text)
                clean = ascii_only(clean) if self._ascii_too else clean
                if clean is not text:
                    segment = Segment(clean, segment.style)
            done.append(segment)
        return done
