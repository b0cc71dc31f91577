"""The plots of a run by round, as many as fit, as a widget."""

from __future__ import annotations

from textwrap import wrap

from rich.style import Style
from rich.text import Text
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from coordinator.fleet.readings import current_run
from coordinator.fleet.state import Fleet, Run
from coordinator.monitor import round_table
from coordinator.monitor.evaluations import Evaluations
from coordinator.monitor.tui.plots import side_by_side
from coordinator.monitor.tui.round_panes import Pane, panes
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import truncate

GAP = 3
MIN_PANE_WIDTH, MIN_PANE_HEIGHT = 26, 6
MIN_HEIGHT_TWO_ROWS = 15


class RoundPlots(Widget):
    """At most `only` plots, the most important first; with `words` below a summary of the run."""

    DEFAULT_CSS = "RoundPlots { padding: 0 1; }"

    def __init__(
        self,
        *,
        id: str | None = None,  # noqa: A002
        only: int | None = None,
        words: bool = False,
    ) -> None:
        super().__init__(id=id)
        self.fleet: Fleet | None = None
        self._compared, self._evaluations = "", Evaluations()
        self._only, self._words = only, words
        self._shown: tuple[object, ...] = ()
        self._drawn: tuple[object, ...] = ()
        self._plots: list[Strip] = []
        self._strips: list[Strip] = []

    def show(
        self, fleet: Fleet | None, compared: str = "", evaluations: Evaluations | None = None
    ) -> None:
        """Draw the current run of `fleet` if it has changed, before the run `compared`."""
        run = current_run(fleet) if fleet else None
        last = run.rounds[-1] if run and run.rounds else None
        words = round_table.describe_run(run) if run and self._words else ""
        counts: tuple[int, ...] = (
            len(run.rounds) if run else 0,
            len(fleet.peers) if fleet else 0,
        )
        other = fleet.runs.get(compared) if fleet else None
        counts += (len(other.rounds) if other else 0,)
        self._compared, self._evaluations = compared, evaluations or Evaluations()
        shown = (
            *(run and run.changed.run, last, counts, colors(), compared),
            *(self._evaluations.by_peer, self._evaluations.withheld, words),
        )
        if shown != self._shown or fleet is not self.fleet:
            self.fleet, self._shown = fleet, shown
            self.refresh()

    def render_lines(self, crop: Region) -> list[Strip]:
        # Textual needs three times as long to split one Text into lines.
        self._strips = self._build_strips()
        return super().render_lines(crop)

    def render_line(self, y: int) -> Strip:
        if y < len(self._strips):
            return self._strips[y]
        return Strip.blank(self.content_size.width, self.rich_style)

    def _build_strips(self) -> list[Strip]:
        run = current_run(self.fleet) if self.fleet else None
        width, height = self.content_size
        if self.fleet is None or run is None or width < 12 or height < 3:
            return []
        header = _run_header(run, width) if self._words else []
        base, left = self.rich_style, height - len(header)
        drawn = (*self._shown[:-1], width, left, base)
        if drawn != self._drawn:  # the header changes far more often than the plots
            found = panes(run, self.fleet, self._compared, self._evaluations)
            lines = lay_out(found[: self._only], width, left)
            self._drawn, self._plots = drawn, self._as_strips(lines, width, base)
        return [*self._as_strips(header, width, base), *self._plots]

    def _as_strips(self, lines: list[Text], width: int, base: Style) -> list[Strip]:
        console = self.app.console
        return [
            Strip(line.render(console)).apply_style(base).adjust_cell_length(width, base)
            for line in lines
        ]


def _run_header(run: Run, width: int) -> list[Text]:
    """The task and the state of the run: at most four lines and a blank one."""
    lines = [Text(truncate(run.changed.task, width), f"bold {colors().text}", no_wrap=True)]
    words = wrap(round_table.describe_run(run).removeprefix(f"{run.changed.task} · "), width)
    return [*lines, *(Text(line, colors().dim, no_wrap=True) for line in words[:3]), Text()]


def lay_out(shown: list[Pane], width: int, height: int) -> list[Text]:
    """As many of `shown` as fit, in rows of equal panes."""
    across = max(1, min((width + GAP) // (MIN_PANE_WIDTH + GAP), len(shown)))
    if height >= MIN_HEIGHT_TWO_ROWS and across > 3 and len(shown) > 3:
        across = 3
    down = max(1, min((height + 1) // (MIN_PANE_HEIGHT + 1), -(-len(shown) // across)))
    wide = (width + GAP) // across - GAP
    tall = (height - (down - 1)) // down
    lines: list[Text] = []
    for first in range(0, min(across * down, len(shown)), across):
        row = [pane(wide, tall) for pane in shown[first : first + across]]
        lines += ([Text()] if lines else []) + side_by_side(row, wide, tall, GAP)
    return lines
