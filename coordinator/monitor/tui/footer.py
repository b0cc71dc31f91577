"""The footer: the keys of the open page, as many as fit, or for some seconds a message.

Textual's Footer cuts off the last keys at 60 columns (help and quit) and takes 27 ms for a change
of the page; this one takes less than 1 ms. Textual's toasts cover what they lie on; a message here
covers only keys.
"""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from coordinator.monitor.peer_table import LEVELS
from coordinator.monitor.tui.keys import KEYS, MIN_WIDTH_PALETTE, PINNED, REPLAY_ONLY, Key, KeyMap
from coordinator.monitor.tui.messages import Message
from coordinator.monitor.tui.theme import colors, styles


class Footer(Widget):
    """Each key can be clicked."""

    DEFAULT_CSS = "Footer { height: 1; padding: 0 1; background: $panel; dock: bottom; }"

    auto_links = False  # keep our colors instead of those of links

    page: reactive[str] = reactive("fleet")
    """The page whose keys are shown."""
    message: reactive[Message | None] = reactive(None)
    """Stands in place of the keys."""

    def __init__(self, key_map: KeyMap, page: str) -> None:
        super().__init__()
        self._key_map = key_map
        self.set_reactive(Footer.page, page)

    def render(self) -> Text:
        width = self.content_size.width
        if self.message is not None:
            return message_line(self.message, width)
        return footer_line(self.page, width, self._key_map)


def message_line(message: Message, width: int) -> Text:
    """Glyph, text and the number of other messages, in `width` characters."""
    glyph, tone = LEVELS[message.level]
    more = f"  and {message.num_more} more: 3 shows all" if message.num_more else ""
    style = styles()[tone] if tone != "quiet" else Style(color=colors().text)
    line = Text(f"{glyph} {message.text}", style, no_wrap=True, end="")
    line.truncate(max(width - len(more), 0), overflow="ellipsis")
    return line.append(more, colors().dim)


def footer_line(page: str, width: int, key_map: KeyMap = KeyMap()) -> Text:
    """The footer's text in `width` characters: the keys of the page, then help and quit.

    In a recording its own keys stand first. There the key that leads back takes the place of the
    palette's, so that a phone can leave a peer.
    """
    keys = [key for key in KEYS if page in key.pages.split() and key_map.has(key)]
    keys.sort(key=lambda key: key.id not in REPLAY_ONLY)
    at_end = {*PINNED, "plain"} if key_map.replay else PINNED
    pinned = [key for key in keys if key.id in at_end]
    if width < MIN_WIDTH_PALETTE or any(key.id == "plain" for key in pinned):
        pinned = [key for key in pinned if key.id != "palette"]
    end = Text("  ").join(_entry(key, key_map) for key in pinned)
    line = Text(no_wrap=True, end="")
    for key in keys:
        if key.id in at_end:
            continue
        entry = _entry(key, key_map)
        if len(line) + len(entry) + 2 + len(end) > width:
            break
        line.append_text(entry).append("  ")
    line.append(" " * max(width - len(line) - len(end), 0))
    return line.append_text(end)


def _entry(key: Key, key_map: KeyMap) -> Text:
    click = Style(meta={"@click": f"app.{key.action}"})
    name = key.short_display(key_map.remapped)
    text = Text.assemble((name, Style(color=colors().blue, bold=True) + click))
    return text.append(f" {key.label}", Style(color=colors().dim) + click)
