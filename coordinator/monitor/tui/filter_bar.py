"""The input line for the filter of a page."""

from __future__ import annotations

from collections.abc import Callable

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.message import Message
from textual.widgets import Input, Static


class FilterBar(Horizontal):
    """Hidden until opened. Posts `Changed` for each edit and `Submitted` on enter."""

    class Changed(Message):
        """The text has changed."""

    class Submitted(Message):
        """Enter was pressed: the page takes the focus back."""

    def __init__(self, placeholder: str) -> None:
        super().__init__(classes="filter")
        self._placeholder = placeholder

    def compose(self) -> ComposeResult:
        yield Static("/", classes="slash")
        yield Input(placeholder=self._placeholder, compact=True)

    def on_mount(self) -> None:
        self.query_one(Input).cursor_blink = False
        self.display = False

    @property
    def text(self) -> str:
        """The filter words."""
        return self.query_one(Input).value

    def matcher(self) -> Callable[[str], bool]:
        """A test whether a text contains every word of the filter, in any case."""
        words = self.text.casefold().split()
        return lambda text: all(word in text.casefold() for word in words)

    def open(self) -> None:
        """Show the line and focus it."""
        self.display = True
        self.query_one(Input).focus()

    def clear(self) -> None:
        """Clear and hide the line."""
        self.query_one(Input).value = ""
        self.display = False

    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(self.Changed())

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.display = bool(self.text)
        self.post_message(self.Submitted())
