"""The footer: the keys that matter on this page, as many as fit; help and quit always."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from coordinator.tui.keys import KEYS, LAST, Key
from coordinator.tui.theme import BLUE, DIM


class Footer(Widget):
    """Each key can be clicked."""

    DEFAULT_CSS = "Footer { height: 1; padding: 0 1; background: $panel; dock: bottom; }"

    auto_links = False  # our own colours, not those of links

    page: reactive[str] = reactive("fleet")
    """The page whose keys are shown."""

    def __init__(self, *, read_only: bool = False) -> None:
        super().__init__()
        self._read_only = read_only

    def render(self) -> Text:
        return footer_line(self.page, self.content_size.width, read_only=self._read_only)


def footer_line(page: str, width: int, *, read_only: bool = False) -> Text:
    """The footer's text in `width` characters: the keys of the page, then help and quit."""
    keys = [key for key in KEYS if page in key.pages and not (read_only and key.changes)]
    last = [key for key in keys if key.shown in LAST]
    end = Text("  ").join(map(_one, last))
    line = Text(no_wrap=True, end="")
    for key in keys:
        if key in last:
            continue
        piece = _one(key)
        if len(line) + len(piece) + 2 + len(end) > width:
            break
        line.append_text(piece).append("  ")
    line.append(" " * max(width - len(line) - len(end), 0))
    return line.append_text(end)


def _one(key: Key) -> Text:
    action = "command_palette" if key.action == "command_palette" else key.action
    click = Style(meta={"@click": f"app.{action}"})
    text = Text.assemble((key.shown, Style(color=BLUE, bold=True) + click))
    return text.append(f" {key.word}", Style(color=DIM) + click)
