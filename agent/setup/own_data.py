"""Checks the owner's data for `join --data`, `policy set data` and `doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from difflib import get_close_matches
from pathlib import Path

from agent.data import open_table, sources
from agent.data.admission import AdmissionStore
from agent.data.settings import DataSettings
from agent.home import settings
from agent.home.settings_schema import AgentSettings
from agent.policy import consent
from agent.tasks import data_checks
from protocols.errors import CommonweightError, DataError, UsageError
from protocols.messages.envelope import strip_controls

#: Names of columns in a message.
_MAX_SHOWN = 40


def check(chosen: AgentSettings, *, allowing: bool = False) -> str:
    """A line about the data and the tasks that can read them. `allowing`: tasks follow.

    Raises DataError if they cannot be read, or fit none of the tasks that the owner allows.
    """
    data = settings.data_settings(chosen, Path())
    if not data.path:
        return "no data are set; tasks that bring their own data can run"
    data_checks.check_path(data)
    if sources.parse(data.path).kind != "files":
        open_table(data).columns()  # a database says here that its address or login is wrong
    all_fitting = data_checks.fitting_tasks(data)
    if fitting := [task for task in all_fitting if chosen.grants(task)]:
        return f"the data fit the tasks: {', '.join(fitting)}"
    if all_fitting and not chosen.tasks:
        then = "" if allowing else "; none of them is allowed yet"
        return f"the data fit the tasks: {', '.join(all_fitting)}{then}"
    allowed = [task for task in data_checks.EXPECTED if chosen.grants(task) or not chosen.tasks]
    needs = "; ".join(f"{task} reads {data_checks.EXPECTED[task]}" for task in allowed)
    if not chosen.tasks or "*" in chosen.tasks or set(chosen.tasks) - set(allowed):
        text = "no built-in task reads such data, only tasks of your own"
        return f"{text} ({needs})" if needs else text
    raise DataError(f"no task that is allowed here reads such data: {needs}", data.path)


def columns(path: str) -> list[str]:
    """The columns of the owner's table; none for other data, or if no reader is installed."""
    data = DataSettings(path=path)
    if not path or "tabular" not in data_checks.fitting_tasks(data):
        return []
    try:
        return list(open_table(data).columns())
    except CommonweightError:  # the trainer says what is wrong with a table
        return []


def check_columns(data: str, patterns: Sequence[str]) -> str:
    """A note about patterns that match no column of these data; empty if all do, or if the columns
    cannot be read. Raises UsageError if none matches."""
    there = columns(data)
    missing = [one for one in patterns if not any(consent.matches(name, [one]) for name in there)]
    if not (there and missing):
        return ""
    text = unknown_column(missing[0], there)
    if len(missing) == len(patterns):
        raise UsageError(text, f"name columns of the data: {shorten(there)}")
    return text


def unknown_column(name: str, there: Sequence[str]) -> str:
    """That the data have no such column, and the nearest one."""
    near = get_close_matches(name, there, 1)
    return f"the data have no column {name!r}" + (f"; did you mean {near[0]}?" if near else "")


def shorten(names: Sequence[str]) -> str:
    """Names of columns on one line: the first ones, and how many there are."""
    shown = ", ".join(strip_controls(name) for name in names[:_MAX_SHOWN])
    return shown if len(names) <= _MAX_SHOWN else f"{shown} … {len(names)} in all"


def waiting_rows(home: Path) -> str:
    """A line about new rows of the owner's data that wait for others; empty if none do."""
    file = settings.memory_file(home)
    if not file.exists():
        return ""
    with closing(AdmissionStore(file)) as admission:
        counts = admission.counts()
    return str(counts) if counts is not None and counts.waiting else ""


def check_path(chosen: AgentSettings) -> None:
    """Raise UsageError if there is nothing to read at the path of the data."""
    try:
        data_checks.check_path(settings.data_settings(chosen, Path()))
    except DataError as err:
        raise _as_usage(err, chosen) from err


def _as_usage(err: DataError, chosen: AgentSettings) -> UsageError:
    """The error about a path that the owner has just named."""
    if isinstance(err.__cause__, FileNotFoundError):
        text = f"there are no data at {chosen.data}"
        return UsageError(text, "name a file or a folder on this machine")
    return UsageError(err.message, err.hint)


def check_setting(chosen: AgentSettings, *, allowing: bool = False) -> str:
    """The same for a setting that the owner is about to change. Raises UsageError."""
    try:
        return check(chosen, allowing=allowing)
    except DataError as err:
        raise _as_usage(err, chosen) from err
