"""Refuses work of a task that the owner has not allowed, and says what allows it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from agent.home.consent_requests import Request, plain_columns
from agent.home.settings_schema import AgentSettings
from agent.policy import consent
from agent.policy.consent import Standing
from agent.tasks import Setting, registry
from protocols.errors import (
    AwaitingColumns,
    AwaitingConsent,
    AwaitingDecision,
    AwaitingReview,
    CommonweightError,
    NotAllowed,
    Refused,
    UnknownName,
)
from protocols.messages.jobs import Analyze, Scatter, SecureAnalyze, Unit

_ON_THAT_MACHINE = "on that machine: commonweight-agent"
_KINDS: dict[Standing, type[AwaitingConsent]] = {
    "columns": AwaitingColumns,
    "offered": AwaitingReview,
    "withdrawn": AwaitingDecision,
}


class ConsentNeeded(AwaitingConsent):
    """The owner has not decided. `request` is what the owner reads."""

    def __init__(self, message: str, hint: str, request: Request, standing: Standing) -> None:
        super().__init__(message, hint)
        self.request, self.standing = request, standing
        self.code = _KINDS.get(standing, AwaitingConsent).code


def check(chosen: AgentSettings, run: str, task: str, settings: Mapping[str, Setting]) -> None:
    """Raise ConsentNeeded if the owner has not decided about this task, NotAllowed if the task is
    forbidden or the run asks for a column that it may not use, UnknownName if it is not here."""
    standing = chosen.standing_of(task)
    target, features = _named_columns(task, settings)
    if standing == "allowed":
        _check_columns(chosen, task, [*target, *features])
        return
    if standing == "forbidden":
        raise NotAllowed(
            f"the owner of this machine forbids the task {task!r}",
            f"{_ON_THAT_MACHINE} task allow {task}",
        )
    review = chosen.consent_to(task).review
    if not review and task not in chosen.task_files and task not in registry.names():
        raise UnknownName(
            f"this machine has no task {task!r}", f"{_ON_THAT_MACHINE} task add, or pip install"
        )
    request = Request(
        task=task,
        run=run,
        at=time.time(),
        target=next(iter(plain_columns(target)), ""),
        columns=plain_columns([*target, *features]) if features else (),
        awaits_columns=standing == "columns",
        review=review,
    )
    message = f"its owner has not allowed the task {task!r} yet"
    if standing == "changed":
        message = f"its owner has not allowed the task {task!r} as its file is now"
    command = f"{_ON_THAT_MACHINE} task allow {task}"
    if standing == "columns":
        message = f"its owner has not said which columns the task {task!r} may use"
        command += " --columns NAME,NAME, or all"
    elif standing == "offered":
        message = f"its owner has not approved the offered file of the task {task!r}"
        command = f"{_ON_THAT_MACHINE} task review {task}"
    elif standing == "withdrawn":
        message = f"the offered task {task!r} was withdrawn, and its owner has not kept it"
        command += " --keep"
    raise ConsentNeeded(message, command, request, standing)


def check_used(chosen: AgentSettings, task: str, used: Sequence[str]) -> None:
    """Raise CommonweightError if the owner has withdrawn columns since the task used them. `used`:
    the patterns of that time."""
    now = chosen.columns_of(task)
    if "*" not in now and not set(used) <= set(now):
        raise CommonweightError(
            f"the owner changed the columns of the task {task!r} during the work, so its result "
            "stays here; the next try uses the new columns"
        )


def check_unit(chosen: AgentSettings, unit: Unit) -> None:
    """Raise an error as `check` does, or Refused, if the owner does not allow this unit now."""
    match unit.question:
        case Analyze() | SecureAnalyze():
            if chosen.analyze == "off":
                raise Refused(
                    "the owner of this machine allows no questions",
                    "commonweight-agent policy set analyze on",
                )
            return
        case Scatter() if chosen.jobs_scatter != "on":
            raise Refused(
                "the owner of this machine does not allow predictions for rows of others",
                "commonweight-agent policy set jobs.scatter on",
            )
    check(chosen, unit.job, unit.task, unit.settings)


def _check_columns(chosen: AgentSettings, task: str, columns: list[str]) -> None:
    allowed = chosen.columns_of(task)
    kept = [name for name in columns if not consent.matches(name, allowed)]
    if not kept or chosen.fleet:
        return
    (first, *_) = plain_columns(kept[:1]) or ("",)
    raise NotAllowed(
        f"the owner does not let the task {task!r} use the column {first!r}, which is asked for",
        f"check the name; {_ON_THAT_MACHINE} task allow {task} --columns, and policy set "
        "data.columns",
    )


def _named_columns(task: str, settings: Mapping[str, Setting]) -> tuple[list[str], list[str]]:
    """The target with the column by which rows are held out, and the features that a run names.
    Features that it does not name are known only when the table is read."""
    if task not in consent.USES_COLUMNS:
        return [], []
    names = ("target", "split_by", "features")
    target, split_by, features = (str(settings.get(name, "")).strip() for name in names)
    named = [name for name in map(str.strip, features.split(",")) if name]
    return [name for name in (target, split_by) if name], named
