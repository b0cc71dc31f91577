"""The dialogs: help, a new ticket, a question."""

from __future__ import annotations

import sys
from typing import ClassVar, Generic, TypeVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from coordinator.monitor.tui.keys import KEYS, KeyMap
from coordinator.monitor.tui.theme import colors

Answer = TypeVar("Answer")


class Dialog(ModalScreen[Answer], Generic[Answer]):
    """A box over the page; `esc`, `q` or `enter` closes it without an answer."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "close", "Close", show=False)
    ]
    title_text = ""
    subtitle_text = "esc closes"

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="box") as box:
            box.border_title = self.title_text
            box.border_subtitle = self.subtitle_text
            yield Static(id="dialog-text")

    def on_mount(self) -> None:
        self.query_one("#dialog-text", Static).update(self.content())

    def content(self) -> Text | Table:
        """The text in the box."""
        raise NotImplementedError

    def action_close(self) -> None:
        self.dismiss(None)


#: What each page shows; the help begins with that of the focused one.
PAGE_HELP = {
    "fleet": "Fleet: one row per peer, those that need attention first. Commands go to the marked "
    "peers, or to the one under the cursor. Seen is the age of a peer's last message. Links: m is "
    "MQTT, f its Flower session; ● up, ○ down.",
    "rounds": "Rounds: the current run, one row per closed round, the newest first; ★ marks the "
    "best. The plots show the mean of all peers, and shade their range.",
    "events": "Events: all events, and this monitor's own. enter opens the peer of a line.",
    "jobs": "Jobs: inference and analytics. Left are the items that are neither answered nor "
    "leased to a peer. Below the table are the details of the job under the cursor.",
    "peer": "Peer: 1 overview, 2 metrics, 3 its log (fetched when opened; never data, paths or "
    "secrets), 4 the settings that its owner shares. esc goes back.",
    "filter": "Filter: every word must be in the name, id, labels, task, state or text. enter "
    "goes back to the rows, esc shows all again.",
}


class HelpDialog(Dialog[None]):
    """The keys, those of the open page first."""

    title_text = "Keys"

    def __init__(self, page: str, key_map: KeyMap, about: str) -> None:
        super().__init__()
        self._page, self._key_map, self._about = page, key_map, about

    def content(self) -> Table:
        own = colors()
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", style=f"bold {own.blue}", no_wrap=True)
        table.add_column(style=own.text)
        table.add_column(style=own.dim, no_wrap=True)
        table.add_row("", Text(PAGE_HELP[self._about], own.dim))
        table.add_row("", "")
        table.add_row("↑ ↓ j k", "move; g and G: first and last row")
        here = [key for key in KEYS if self._page in key.pages.split()]
        for key in (*here, *(key for key in KEYS if key not in here)):
            if self._key_map.has(key):
                table.add_row(key.display(self._key_map.remapped), key.description, key.id)
        return table


class TicketDialog(Dialog[None]):
    """Shows a ticket once; it is stored nowhere."""

    title_text = "A ticket, shown only once"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "copy", "Copy", show=False),
        Binding("p", "print", "Print", show=False),
    ]

    def __init__(self, ticket: str) -> None:
        super().__init__()
        self._ticket = ticket

    def content(self) -> Text:
        own = colors()
        text = Text.assemble(("On the new machine, run:\n\n", own.dim))
        text.append("commonweight-agent join -\n\n", own.blue)
        text.append("and paste this line:\n\n", own.dim)
        text.append(f"{self._ticket}\n\n", f"bold {own.text}")
        text.append("y", f"bold {own.blue}").append(" copies it. ", own.dim)
        text.append("p", f"bold {own.blue}")
        text.append(" prints it as one line, to select it with the mouse.", own.dim)
        return text

    def action_copy(self) -> None:
        """Copy to the clipboard, if the terminal allows it."""
        self.app.copy_to_clipboard(self._ticket)
        self.query_one("#box").border_subtitle = "copied, if the terminal allows it · esc closes"

    def action_print(self) -> None:
        """Print the ticket below the prompt, where the terminal wraps it and copies it whole."""
        try:
            with self.app.suspend():
                sys.stdout.write(f"\n{self._ticket}\n\npress enter to return to the monitor\n")
                sys.stdout.flush()
                sys.stdin.readline()
        except SuspendNotSupported:
            self.query_one("#box").border_subtitle = "not possible here: use y · esc closes"


class ConfirmDialog(Dialog[bool]):
    """A question; only `y` confirms."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes", show=False),
        Binding("n", "answer(False)", "No", show=False),
    ]
    title_text = "Sure?"
    subtitle_text = "y yes · n no"

    def __init__(self, question: str, consequence: str) -> None:
        super().__init__()
        self._question, self._consequence = question, consequence

    def content(self) -> Text:
        own = colors()
        text = Text.assemble((f"{self._question}\n\n", f"bold {own.text}"))
        text.append(f"{self._consequence}\n\n", own.dim)
        for key, word, answer in (("y", " yes", True), ("n", " no", False)):
            click = f"@click=screen.answer({answer})"
            text.append_text(Text.from_markup(f"[{click}][bold {own.blue}]{key}[/]{word}[/]    "))
        return text

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)
