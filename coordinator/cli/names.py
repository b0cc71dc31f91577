"""Names that commands take, which the shell completes: runs, jobs, peers, tickets, tasks, models.

Completion asks the running coordinator for the fleet, which no audit records as a read answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.cli.common import connect, print_line
from protocols.errors import CommonweightError

if TYPE_CHECKING:
    from coordinator.fleet.state import Fleet
    from coordinator.remote.api_client import Remote
    from coordinator.runs.state import Run

#: Seconds that completion waits for the coordinator.
_MAX_WAIT_S = 2.0

Suggestions = Iterable[tuple[str, str]]


def _completion(read: Callable[[Remote], Suggestions]) -> Callable[[], list[tuple[str, str]]]:
    """Completion from the coordinator: each name and a word about it. Empty on any error."""

    def complete() -> list[tuple[str, str]]:
        try:
            return list(read(connect(_MAX_WAIT_S)))
        except CommonweightError:
            return []

    return complete


def _of_fleet(read: Callable[[Fleet], Suggestions]) -> Callable[[], list[tuple[str, str]]]:
    return _completion(lambda remote: read(remote.fleet()))


def _runs(fleet: Fleet) -> Iterator[tuple[str, str]]:
    for run_id, run in reversed(fleet.runs.items()):
        yield run_id, str(run.changed.state)


def _jobs(fleet: Fleet) -> Iterator[tuple[str, str]]:
    for job_id, job in reversed(fleet.jobs.items()):
        yield job_id, job.changed.state


def _peers(fleet: Fleet) -> Iterator[tuple[str, str]]:
    for peer in fleet.peers.values():
        yield peer.name or peer.peer, str(peer.state)


def _tasks(fleet: Fleet) -> Iterator[tuple[str, str]]:
    names = sorted({task for peer in fleet.peers.values() for task in peer.tasks})
    for name in names:
        count = sum(name in peer.tasks for peer in fleet.peers.values())
        yield name, f"{count} peer{'' if count == 1 else 's'}"


def _models(fleet: Fleet) -> Iterator[tuple[str, str]]:
    yield "best", "the best version of the newest run"
    yield "latest", "the newest version of the newest run"
    yield from _runs(fleet)


def _tickets(remote: Remote) -> Iterator[tuple[str, str]]:
    for row in remote.tickets():
        yield row["id"], row["role"]


complete_runs, complete_jobs = _of_fleet(_runs), _of_fleet(_jobs)
complete_peers, complete_tasks = _of_fleet(_peers), _of_fleet(_tasks)
complete_models, complete_tickets = _of_fleet(_models), _completion(_tickets)

RunName = Annotated[
    str,
    typer.Argument(
        help="A run's id, the start of it, or a task: then its newest run.",
        autocompletion=complete_runs,
    ),
]
#: A name that does not mean the newest run of a task.
OneRun = Annotated[
    str, typer.Argument(help="A run's id, or the start of it.", autocompletion=complete_runs)
]
JobName = Annotated[
    str, typer.Argument(help="A job's id, or the start of it.", autocompletion=complete_jobs)
]
PeerName = Annotated[
    str, typer.Argument(help="A machine's name or id.", autocompletion=complete_peers)
]
TicketName = Annotated[str, typer.Argument(help="A ticket's id.", autocompletion=complete_tickets)]


def find_run(remote: Remote, name: str) -> Run:
    """The run of this id, or the newest run of this task, whose id is printed.

    Raises UnknownName.
    """
    from protocols.messages.task_names import is_name_of

    found = remote.run(name)
    if found.id != name and is_name_of(found.spec.task, name):
        print_line(f"the newest run of {name} is {found.id}")
    return found
