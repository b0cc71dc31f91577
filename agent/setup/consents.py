"""How an owner allows and forbids tasks, for `join --allow` and `commonweight-agent task`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from agent.home import consent_requests, offer_log, settings, task_offers
from agent.home.consent_requests import Request
from agent.home.settings_schema import AgentSettings
from agent.policy import consent, task_code
from agent.policy.consent import ASKED_FIRST
from agent.tasks import registry
from protocols.errors import UnknownName, UsageError
from protocols.local.flower_apps import PREFIX
from protocols.messages.envelope import strip_controls

EVERY = "*"
#: The word for every column of the data.
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
    offer: str | None = None,
) -> dict[str, Any]:
    """The settings that change when the owner allows these tasks. Raises UnknownName, UsageError.

    `known` are the tasks on this machine. Arguments that are None change nothing. A task that is
    new here and reads the owner's table awaits the names of its columns. `offer`: the digest of the
    offered file that is allowed; empty if it is the owner's own from now on.
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
    if offer is not None:
        given["offer"] = offer
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
    """True if a task that is allowed without columns needs them. Tasks of older homes do not."""
    if {name, EVERY} & {*chosen.tasks, *chosen.consents}:
        return chosen.consent_to(name).awaits_columns
    return name == EVERY or name in consent.USES_COLUMNS


def allow(
    home: Path,
    name: str,
    *,
    columns: Sequence[str] | None = None,
    purpose: str | None = None,
    keep: bool = False,
) -> AgentSettings:
    """Allow a task. Raises UnknownName, UsageError.

    `keep`: go on with an approved file that the operator has withdrawn or replaced.
    """
    with settings.locked(home):
        own, live = settings.read_own(home), settings.read(home)
        offer = _offer_after(live, name, keep)
        if keep:
            digest = own.consent_to(name).offer
            offer_log.write(home, "task kept", name, digest)
        changes = allowing(
            own, known_tasks(live), [name], columns=columns, purpose=purpose, offer=offer
        )
        settings.change(home, **changes)
        chosen = settings.read(home)
    for task in list(consent_requests.read(home)) if name == EVERY else [name]:
        consent_requests.drop(home, task)
    return chosen


def _offer_after(chosen: AgentSettings, name: str, keep: bool) -> str | None:
    """The digest of the offer to which a consent to `name` belongs; None: as before.

    Raises UsageError if the owner must decide about the operator's offer first.
    """
    said, source = chosen.consent_to(name), chosen.task_files.get(name, "")
    is_as_approved = bool(source) and said.offer == task_code.sha256(source)
    review = f"commonweight-agent task review {name}"
    if said.review == "offered" and not (keep and said.offer):
        raise UsageError(f"the operator offers {name}, and you have not approved the file", review)
    if said.review and not keep:
        raise UsageError(
            f"the operator has withdrawn or replaced {name}",
            f"to go on with the file that you approved: commonweight-agent task allow {name} "
            "--keep",
        )
    if keep and not (said.review and is_as_approved):
        raise UsageError(
            f"{name} is no approved file that was withdrawn or replaced",
            "commonweight-agent task list",
        )
    return None if is_as_approved and not keep else ""


def forbid(home: Path, name: str) -> AgentSettings:
    """Forbid a task: it does not run, and no run waits for it. Raises UnknownName."""
    with settings.locked(home):
        return _forbid(home, name)


def _forbid(home: Path, name: str) -> AgentSettings:
    own, live = settings.read_own(home), settings.read(home)
    offered = task_offers.read(home).by_name()
    if name in offered:
        offer_log.write(home, "task refused", name, offered[name].digest)
    elif name not in {*known_tasks(live), *own.tasks, *(PREFIX + app for app in live.apps), EVERY}:
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
    """The command that names the columns of a task."""
    return f"commonweight-agent task allow {task} --columns NAME,NAME (or all)"


def requests(home: Path, chosen: AgentSettings) -> list[Request]:
    """The requests that still wait for the owner, oldest first: by runs, then by offers."""
    asked = consent_requests.read(home)
    offered = (
        Request(task=name, run="", at=time.time())
        for name, said in chosen.consents.items()
        if said.review and name not in asked
    )
    waiting = (
        replace(request, review=chosen.consent_to(request.task).review)
        for request in (*asked.values(), *offered)
        if chosen.standing_of(request.task) in ASKED_FIRST
    )
    return sorted(waiting, key=lambda request: request.at)
