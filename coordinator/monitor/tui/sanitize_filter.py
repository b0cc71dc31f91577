"""Sanitize all text on its way to the terminal, for every screen and widget."""

from __future__ import annotations

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from protocols.local.terminal_text import ascii_only, strip_controls


class SanitizeFilter(LineFilter):
    """Strips control characters and, if `ascii_too`, converts text to ASCII; styles stay."""

    def __init__(self, *, ascii_too: bool) -> None:
        super().__init__(enabled=True)
        self._ascii_too = ascii_too

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """The same segments with sanitized text."""
        result = []
        for segment in segments:
            text = segment.text
            if not segment.control and not (text.isascii() and text.isprintable()):
                clean = strip_controls(text)
                clean = ascii_only(clean) if self._ascii_too else clean
                if clean is not text:
                    segment = Segment(clean, segment.style)
            result.append(segment)
        return result
