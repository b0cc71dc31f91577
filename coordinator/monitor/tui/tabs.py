"""The line of tabs below the header; at its right the filter and order, or the round.

Textual's Tabs take two lines, and have no room for more text.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from coordinator.fleet.state import Run
from coordinator.monitor.round_table import round_progress, seconds_left
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import age, count

PAGES = ("fleet", "rounds", "events", "jobs")
#: Narrower tabs stand closer together.
MIN_ROOMY_WIDTH = 60


def tab_labels(names: Sequence[str], current: str, action: str) -> list[Text]:
    """`1 Fleet`, `2 Rounds` and so on, the current one underlined; a click runs `action`."""
    own, labels = colors(), []
    for number, name in enumerate(names, 1):
        click = Style(meta={"@click": f"{action}('{name}')"})
        is_open = name == current
        label = Text(f"{number} ", Style(color=own.blue if is_open else own.faint) + click, end="")
        open_style = Style(color=own.strong, bold=True, underline=True)
        style = open_style if is_open else Style(color=own.dim)
        labels.append(label.append(name.capitalize(), style + click))
    return labels


class Tabs(Widget):
    """`1 Fleet  2 Rounds  3 Events  4 Jobs`, and `view_text` or the progress of the round."""

    DEFAULT_CSS = "Tabs { height: 1; padding: 0 1; }"

    auto_links = False  # keep our colors instead of those of links

    page: reactive[str] = reactive("fleet")
    """The open page."""
    view_text: reactive[str] = reactive("")
    """Filter, order, marks, freeze."""
    run: Run | None = None
    num_jobs = 0
    """Working jobs."""

    def render(self) -> Text:
        width = self.content_size.width
        labels = tab_labels(PAGES, self.page, "app.page")
        if self.num_jobs:
            labels[-1].append(f" {count(self.num_jobs)}", colors().green)
        gap = "   " if width >= MIN_ROOMY_WIDTH else "  "
        line = Text(no_wrap=True, end="")
        for label in labels:
            line.append_text(label).append(gap)
        room = width - len(line)
        if self.view_text:
            end = Text(self.view_text, colors().yellow, no_wrap=True)
            end.truncate(max(room, 0), overflow="ellipsis")
        else:
            end = self._round(room)
        return line.append(" " * max(room - len(end), 0)).append_text(end)

    def _round(self, room: int) -> Text:
        """The state and progress of the round, and the time left; as much as fits."""
        own = colors()
        if self.run is None or not (text := round_progress(self.run, room)):
            return Text()
        bar, _, answered = text.partition(" ")
        line = Text(bar.replace("▱", ""), own.green, no_wrap=True)
        line.append("▱" * bar.count("▱"), own.faint).append(f" {answered}", own.text)
        left = seconds_left(self.run)
        end = "" if left is None else f" · about {age(left)} left"
        state = f"{self.run.changed.state.value} "
        if len(line) + len(end) <= room:
            line.append(end, own.dim)
        if len(line) + len(state) <= room:
            line = Text(state, own.dim).append_text(line)
        return line
