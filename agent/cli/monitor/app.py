"""The owner's monitor in a terminal: panels that are read again each second, and a few keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from rich.segment import Segment
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.containers import Container, Vertical, VerticalScroll
from textual.events import Resize
from textual.filter import LineFilter
from textual.theme import Theme
from textual.widgets import Static

from agent.cli.monitor.panels import BORDER, COLUMNS, Panel, Tone, panels, state_line
from agent.cli.monitor.readings import Machine
from protocols.errors import CommonweightError
from protocols.local.terminal_text import ascii_only

#: Panels stand in two columns from this width on.
MIN_TWO_COLUMNS = 100
_PANEL_IDS = ("asks", *COLUMNS[0], *COLUMNS[1], "own", "left")
Look = Literal["dark", "light"]
#: The colors of the coordinator's monitor.
_COLORS: dict[Look, dict[Tone, str]] = {
    "dark": {
        "plain": "#d5dbe3",
        "dim": "#8793a3",
        "good": "#3fbf97",
        "warn": "#e3c04f",
        "bad": "#ee7b4c",
        "busy": "#6cb8ee",
    },
    "light": {
        "plain": "#1d2733",
        "dim": "#566373",
        "good": "#00704f",
        "warn": "#7d5c00",
        "bad": "#b03f00",
        "busy": "#00629b",
    },
}
_BACKGROUNDS: dict[Look, tuple[str, str, str]] = {
    "dark": ("#10151c", "#151b24", "#1c2430"),
    "light": ("#f6f7f9", "#ffffff", "#e8ebef"),
}
_KEYS = (("p", "pause"), ("r", "resume"), ("t", "theme"), ("↑ ↓", "scroll"), ("q", "quit"))


def _theme(look: Look) -> Theme:
    background, surface, panel = _BACKGROUNDS[look]
    return Theme(
        name=f"commonweight-{look}",
        primary=_COLORS[look]["busy"],
        foreground=_COLORS[look]["plain"],
        background=background,
        surface=surface,
        panel=panel,
        dark=look == "dark",
    )


class _AsciiFilter(LineFilter):
    """Converts all text to ASCII of the same width; styles stay."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            segment if segment.control else Segment(ascii_only(segment.text), segment.style)
            for segment in segments
        ]


class OwnerMonitor(App[None]):
    """`commonweight-agent monitor`.

    `read` looks at the machine, and `request(want)` sends a request of the owner to the agent.
    """

    TITLE = "commonweight-agent"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #header, #keys { height: 1; padding: 0 1; background: $panel; }
    #keys { dock: bottom; }
    #panels { height: 1fr; scrollbar-size-vertical: 1; }
    #columns { height: auto; layout: vertical; }
    .-wide #columns { layout: horizontal; }
    #columns > Vertical { height: auto; width: 1fr; }
    .panel {
        height: auto; padding: 0 1; border: round $panel-lighten-2; border-title-color: $foreground;
        border-title-style: bold; display: none;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "request('pause')", "pause", show=False),
        Binding("r", "request('run')", "resume", show=False),
        Binding("t", "look", "theme", show=False),
        Binding("j,down", "scroll(1)", "down", show=False),
        Binding("k,up", "scroll(-1)", "up", show=False),
        Binding("q,escape", "quit", "quit", show=False),
    ]

    def __init__(
        self,
        read: Callable[[], Machine],
        request: Callable[[Literal["pause", "run"]], None],
        *,
        look: Look = "dark",
        in_ascii: bool = False,
    ) -> None:
        self._filters_of_ours = [_AsciiFilter()] if in_ascii else []
        super().__init__()
        self._read, self._request, self._look = read, request, look
        for name in _COLORS:
            self.register_theme(_theme(name))

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), *self._filters_of_ours]

    def compose(self) -> ComposeResult:
        yield Static(id="header")
        with VerticalScroll(id="panels"):
            yield _panel("asks")
            with Container(id="columns"):
                for names in COLUMNS:
                    with Vertical():
                        yield from map(_panel, names)
            yield _panel("own")
            yield _panel("left")
        yield Static(id="keys")

    def on_mount(self) -> None:
        self._use(self._look)
        self.set_interval(1.0, self.draw)
        self.call_after_refresh(self.draw)

    def _use(self, look: Look) -> None:
        """Draw in the colors of this look."""
        self._look, self.theme = look, _theme(look).name
        key = f"bold {_COLORS[look]['busy']}"
        parts = (part for name, what in _KEYS for part in ((name, key), f" {what}  "))
        self.query_one("#keys", Static).update(Text.assemble(*parts, no_wrap=True))

    def on_resize(self, event: Resize) -> None:
        self.screen.set_class(event.size.width >= MIN_TWO_COLUMNS, "-wide")
        self.call_after_refresh(self.draw)

    def draw(self) -> None:
        """Read the machine and draw it; an error is shown until it is gone."""
        if not self.query("#header"):  # a resize may come before the widgets
            return
        header, colors = self.query_one("#header", Static), _COLORS[self._look]
        try:
            machine = self._read()
        except CommonweightError as err:
            header.update(Text(f"✕ {err.message}. {err.hint}".rstrip(" ."), colors["bad"]))
            return
        header.update(_header(machine, colors))
        # Without the border and, where they scroll, the scroll bar.
        wide = self.screen.has_class("-wide")
        width = self.size.width // (2 if wide else 1) - 5
        shown = {panel.id: panel for panel in panels(machine, width, wide=wide)}
        for name in _PANEL_IDS:
            widget = self.query_one(f"#{name}", Static)
            widget.display = name in shown
            if name in shown:
                widget.border_title = shown[name].title
                widget.update(_text(shown[name], colors))
        # The last panel reaches the bottom of a large terminal.
        heights = {name: len(panel.lines) + BORDER for name, panel in shown.items()}
        columns = [sum(heights.get(name, 0) for name in column) for column in COLUMNS]
        above = (
            heights.get("asks", 0)
            + heights.get("own", 0)
            + (max(columns) if wide else sum(columns))
        )
        left = self.query_one("#left", Static)
        left.styles.min_height = max(self.query_one("#panels").size.height - above, BORDER)

    def action_request(self, want: Literal["pause", "run"]) -> None:
        """Ask the agent to pause, or to work again."""
        self._request(want)
        self.draw()

    def action_look(self) -> None:
        """Change between the dark and the light colors."""
        self._use("light" if self._look == "dark" else "dark")
        self.draw()

    def action_scroll(self, step: int) -> None:
        self.query_one("#panels", VerticalScroll).scroll_relative(y=step, animate=False)


def _panel(name: str) -> Static:
    return Static(id=name, classes="panel")


def _header(machine: Machine, colors: dict[Tone, str]) -> Text:
    state = state_line(machine)
    name = machine.status.name if machine.status else "commonweight-agent"
    line = Text.assemble((name, "bold"), " · ", (state.text, colors[state.tone]), no_wrap=True)
    line.overflow = "ellipsis"
    return line


def _text(panel: Panel, colors: dict[Tone, str]) -> Text:
    lines = (Text(line.text, colors[line.tone], no_wrap=True) for line in panel.lines)
    text = Text("\n").join(lines)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
