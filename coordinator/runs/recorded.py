"""The runs in a ledger, with all their rounds."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.fleet.fleet_events import SUBJECT
from coordinator.runs import transitions
from coordinator.runs.state import Run
from coordinator.storage import job_events, run_events
from coordinator.storage.ledger import Ledger
from protocols.errors import UnknownName
from protocols.messages.task_names import is_name_of

#: In an error.
_MAX_NAMED_RUNS = 3


def recorded_ids(ledger: Ledger) -> list[str]:
    """The ids of all runs, oldest first, also of deleted ones."""
    return [
        subject
        for subject in ledger.subjects()
        if subject != SUBJECT and not subject.startswith(job_events.PREFIX)
    ]


def recorded_run(ledger: Ledger, run_id: str) -> Run:
    """A run from the ledger, with all its rounds."""
    entries = ledger.entries(run_id)
    return transitions.replay(run_id, [run_events.decode(entry.body) for entry in entries])


def named_run(runs: Iterable[Run], name: str, *, newest: bool = True) -> Run:
    """A run by its id, its task, or a unique prefix of the id. The name of a task means its newest
    run, unless not `newest`. Raises UnknownName.

    A task is named as `is_name_of` says.
    """
    runs = list(runs)
    of_task = [run for run in runs if is_name_of(run.spec.task, name)]
    of_task = [run for run in of_task if run.spec.task == name] or of_task
    tasks = dict.fromkeys(run.spec.task for run in of_task)
    if newest and len(tasks) > 1:
        raise UnknownName(f"several tasks are called {name!r}: {', '.join(tasks)}", "name one")
    prefixed = [run for run in runs if run.id.startswith(name)]
    matches = [run for run in prefixed if run.id == name] or of_task[-1:] * newest or prefixed
    if not matches and of_task:
        raise UnknownName(
            f"{name!r} is a task, and this command takes the id of a run",
            f"its newest run is {of_task[-1].id}",
        )
    if not matches:
        raise UnknownName(f"no run {name!r}", "commonweight run list")
    if len(matches) > 1:
        shown = ", ".join(run.id for run in matches[: -_MAX_NAMED_RUNS - 1 : -1])
        raise UnknownName(
            f"{len(matches)} runs start with {name!r}, the newest are {shown}",
            "name one of them; commonweight run list shows all",
        )
    return matches[0]
