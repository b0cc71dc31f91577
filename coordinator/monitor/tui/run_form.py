"""The form that starts a run: a field for each option of `commonweight run start`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from coordinator.api.schema import StartRunRequest
from coordinator.monitor.tui.theme import colors
from coordinator.remote import run_options
from coordinator.runs.options import OPTIONS
from protocols.errors import CommonweightError


def order(texts: Mapping[str, str]) -> StartRunRequest:
    """The order for texts by option name. Raises CommonweightError as the command does."""
    filled = [(one, texts.get(one.name, "").strip()) for one in OPTIONS]
    return run_options.build_order({one.name: one.parse(text) for one, text in filled if text})


class RunForm(ModalScreen[StartRunRequest | None]):
    """Dismisses with the checked order, or with None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", show=False),
        Binding("ctrl+s", "send", "Start", show=False),
        Binding("down", "app.focus_next", "Next", show=False),
        Binding("up", "app.focus_previous", "Before", show=False),
    ]

    def compose(self) -> ComposeResult:
        with Vertical(id="form") as box:
            box.border_title = "A new run"
            box.border_subtitle = "enter starts it · esc closes"
            with Vertical(id="fields"):  # a VerticalScroll would take the keys up and down
                for one in OPTIONS:
                    with Horizontal(classes="field"):
                        yield Label(one.name.replace("-", " "))
                        yield Input(one.default_text, placeholder=one.help, compact=True)
            yield Static(id="form-message")  # always visible, even when the fields are scrolled

    def on_mount(self) -> None:
        for one in self.query(Input):
            one.cursor_blink = False
        self.query(Input).first().focus()
        self._explain()

    def on_descendant_focus(self) -> None:
        self._explain()

    def _explain(self) -> None:
        """Show the help of the focused field."""
        inputs = list(self.query(Input))
        if self.focused in inputs:
            help_text = OPTIONS[inputs.index(self.focused)].help
            self.query_one("#form-message", Static).update(Text(help_text, colors().dim))

    @on(Input.Submitted)
    def action_send(self) -> None:
        """Check the order and close; an error is shown in the form."""
        inputs = zip(OPTIONS, self.query(Input), strict=True)
        try:
            made = order({option.name: field.value for option, field in inputs})
        except CommonweightError as err:
            message = f"✕ {err.message}. {err.hint}".rstrip(" .")
            self.query_one("#form-message", Static).update(Text(message, colors().vermilion))
        else:
            self.dismiss(made)

    def action_close(self) -> None:
        self.dismiss(None)
