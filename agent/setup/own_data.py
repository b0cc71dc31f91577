"""Checks the owner's data for `join --data`, `policy set data` and `doctor`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from agent.data.admission import AdmissionStore
from agent.data.settings import DataSettings
from agent.home import settings
from agent.home.settings_schema import AgentSettings
from agent.tasks import data_checks
from protocols.errors import CommonweightError, DataError, UsageError


def check(chosen: AgentSettings, *, allowing: bool = False) -> str:
    """A line about the data and the tasks that can read them. `allowing`: tasks follow.

    Raises DataError if they cannot be read, or fit none of the tasks that the owner allows.
    """
    data = settings.data_settings(chosen, Path())
    if not data.path:
        return "no data are set; tasks that bring their own data can run"
    data_checks.check_path(data)
    all_fitting = data_checks.fitting_tasks(data)
    if fitting := [task for task in all_fitting if chosen.allows(task)]:
        return f"the data fit the tasks: {', '.join(fitting)}"
    if all_fitting and not chosen.tasks:
        then = "" if allowing else "; none of them is allowed yet"
        return f"the data fit the tasks: {', '.join(all_fitting)}{then}"
    allowed = [task for task in data_checks.EXPECTED if chosen.allows(task) or not chosen.tasks]
    needs = "; ".join(f"{task} reads {data_checks.EXPECTED[task]}" for task in allowed)
    if not chosen.tasks or "*" in chosen.tasks or set(chosen.tasks) - set(allowed):
        return f"no built-in task reads such data, only tasks of your own ({needs})"
    raise DataError(f"no task that is allowed here reads such data: {needs}", data.path)


def columns(path: str) -> list[str]:
    """The columns of the owner's table; none for other data, or if no reader is installed."""
    data = DataSettings(path=path)
    if not path or "tabular" not in data_checks.fitting_tasks(data):
        return []
    from agent.data import open_table

    try:
        return list(open_table(data).columns())
    except CommonweightError:  # the trainer says what is wrong with a table
        return []


def waiting_rows(home: Path) -> str:
    """A line about new rows of the owner's data that wait for others; empty if none do."""
    file = settings.memory_file(home)
    if not file.exists():
        return ""
    with closing(AdmissionStore(file)) as admission:
        counts = admission.counts()
    return str(counts) if counts is not None and counts.waiting else ""


def check_setting(chosen: AgentSettings, *, allowing: bool = False) -> str:
    """The same for a setting that the owner is about to change. Raises UsageError."""
    try:
        return check(chosen, allowing=allowing)
    except DataError as err:
        raise UsageError(err.message, err.hint) from err
