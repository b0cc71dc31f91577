"""`commonweight task …`: settings of a task, and offers of task files to the owners."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.cli.common import (
    Columns,
    Json,
    connect,
    print_json,
    print_line,
    print_list,
    print_result,
    print_table,
)
from coordinator.cli.names import complete_tasks
from protocols.errors import BadMessage, UnknownName, UsageError
from protocols.local.command_line import App

if TYPE_CHECKING:
    from protocols.messages.offers import Offer

tasks = App(help="Settings of tasks; offer task files; Flower apps: task app.")
#: A task has one of these methods; other classes of the file are models and helpers.
_DATA_METHODS = {"load", "data"}


@tasks.command("offer")
def offer(
    source: Annotated[
        str, typer.Argument(help="The file: ./my_task.py, or ./my_task.py:MyTask for its class.")
    ],
    note: Annotated[str, typer.Option(help="What the owners should know about it.")] = "",
    json: Json = False,
) -> None:
    """Offer a task file to all owners. No machine runs it before its owner has approved it."""
    from protocols.messages import offers
    from protocols.messages.offers import OfferRequest

    path_text, _, wanted = source.rpartition(":")
    if not (path_text and wanted.isidentifier()):
        path_text, wanted = source, ""
    path = Path(path_text).expanduser()
    if len(note) > 400 or not note.isprintable():
        raise UsageError("a note is one line of at most 400 characters", "shorten --note")
    try:
        with path.open("rb") as file:
            data = file.read(offers.MAX_FILE_BYTES + 1)
        text = offers.check_text(data)
        name = f"{path.name}:{_task_class(path, text, wanted)}"
        request = OfferRequest(name=offers.check_name(name), data=data, note=note)
    except OSError as err:
        raise UsageError(f"cannot read {path}: {err.strerror}") from err
    except BadMessage as err:
        raise UsageError(f"{path.name} cannot be offered: {err.message}", err.hint) from err
    made = connect().offer_task(request)
    lines = (
        f"offered {made.name}, sha256 {made.digest}",
        f"each owner decides: commonweight-agent task review {made.name}",
        f"then: commonweight run start {made.name}",
    )
    print_result(made, "\n".join(lines), json=json)


def _task_class(path: Path, text: str, wanted: str) -> str:
    """`wanted`, or the only class of the file that can be a task. Raises UsageError."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise UsageError(f"{path.name} is not Python: {err}", "correct the file") from err
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = [one.name for one in classes if _DATA_METHODS & {_name(node) for node in one.body}]
    if wanted in text if wanted else len(found) == 1:
        return wanted or found[0]
    names = ", ".join(found or [one.name for one in classes]) or "none"
    problem = f"has no class {wanted}" if wanted else "does not say which class is the task"
    raise UsageError(
        f"{path.name} {problem}; its classes: {names}", f"commonweight task offer {path}:MyTask"
    )


def _name(node: ast.AST) -> str:
    return node.name if isinstance(node, ast.FunctionDef) else ""


@tasks.command("list")
def list_offers(json: Json = False) -> None:
    """List the tasks that are offered now."""
    columns: Columns[Offer] = {
        "Task": lambda one: one.name,
        "SHA-256": lambda one: one.digest,
        "Offered": lambda one: time.strftime("%Y-%m-%d %H:%M", time.localtime(one.at)),
        "By": lambda one: one.by,
        "Note": lambda one: one.note,
    }
    empty = "no task is offered; to offer one: commonweight task offer ./my_task.py"
    print_list(connect().offers(), columns, empty, json=json)


@tasks.command("show")
def show(
    name: Annotated[
        str,
        typer.Argument(help="The task: mnist, my_task.py:MyTask, …", autocompletion=complete_tasks),
    ],
    json: Json = False,
) -> None:
    """List the settings that a task takes: types, bounds, help."""
    from protocols.model import built_in_settings, setting_specs

    if not (known := built_in_settings.BY_TASK.get(name)):
        card = connect().run(name).card
        if card is None or not card.settings:
            raise UnknownName(
                f"no peer has told the settings of {name} in its newest run",
                f"commonweight run check {name} --settings",
            )
        known = card.settings
    if json:
        print_json(known)
    else:
        rows = [list(row) for row in setting_specs.explain(known)]
        print_table(["Setting", "Values", "Help"], rows)


@tasks.command("withdraw")
def withdraw(
    name: Annotated[str, typer.Argument(help="The task, as `task list` names it.")],
) -> None:
    """Withdraw an offer. Machines that approved it stop, unless their owners keep it."""
    from protocols.messages.task_names import is_name_of

    remote = connect()
    offered = [one.name for one in remote.offers()]
    found = [one for one in offered if is_name_of(one, name)]
    if len(found) != 1:
        what = f"several tasks are called {name!r}" if found else f"no task {name!r} is offered"
        known = f"offered: {', '.join(found or offered)}"
        raise UnknownName(what, known if offered else "commonweight task list")
    (name,) = found
    remote.withdraw_task(name)
    print_line(f"withdrew {name}; agents that approved it ask their owners before further work")
