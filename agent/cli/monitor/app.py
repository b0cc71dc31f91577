"""The owner's monitor in a terminal: panels that are read again each second, and a few keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.theme import Theme
from textual.widgets import Static

from agent.cli.monitor.panels import Panel, Tone, panels, state_line
from agent.cli.monitor.readings import Machine, MachineReader
from protocols.errors import CommonweightError

#: Panels stand in two columns from this width on.
MIN_TWO_COLUMNS = 100
_PANEL_IDS = ("asks", "machine", "policy", "cpu", "budget", "left")
_COLORS: dict[Tone, str] = {
    "plain": "#d5dbe3",
    "dim": "#8793a3",
    "good": "#3fbf97",
    "warn": "#e3c04f",
    "bad": "#ee7b4c",
    "busy": "#6cb8ee",
}
_KEY = f"bold {_COLORS['busy']}"
#: The colors of the coordinator's monitor.
_THEME = Theme(
    name="commonweight-dark",
    primary=_COLORS["busy"],
    foreground=_COLORS["plain"],
    background="#10151c",
    surface="#151b24",
    panel="#1c2430",
    dark=True,
)


class OwnerMonitor(App[None]):
    """`commonweight-agent monitor`. `request(want)` sends a request of the owner to the agent."""

    TITLE = "commonweight-agent"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #header, #keys { height: 1; padding: 0 1; background: $panel; }
    #keys { dock: bottom; }
    #panels { layout: grid; grid-size: 1; grid-rows: auto; height: 1fr; }
    .-wide #panels { grid-size: 2; }
    .panel {
        height: auto; padding: 0 1; border: round $panel-lighten-2; border-title-color: $foreground;
        border-title-style: bold; display: none;
    }
    #left { height: auto; }
    .-wide #left, .-wide #asks { column-span: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "request('pause')", "pause", show=False),
        Binding("r", "request('run')", "resume", show=False),
        Binding("q,escape", "quit", "quit", show=False),
    ]

    def __init__(self, home: Path, request: Callable[[Literal["pause", "run"]], None]) -> None:
        super().__init__()
        self._reader, self._request = MachineReader(home), request
        self.register_theme(_THEME)

    def compose(self) -> ComposeResult:
        yield Static(id="header")
        with VerticalScroll(id="panels"):
            for name in _PANEL_IDS:
                yield Static(id=name, classes="panel")
        keys = Text.assemble(
            ("p", _KEY), " pause  ", ("r", _KEY), " resume  ", ("q", _KEY), " quit"
        )
        yield Static(keys, id="keys")

    def on_mount(self) -> None:
        self.theme = _THEME.name
        self.set_interval(1.0, self.draw)
        self.call_after_refresh(self.draw)

    def on_resize(self, event: Resize) -> None:
        self.screen.set_class(event.size.width >= MIN_TWO_COLUMNS, "-wide")
        self.call_after_refresh(self.draw)

    def draw(self) -> None:
        """Read the machine and draw it; an error is shown until it is gone."""
        header = self.query_one("#header", Static)
        try:
            machine = self._reader.read()
        except CommonweightError as err:
            header.update(Text(f"✕ {err.message}. {err.hint}".rstrip(" ."), _COLORS["bad"]))
            return
        header.update(_header(machine))
        width = self.size.width // (2 if self.screen.has_class("-wide") else 1) - 4
        shown = {panel.id: panel for panel in panels(machine, width)}
        for name in _PANEL_IDS:
            widget = self.query_one(f"#{name}", Static)
            widget.display = name in shown
            if name in shown:
                widget.border_title = shown[name].title
                widget.update(_text(shown[name]))

    def action_request(self, want: Literal["pause", "run"]) -> None:
        """Ask the agent to pause, or to work again."""
        self._request(want)
        self.draw()


def _header(machine: Machine) -> Text:
    state = state_line(machine)
    name = machine.status.name if machine.status else "commonweight-agent"
    line = Text.assemble((name, "bold"), " · ", (state.text, _COLORS[state.tone]), no_wrap=True)
    line.overflow = "ellipsis"
    return line


def _text(panel: Panel) -> Text:
    lines = (Text(line.text, _COLORS[line.tone], no_wrap=True) for line in panel.lines)
    text = Text("\n").join(lines)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
