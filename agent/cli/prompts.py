"""What `join` and `task allow` ask on a terminal. Each answer is checked when it is given."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from agent.cli.common import print_line
from agent.home import settings
from protocols.errors import UsageError
from protocols.local import homes, json_output

#: The questions, and the meaning of an empty answer.
_PROMPTS = {
    "battery": ("train on battery too? always, or auto for no", "auto"),
    "hours": ("work hours, for example mon-fri 18:00-08:00; empty for all", ""),
    "cpu_share": ("share of the CPU time to use, 0.01 to 1", "1"),
    "allow": ("tasks that may train on your data, such as tabular; empty: you are asked", ""),
    "columns": ("columns that tasks may use, such as age,sex; or all", None),
}


def can_ask() -> bool:
    """True if a person can read a question and answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(name: str, there: Sequence[str] = ()) -> str:
    """Ask until the answer is one that the setting takes. `there`: the columns of the data."""
    question, default = _PROMPTS[name]
    while True:
        text = str(typer.prompt(question, default=default, show_default=bool(default), err=True))
        try:
            check_answer(name, text, there)
        except UsageError as err:
            print_line(json_output.format_error(err))
        else:
            return text


def ask_columns(data: str, there: Sequence[str]) -> str:
    """Show the columns of the data, and ask which may be used."""
    from agent.setup import own_data

    print_line(f"the columns of {data}: {own_data.shorten(there)}")
    return ask("columns", there)


def check_answer(name: str, text: str, there: Sequence[str] = ()) -> None:
    """Raise UsageError or UnknownName if it is no value of this setting."""
    from agent.policy import consent
    from agent.setup import consents, own_data

    home = homes.home_path("agent")
    if name == "columns":
        for pattern in consents.parse_columns(text) or []:
            if not any(consent.matches(column, [pattern]) for column in there):
                raise UsageError(own_data.unknown_column(pattern, there))
    elif name == "allow":
        known = consents.known_tasks(settings.read(home))
        consents.allowing(settings.read_own(home), known, consents.split_list(text) or [])
    else:
        settings.read(home, **{name: text})
