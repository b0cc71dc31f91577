"""Names that commands take, which the shell completes: settings and their values, and tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import typer

from protocols.errors import CommonweightError
from protocols.local import homes
from protocols.messages import task_names


def complete_settings() -> Iterator[tuple[str, str]]:
    """Each setting and its meaning."""
    from agent.home import settings

    for name, about in settings.meanings().items():
        yield name, about.partition(";")[0]


def complete_values(context: typer.Context) -> Iterator[str]:
    """The words that the setting in the command line takes, if it takes words."""
    from agent.home.settings_schema import AgentSettings

    key = str(context.params.get("key", "")).replace(".", "_")
    hint = get_type_hints(AgentSettings).get(key)
    if get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif hint is bool:
        yield from ("true", "false")


def complete_tasks() -> list[str]:
    """The tasks of this machine."""
    from agent.home import settings
    from agent.setup import consents

    try:
        return sorted(consents.known_tasks(settings.read(homes.home_path("agent"))))
    except CommonweightError:
        return []


def whole_task_name(name: str) -> str:
    """The task or offer of this machine that is called so, "gait.py:Gait" for "Gait" or
    "./gait.py:Gait"; else the name as it is."""
    from agent.home import settings, task_offers
    from agent.setup import consents

    try:
        home = homes.home_path("agent")
        known = {*consents.known_tasks(settings.read(home)), *task_offers.read(home).by_name()}
    except CommonweightError:  # the command says what is wrong
        return name
    return task_names.whole_name(name, known)


def complete_trusted() -> Iterator[tuple[str, str]]:
    """The peers that the owner trusts, and the owner's names for them."""
    from agent.home import settings

    try:
        yield from settings.read(homes.home_path("agent")).trust.items()
    except CommonweightError:
        return


TaskName = Annotated[
    str,
    typer.Argument(
        help="Its name in `task list`.", autocompletion=complete_tasks, callback=whole_task_name
    ),
]
TaskPattern = Annotated[
    str,
    typer.Argument(
        help="Its name in `task list`, or * for every task.",
        autocompletion=complete_tasks,
        callback=whole_task_name,
    ),
]
