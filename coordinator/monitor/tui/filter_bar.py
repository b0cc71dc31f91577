"""The line into which words are typed that choose what a page shows."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.message import Message
from textual.widgets import Input, Static


class FilterBar(Horizontal):
    """Hidden until asked for. Says `Changed` with each letter and `Done` after enter."""

    class Changed(Message):
        """The words are others now."""

    class Submitted(Message):
        """Enter was pressed: the page has the focus again."""

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
        """What was typed."""
        return self.query_one(Input).value

    def open(self) -> None:
        """Open the line and type into it."""
        self.display = True
        self.query_one(Input).focus()

    def clear(self) -> None:
        """Empty and hide it."""
        self.query_one(Input).value = ""
        self.display = False

    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(self.Changed())

    @on(Input.Submitted)
    def _done(self, event: Input.Submitted) -> None:
        event.stop()
        self.display = bool(self.text)
        self.post_message(self.Submitted())
