"""The monitor's colours: a quiet slate, and Okabe and Ito's palette, which the colour-blind can
tell apart (jfly.uni-koeln.de/color). Nothing is said by colour alone."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.theme import Theme

from coordinator.rows import Cell, Tone

ACCENT = "#e8a84c"
GROUND = "#10151c"
INK, DIM, FAINT = "#d5dbe3", "#8793a3", "#4a5563"
GREEN, BLUE, YELLOW, VERMILION, PURPLE = "#3fbf97", "#6cb8ee", "#e3c04f", "#ee7b4c", "#d294bd"

THEME = Theme(
    name="commonweight",
    primary=BLUE,
    secondary=GREEN,
    accent=ACCENT,
    warning=YELLOW,
    error=VERMILION,
    success=GREEN,
    foreground=INK,
    background=GROUND,
    surface="#151b24",
    panel="#1c2430",
    boost="#222c3a",
    dark=True,
    variables={
        "block-cursor-background": "#26384d",
        "block-cursor-foreground": "#ffffff",
        "block-cursor-text-style": "none",
        "block-cursor-blurred-background": "#1e2a39",
        "block-cursor-blurred-foreground": INK,
        "scrollbar": "#2a3544",
        "scrollbar-hover": "#3a4a5e",
        "scrollbar-active": BLUE,
        "scrollbar-background": GROUND,
        "scrollbar-corner-color": GROUND,
        "border": BLUE,
        "border-blurred": "#2a3544",
        "input-cursor-text-style": "reverse",
    },
)

STYLES: dict[Tone, Style] = {
    "plain": Style(),
    "quiet": Style(color=DIM),
    "good": Style(color=GREEN),
    "busy": Style(color=BLUE),
    "warn": Style(color=YELLOW),
    "bad": Style(color=VERMILION),
    "ask": Style(color=PURPLE),
    "strong": Style(color="#ffffff", bold=True),
}


def painted(cell: Cell, *, right: bool = False) -> Text:
    """The cell as text that no markup of a peer can change."""
    return Text(
        cell.text, STYLES[cell.tone], justify="right" if right else "left", no_wrap=True, end=""
    )
