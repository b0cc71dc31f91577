"""The colors of the monitor: a dark and a light theme, and all themes of Textual.

Ours follow the palette of Okabe and Ito, which color-blind people can tell apart
(jfly.uni-koeln.de/color). No information is carried by color alone. Code that draws text calls
`colors()`; the style sheet uses the theme.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rich.console import RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text
from textual.color import Color, ColorParseError
from textual.theme import Theme

from coordinator.monitor.peer_table import Cell, Tone


class Palette(NamedTuple):
    """Colors as `#rrggbb`: background, text from strong to faint, and those of the tones."""

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
            "edge": Style(color=self.faint),
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
    """A Textual theme; `steps` are surface, panel, boost, cursor and unfocused cursor."""
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
    theme.name: (theme, palette)
    for theme, palette in (
        (_theme("commonweight-dark", DARK, dark=True, steps=_DARK_STEPS), DARK),
        (_theme("commonweight-light", LIGHT, dark=False, steps=_LIGHT_STEPS), LIGHT),
    )
}
DEFAULT = "commonweight-dark"

_current: tuple[Palette, dict[Tone, Style]] = (DARK, DARK.styles())


def colors() -> Palette:
    """The colors of the current theme."""
    return _current[0]


def styles() -> dict[Tone, Style]:
    """The styles of the current theme."""
    return _current[1]


def set_colors(theme: Theme) -> None:
    """Use the colors of `theme` from now on, for the whole process: it has one terminal."""
    global _current
    palette = THEMES[theme.name][1] if theme.name in THEMES else _palette(theme)
    _current = (palette, palette.styles())


def _palette(theme: Theme) -> Palette:
    """The colors of a Textual theme; where it defines none, ours of the same lightness."""
    ours = DARK if theme.dark else LIGHT

    def pick(name: str | None, default: str) -> Color:
        try:
            color = Color.parse(name or default)
        except ColorParseError:
            return Color.parse(default)
        return Color.parse(default) if color.ansi is not None or color.a < 1 else color

    background, text = pick(theme.background, ours.background), pick(theme.foreground, ours.text)
    strong = Color.parse(ours.strong)
    return Palette(
        background=background.hex,
        strong=strong.hex,
        text=text.hex,
        dim=text.blend(background, 0.35).hex,
        faint=text.blend(background, 0.65).hex,
        accent=pick(theme.accent, ours.accent).hex,
        green=pick(theme.success, ours.green).hex,
        blue=pick(theme.primary, ours.blue).hex,
        yellow=pick(theme.warning, ours.yellow).hex,
        vermilion=pick(theme.error, ours.vermilion).hex,
        purple=pick(theme.secondary, ours.purple).hex,
    )


def to_text(cell: Cell) -> Text:
    """The cell as text; markup from a peer is not interpreted."""
    style = styles()[cell.tone] if cell.tone != "plain" else Style()
    return Text(cell.text, style, justify="left", no_wrap=True, end="")


Fact = tuple[str, Cell | RenderableType]


def facts_table(facts: Iterable[Fact]) -> Table:
    """Two columns: a name and a value. A value wraps, and text from a peer is not markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style=colors().dim, no_wrap=True)
    table.add_column(style=colors().text)
    for name, value in facts:
        if isinstance(value, Cell):
            value = to_text(value)
            value.no_wrap = False
        table.add_row(Text(name), Text(value) if isinstance(value, str) else value)
    return table
