"""The form that starts a run: the options of `commonweight run start`, with their own checks.

The fields are read off the command itself, so that the form knows no option that the command line
does not, and refuses nothing that it takes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import click
import typer
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from coordinator.api.schema import RunOrder
from coordinator.cli import runs
from coordinator.monitor.tui.theme import colours
from coordinator.remote import run_options as typed
from protocols.errors import CommonweightError, UsageFault

#: They say how the command behaves, not what is trained; or the same as another.
_NOT_ASKED = frozenset({"follow", "json", "help", "task_"})


def _command() -> click.Command:
    group = typer.main.get_command(runs.runs)
    assert isinstance(group, click.Group)
    return group.commands["start"]


class Field:
    """One option: its name as typed, what it means, what holds without it."""

    def __init__(self, parameter: click.Parameter) -> None:
        self.is_argument = isinstance(parameter, click.Argument)
        self.flag = parameter.opts[0]
        self.label = (parameter.name or "").rstrip("_").replace("_", " ")
        self.several = bool(parameter.multiple)
        self.meaning = str(getattr(parameter, "help", "") or "What to train, for example mnist.")
        default = parameter.default
        self.default = "" if default is None or callable(default) else str(default)

    def words(self, typed: str) -> list[str]:
        """What would stand on the command line."""
        if self.is_argument:
            return [typed]
        return [
            word
            for one in (typed.split() if self.several else [typed])
            for word in (self.flag, one)
        ]


def fields() -> list[Field]:
    """The fields of the form."""
    asked = [one for one in _command().params if one.name not in _NOT_ASKED]
    return [Field(one) for one in asked if not getattr(one, "is_flag", False)]


def order(words: dict[str, str]) -> RunOrder:
    """The run that these words, by flag, ask for. Raises CommonweightError as the command does."""
    options: list[str] = []
    arguments: list[str] = []
    for field in fields():
        if text := words.get(field.flag, "").strip():
            (arguments if field.is_argument else options).extend(field.words(text))
    command = _command()
    try:
        # After `--`, so that no argument is taken for an option.
        context = command.make_context("start", [*options, "--", *arguments])
    except click.UsageError as err:
        raise UsageFault(err.format_message()) from err
    known: dict[str, Any] = {
        name: value for name, value in context.params.items() if name not in _NOT_ASKED
    }
    made: RunOrder = typed.order(**known, task_="")
    return made


class RunForm(ModalScreen[RunOrder | None]):
    """Answers with the order, checked, or with None."""

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
            with Vertical(id="fields"):  # no VerticalScroll: that has up and down for itself
                for field in fields():
                    with Horizontal(classes="field"):
                        yield Label(field.label)
                        yield Input(field.default, placeholder=field.meaning, compact=True)
            yield Static(id="form-says")  # in sight however far the fields are scrolled

    def on_mount(self) -> None:
        for one in self.query(Input):
            one.cursor_blink = False
        self.query(Input).first().focus()
        self._explain()

    def on_descendant_focus(self) -> None:
        self._explain()

    def _explain(self) -> None:
        """What the field under the cursor means."""
        inputs = list(self.query(Input))
        if self.focused in inputs:
            says = fields()[inputs.index(self.focused)].meaning
            self.query_one("#form-says", Static).update(Text(says, colours().dim))

    @on(Input.Submitted)
    def action_send(self) -> None:
        """Check and answer; what is wrong is said in the form."""
        words = {
            field.flag: one.value for field, one in zip(fields(), self.query(Input), strict=True)
        }
        try:
            made = order(words)
        except CommonweightError as err:
            said = f"✕ {err.message}. {err.hint}".rstrip(" .")
            self.query_one("#form-says", Static).update(Text(said, colours().vermilion))
        else:
            self.dismiss(made)

    def action_close(self) -> None:
        self.dismiss(None)
