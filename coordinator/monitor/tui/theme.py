"""The monitor's colours: ours in dark and light, after Okabe and Ito's palette, which the
colour-blind can tell apart (jfly.uni-koeln.de/color), and whatever Textual's themes bring.

Nothing is said by colour alone. What is drawn as text asks `colours()`; the style sheet asks the
theme itself.
"""

from __future__ import annotations

from typing import NamedTuple

from rich.style import Style
from rich.text import Text
from textual.color import Color, ColorParseError
from textual.theme import Theme

from coordinator.monitor.peer_table import Cell, Tone


class Palette(NamedTuple):
    """Colours as `#rrggbb`: the ground, the text from strong to faint, and what tones use."""

    background: str
    strong: str
    text: str
    dim: str
    faint: str
    accent: str
    green: str
    blue: str
    yellow: str
    vermilion: str
    purple: str

    def styles(self) -> dict[Tone, Style]:
        """A style for every tone of `coordinator.monitor.peer_table`."""
        return {
            "plain": Style(color=self.text),
            "quiet": Style(color=self.dim),
            "good": Style(color=self.green),
            "busy": Style(color=self.blue),
            "warn": Style(color=self.yellow),
            "bad": Style(color=self.vermilion),
            "ask": Style(color=self.purple),
            "strong": Style(color=self.strong, bold=True),
        }


DARK = Palette(
    background="#10151c",
    strong="#ffffff",
    text="#d5dbe3",
    dim="#8793a3",
    faint="#4a5563",
    accent="#e8a84c",
    green="#3fbf97",
    blue="#6cb8ee",
    yellow="#e3c04f",
    vermilion="#ee7b4c",
    purple="#d294bd",
)
LIGHT = Palette(
    background="#f6f7f9",
    strong="#000000",
    text="#1d2733",
    dim="#566373",
    faint="#a9b2bd",
    accent="#8f5a00",
    green="#00704f",
    blue="#00629b",
    yellow="#7d5c00",
    vermilion="#b03f00",
    purple="#95437a",
)


def _theme(name: str, of: Palette, *, dark: bool, steps: tuple[str, str, str, str, str]) -> Theme:
    """A Textual theme; `steps` are surface, panel, boost, cursor and the cursor without focus."""
    surface, panel, boost, cursor, blurred = steps
    return Theme(
        name=name,
        primary=of.blue,
        secondary=of.green,
        accent=of.accent,
        warning=of.yellow,
        error=of.vermilion,
        success=of.green,
        foreground=of.text,
        background=of.background,
        surface=surface,
        panel=panel,
        boost=boost,
        dark=dark,
        variables={
            "block-cursor-background": cursor,
            "block-cursor-foreground": of.strong,
            "block-cursor-text-style": "none",
            "block-cursor-blurred-background": blurred,
            "block-cursor-blurred-foreground": of.text,
            "scrollbar": boost,
            "scrollbar-hover": of.faint,
            "scrollbar-active": of.blue,
            "scrollbar-background": of.background,
            "scrollbar-corner-color": of.background,
            "border": of.blue,
            "border-blurred": boost,
            "input-cursor-text-style": "reverse",
        },
    )


_DARK_STEPS = ("#151b24", "#1c2430", "#2a3544", "#26384d", "#1e2a39")
_LIGHT_STEPS = ("#ffffff", "#e8ebef", "#d5dae1", "#d3e4f1", "#e3ebf2")
THEMES: dict[str, tuple[Theme, Palette]] = {
    "commonweight-dark": (
        _theme("commonweight-dark", DARK, dark=True, steps=_DARK_STEPS),
        DARK,
    ),
    "commonweight-light": (
        _theme("commonweight-light", LIGHT, dark=False, steps=_LIGHT_STEPS),
        LIGHT,
    ),
}
DEFAULT = "commonweight-dark"

_current: tuple[Palette, dict[Tone, Style]] = (DARK, DARK.styles())


def colors() -> Palette:
    """The colours of the theme in use."""
    return _current[0]


def styles() -> dict[Tone, Style]:
    """The styles of the theme in use."""
    return _current[1]


def set_colors(theme: Theme) -> None:
    """From now on text is drawn in the colours of this theme. There is one terminal, so one."""
    global _current
    palette = THEMES[theme.name][1] if theme.name in THEMES else _palette(theme)
    _current = (palette, palette.styles())


def _palette(theme: Theme) -> Palette:
    """What a foreign theme gives; where it names no colour, ours of its lightness."""
    ours = DARK if theme.dark else LIGHT

    def pick(name: str | None, otherwise: str) -> Color:
        try:
            color = Color.parse(name or otherwise)
        except ColorParseError:
            color = Color.parse(otherwise)
        return Color.parse(otherwise) if color.ansi is not None or color.a < 1 else color

    ground, ink = pick(theme.background, ours.background), pick(theme.foreground, ours.text)
    strong = Color.parse(ours.strong)
    return Palette(
        background=ground.hex,
        strong=strong.hex,
        text=ink.hex,
        dim=ink.blend(ground, 0.35).hex,
        faint=ink.blend(ground, 0.65).hex,
        accent=pick(theme.accent, ours.accent).hex,
        green=pick(theme.success, ours.green).hex,
        blue=pick(theme.primary, ours.blue).hex,
        yellow=pick(theme.warning, ours.yellow).hex,
        vermilion=pick(theme.error, ours.vermilion).hex,
        purple=pick(theme.secondary, ours.purple).hex,
    )


def to_text(cell: Cell, *, right: bool = False) -> Text:
    """The cell as text that no markup of a peer can change."""
    style = styles()[cell.tone] if cell.tone != "plain" else Style()
    return Text(cell.text, style, justify="right" if right else "left", no_wrap=True, end="")
