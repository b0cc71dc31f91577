"""`commonweight run check`: which peers could train, before a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.cli import check_table, run_text
from coordinator.cli.common import Json, connect, print_json, print_line, print_table
from coordinator.cli.names import complete_tasks
from protocols.errors import CommonweightError, ExitCode
from protocols.model import setting_specs

if TYPE_CHECKING:
    from coordinator.remote.api_client import Remote
    from coordinator.runs.state import Run

_POLL_S = 0.5
#: After this time without a peer that could be asked, the check ends.
_MAX_IDLE_S = 3.0
_DEADLINE_S = 120.0
_DELETE_TRIES = 20


def check(
    task: Annotated[
        str,
        typer.Argument(help="The task to check: tabular, mnist, …", autocompletion=complete_tasks),
    ],
    target: Annotated[str, typer.Option(help="For a table: the column to predict.")] = "",
    kind: Annotated[
        str, typer.Option(help="For a table: auto, classification or regression.")
    ] = "",
    features: Annotated[
        str, typer.Option(help="For a table: columns to predict from, as in `run start`.")
    ] = "",
    preprocessing: Annotated[
        Path | None, typer.Option(help="For a table: a file, as in `run start`.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the task: key=value.")
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="List the settings that the task has.")
    ] = False,
    json: Json = False,
) -> None:
    """Show which peers fit a task, and why others do not.

    Nothing is trained. Peers describe data and model, within their owners' limits. The exit
    status is 1 if a peer that could be asked does not fit, or if none fits.
    """
    from msgspec.structs import replace

    from coordinator.remote.run_options import build_order

    given = {"task": task, "kind": kind, "features": features, "preprocessing": preprocessing}
    more = {"set": tuple(set_ or ()), "target": (target,) if target else (), "rounds": 1}
    order = build_order({**given, **more})
    spec = replace(order.spec, only="describe", check=True, deadline_s=_DEADLINE_S)
    remote = connect()
    run_id = remote.start_run(replace(order, spec=spec))
    try:
        run = _wait(remote, run_id, quiet=json)
        report = check_table.make_report(run, remote.fleet())
    finally:
        _delete(remote, run_id)
    num_peers = len(report.fitting) + len(report.misfits) + len(report.absent)
    if json:
        print_json(report._asdict())
    else:
        print_table(*check_table.table(report))
        for line in check_table.explain(report):
            print_line(line)
        if settings:
            rows = [list(row) for row in setting_specs.explain(report.settings)]
            print_table(["Setting", "Values", "Help"], rows)
        print_line(f"{len(report.fitting)} of {num_peers} peers could train now")
    if report.misfits or not report.fitting:
        raise typer.Exit(ExitCode.FAILED)


def _wait(remote: Remote, run_id: str, *, quiet: bool) -> Run:
    """The run after its end. It is stopped when no peer is left that could be asked."""
    idle_since = time.monotonic()
    is_told = quiet
    while True:
        run = remote.run(run_id)
        if run.ended:
            return run
        waits = run_text.waits_for_peers(run)
        before = _run_before(remote, run_id) if waits else ""
        if before or not waits:
            idle_since = time.monotonic()
        if before and not is_told:
            is_told = True
            print_line(f"waits for the end of run {before}")
        if time.monotonic() - idle_since > _MAX_IDLE_S:
            remote.stop_run(run_id)
        time.sleep(_POLL_S)


def _run_before(remote: Remote, run_id: str) -> str:
    """The run that has to end first; empty if there is none."""
    active = next((one.id for one in remote.runs() if not one.ended), run_id)
    return "" if active == run_id else active


def _delete(remote: Remote, run_id: str) -> None:
    """Remove the check from the list of runs; the ledger keeps its record."""
    for _ in range(_DELETE_TRIES):
        try:
            if not remote.run(run_id).ended:
                remote.stop_run(run_id)
            else:
                remote.delete_run(run_id)
                return
        except CommonweightError:  # the coordinator still writes its end
            pass
        time.sleep(_POLL_S)
