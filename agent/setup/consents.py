"""How an owner allows and forbids tasks, for `join --allow` and `commonweight-agent task`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from agent.home import consent_requests, settings
from agent.home.consent_requests import Request
from agent.home.settings_schema import AgentSettings
from agent.policy import consent, task_code
from agent.policy.consent import ASKED_FIRST
from agent.tasks import registry
from protocols.errors import UnknownName, UsageError
from protocols.messages.envelope import strip_controls

EVERY = "*"
#: What stands for every column of the data.
ALL_COLUMNS = "all"


def split_list(text: str | None) -> list[str] | None:
    """The parts of `age,sex`; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def parse_columns(text: str | None) -> list[str] | None:
    """The patterns of `age,sex`, or that of `all`; None stays None. Raises UsageError."""
    if text is not None and text.strip() == ALL_COLUMNS:
        return ["*"]
    found = split_list(text)
    if found == []:
        raise UsageError("--columns names no column", "write for example --columns age,sex, or all")
    return found


def known_tasks(chosen: AgentSettings) -> dict[str, str]:
    """The tasks on this machine, with their files; installed ones have none."""
    return dict.fromkeys(registry.names(), "") | chosen.task_files


def allowing(
    chosen: AgentSettings,
    known: Mapping[str, str],
    names: Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    purpose: str | None = None,
) -> dict[str, Any]:
    """The settings that change when the owner allows these tasks. Raises UnknownName, UsageError.

    `known` are the tasks on this machine. What is not given stays as it was. A task that is new
    here and reads the owner's table awaits the names of its columns.
    """
    for name in names:
        if name != EVERY and name not in known:
            raise UnknownName(
                f"this machine has no task {name!r}",
                f"tasks here: {', '.join(sorted(known))}; one of your own: commonweight-agent "
                "task add",
            )
    for column in columns or ():
        if column != "*" and not consent.narrow([column], chosen.data_columns):
            raise UsageError(
                f"data.columns does not allow the column {column!r}",
                "commonweight-agent policy set data.columns",
            )
    given: dict[str, Any] = {"at": time.time()}
    if columns is not None:  # the pattern of all has no limit beside `data_columns`
        given["columns"] = () if list(columns) == ["*"] else tuple(columns)
    if purpose is not None:
        if len(purpose) > consent.MAX_PURPOSE_CHARS:
            raise UsageError(f"a purpose has at most {consent.MAX_PURPOSE_CHARS} characters")
        given["purpose"] = strip_controls(purpose)
    consents = dict(chosen.consents)
    for name in names:
        source = known.get(name, "")
        code = task_code.digest(source) if source else ""
        if source and not code:
            raise UsageError(f"the file of {name} cannot be read: {source.rpartition(':')[0]}")
        said = chosen.consent_to(name)
        awaits = columns is None and _awaits_columns(chosen, name)
        consents[name] = replace(said, **given, code=code, awaits_columns=awaits)
    return {
        "tasks": [*chosen.tasks, *(name for name in names if name not in chosen.tasks)],
        "forbidden_tasks": [name for name in chosen.forbidden_tasks if name not in names],
        "consents": consents,
    }


def _awaits_columns(chosen: AgentSettings, name: str) -> bool:
    """True if a task that is allowed without columns needs them. Those of older homes do not."""
    if {name, EVERY} & {*chosen.tasks, *chosen.consents}:
        return chosen.consent_to(name).awaits_columns
    return name == EVERY or name in consent.USES_COLUMNS


def allow(
    home: Path, name: str, *, columns: Sequence[str] | None = None, purpose: str | None = None
) -> AgentSettings:
    """Allow a task. Raises UnknownName, UsageError."""
    with settings.locked(home):
        own, known = settings.read_own(home), known_tasks(settings.read(home))
        changes = allowing(own, known, [name], columns=columns, purpose=purpose)
        chosen = settings.change(home, **changes)
    for task in list(consent_requests.read(home)) if name == EVERY else [name]:
        consent_requests.drop(home, task)
    return chosen


def forbid(home: Path, name: str) -> AgentSettings:
    """Forbid a task: it does not run, and no run waits for it. Raises UnknownName."""
    with settings.locked(home):
        return _forbid(home, name)


def _forbid(home: Path, name: str) -> AgentSettings:
    own = settings.read_own(home)
    if name not in {*known_tasks(settings.read(home)), *own.tasks, EVERY}:
        raise UnknownName(f"this machine has no task {name!r}", "commonweight-agent task list")
    changes: dict[str, Any] = {
        "tasks": [task for task in own.tasks if task != name],
        "consents": {task: said for task, said in own.consents.items() if task != name},
    }
    if name != EVERY:
        changes["forbidden_tasks"] = sorted({*own.forbidden_tasks, name})
    consent_requests.drop(home, name)
    return settings.change(home, **changes)


def describe(chosen: AgentSettings, task: str, name: str) -> str:
    """`name`, and what the owner has decided about this task, for a person."""
    said, columns = chosen.consent_to(task), chosen.columns_of(task)
    parts: list[str] = []
    if task in (EVERY, *consent.USES_COLUMNS) or "*" not in columns:
        parts = ["all columns" if "*" in columns else f"columns {', '.join(columns) or 'none'}"]
    if awaiting := awaiting_columns(chosen, task):
        parts = ["awaiting columns" + (f" for {', '.join(awaiting)}" if task == EVERY else "")]
    return ", ".join([name, *parts, *([f"for: {said.purpose}"] if said.purpose else [])])


def awaiting_columns(chosen: AgentSettings, task: str = EVERY) -> list[str]:
    """Tasks among this one, or all, whose columns the owner has not named yet."""
    names = consent.USES_COLUMNS if task == EVERY else [task]
    return sorted(name for name in names if chosen.standing_of(name) == "columns")


def columns_command(task: str) -> str:
    """What names the columns of a task."""
    return f"commonweight-agent task allow {task} --columns NAME,NAME (or all)"


def requests(home: Path, chosen: AgentSettings) -> list[Request]:
    """The requests that still wait for the owner, oldest first."""
    waiting = (
        request
        for request in consent_requests.read(home).values()
        if chosen.standing_of(request.task) in ASKED_FIRST
    )
    return sorted(waiting, key=lambda request: request.at)
