"""The form that starts a run: a field for each option of `commonweight run start`.

The fields that most runs need stand first; the others appear with ctrl+o.
"""

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
from coordinator.runs.options import OPTIONS, Option
from protocols.errors import CommonweightError


def _is_first(option: Option) -> bool:
    return option.is_common or option.name == "task"


def ordered_options() -> list[Option]:
    """All options, those that most runs need first."""
    return sorted(OPTIONS, key=lambda option: not _is_first(option))


def order(texts: Mapping[str, str]) -> StartRunRequest:
    """The order for texts by option name. Raises CommonweightError as the command does."""
    filled = [(one, texts.get(one.name, "").strip()) for one in OPTIONS]
    return run_options.build_order({one.name: one.parse(text) for one, text in filled if text})


class RunForm(ModalScreen[StartRunRequest | None]):
    """Dismisses with the checked order, or with None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", show=False),
        Binding("ctrl+s", "send", "Start", show=False),
        Binding("ctrl+o", "more", "More options", show=False),
        Binding("down", "app.focus_next", "Next", show=False),
        Binding("up", "app.focus_previous", "Before", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._options = {f"field-{option.name}": option for option in ordered_options()}

    def compose(self) -> ComposeResult:
        with Vertical(id="form") as box:
            box.border_title = "A new run"
            with Vertical(id="fields"):  # a VerticalScroll would take the keys up and down
                for field, one in self._options.items():
                    with Horizontal(classes="field" if _is_first(one) else "field more"):
                        yield Label(one.name.replace("-", " "))
                        default = "" if one.unset else one.default_text
                        hint = one.unset or one.help
                        yield Input(default, placeholder=hint, compact=True, id=field)
            yield Static(id="form-message")  # always visible, even when the fields are scrolled

    def on_mount(self) -> None:
        for one in self.query(Input):
            one.cursor_blink = False
        self.query(Input).first().focus()
        self._explain()
        self._show_more(False)

    def on_descendant_focus(self) -> None:
        self._explain()

    def _explain(self) -> None:
        """Show the help of the focused field."""
        if self.focused is not None and (option := self._options.get(self.focused.id or "")):
            self.query_one("#form-message", Static).update(Text(option.help, colors().dim))

    def action_more(self) -> None:
        """Show the other options, or hide them."""
        self._show_more(not self.has_class("-all"))

    def _show_more(self, shown: bool) -> None:
        self.set_class(shown, "-all")
        others = "^o fewer options" if shown else "^o all options"
        self.query_one("#form").border_subtitle = f"enter starts it · {others} · esc closes"
        if self.focused is not None and not self.focused.display:
            self.query(Input).first().focus()

    @on(Input.Submitted)
    def action_send(self) -> None:
        """Check the order and close; an error is shown in the form."""
        texts = {self._options[field.id or ""].name: field.value for field in self.query(Input)}
        try:
            made = order(texts)
        except CommonweightError as err:
            message = f"✕ {err.message}. {err.hint}".rstrip(" .")
            self.query_one("#form-message", Static).update(Text(message, colors().vermilion))
        else:
            self.dismiss(made)

    def action_close(self) -> None:
        self.dismiss(None)
