"""The line under the header: the pages; how the view differs from the plain one, or the round."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from coordinator.fleet.reducer import Run
from coordinator.monitor.round_table import round_progress, seconds_left
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import age, count

PAGES = ("fleet", "rounds", "events", "jobs")
#: Below that the pages stand closer.
MIN_ROOMY_WIDTH = 60


class Tabs(Widget):
    """`1 Fleet  2 Rounds  3 Events  4 Jobs`, the open one underlined; at the right filter and sort.

    In the plain view it is the round at a glance: who has answered, and how long the run will take.
    """

    DEFAULT_CSS = "Tabs { height: 1; padding: 0 1; }"

    auto_links = False  # our own colours, not those of links

    page: reactive[str] = reactive("fleet")
    """The open page."""
    view_text: reactive[str] = reactive("")
    """Words on filter, order, marks, freeze."""
    run: Run | None = None
    num_jobs = 0
    """Jobs under way."""

    def render(self) -> Text:
        line = Text(no_wrap=True, end="")
        for number, page in enumerate(PAGES, 1):
            click = Style(meta={"@click": f"app.page('{page}')"})
            here = page == self.page
            word = (
                Style(color=colors().strong, bold=True, underline=True)
                if here
                else Style(color=colors().dim)
            )
            line.append(
                f"{number} ", Style(color=colors().blue if here else colors().faint) + click
            )
            line.append(page.capitalize(), word + click)
            if page == "jobs" and self.num_jobs:
                line.append(f" {count(self.num_jobs)}", colors().green)
            line.append("   " if self.content_size.width >= MIN_ROOMY_WIDTH else "  ")
        room = self.content_size.width - len(line)
        if not self.view_text:
            end = self._round(room)
        else:
            end = Text(self.view_text, colors().yellow, no_wrap=True)
            end.truncate(max(room, 0), overflow="ellipsis")
        return line.append(" " * max(room - len(end), 0)).append_text(end)

    def _round(self, room: int) -> Text:
        own = colors()
        if self.run is None or not (words := round_progress(self.run, room)):
            return Text()
        signs, _, count = words.partition(" ")
        line = Text(signs.replace("▱", ""), own.green, no_wrap=True)
        line.append("▱" * signs.count("▱"), own.faint).append(f" {count}", own.text)
        left = seconds_left(self.run)
        end = "" if left is None else f" · about {age(left)} left"
        state = f"{self.run.changed.state.value} "
        if len(line) + len(end) <= room:
            line.append(end, own.dim)
        if len(line) + len(state) <= room:
            line = Text(state, own.dim).append_text(line)
        return line
