"""The line under the header: the three pages, and how the view differs from the plain one."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from coordinator.tui.theme import colours

PAGES = ("fleet", "rounds", "events")


class Tabs(Widget):
    """`1 Fleet  2 Rounds  3 Events`, the open page underlined; at the right filter, sort, marks."""

    DEFAULT_CSS = "Tabs { height: 1; padding: 0 1; }"

    auto_links = False  # our own colours, not those of links

    page: reactive[str] = reactive("fleet")
    """The open page."""
    view: reactive[str] = reactive("")
    """Words on filter, order, marks, freeze."""

    def render(self) -> Text:
        line = Text(no_wrap=True, end="")
        for number, page in enumerate(PAGES, 1):
            click = Style(meta={"@click": f"app.page('{page}')"})
            here = page == self.page
            word = (
                Style(color=colours().strong, bold=True, underline=True)
                if here
                else Style(color=colours().dim)
            )
            line.append(
                f"{number} ", Style(color=colours().blue if here else colours().faint) + click
            )
            line.append(page.capitalize(), word + click).append("   ")
        room = self.content_size.width - len(line)
        view = self.view if len(self.view) <= room else self.view[: max(room - 1, 0)] + "…"
        line.append(" " * (room - len(view)))
        return line.append(view, colours().yellow)
