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
from agent.policy.consent import ASKED_FIRST, Consent
from agent.tasks import registry
from protocols.errors import UnknownName, UsageError
from protocols.messages.envelope import strip_controls

EVERY = "*"


def split_list(text: str | None) -> list[str] | None:
    """The parts of `age,sex`; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


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

    `known` are the tasks on this machine. What is not given stays as it was.
    """
    for name in names:
        if name != EVERY and name not in known:
            raise UnknownName(
                f"this machine has no task {name!r}",
                f"tasks here: {', '.join(sorted(known))}; one of your own: commonweight-agent "
                "task add",
            )
    for column in columns or ():
        if not consent.narrow([column], chosen.data_columns):
            raise UsageError(
                f"data.columns does not allow the column {column!r}",
                "commonweight-agent policy set data.columns",
            )
    given: dict[str, Any] = {"at": time.time()}
    if columns is not None:
        given["columns"] = tuple(columns)
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
        consents[name] = replace(chosen.consents.get(name, Consent()), **given, code=code)
    return {
        "tasks": [*chosen.tasks, *(name for name in names if name not in chosen.tasks)],
        "forbidden_tasks": [name for name in chosen.forbidden_tasks if name not in names],
        "consents": consents,
    }


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


def describe(chosen: AgentSettings, task: str) -> str:
    """What the owner has decided about a task, for a person."""
    said, columns = chosen.consent_to(task), chosen.columns_of(task)
    parts = ["all columns" if "*" in columns else f"columns {', '.join(columns) or 'none'}"]
    return ", ".join(parts + ([f"for: {said.purpose}"] if said.purpose else []))


def requests(home: Path, chosen: AgentSettings) -> list[Request]:
    """The requests that still wait for the owner, oldest first."""
    waiting = (
        request
        for request in consent_requests.read(home).values()
        if chosen.standing_of(request.task) in ASKED_FIRST
    )
    return sorted(waiting, key=lambda request: request.at)
