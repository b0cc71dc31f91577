"""`commonweight run …`: start, follow, stop, look at."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli import run_text
from coordinator.cli.common import Json, connect, print_table
from coordinator.runs.options import OPTIONS, Option
from protocols.errors import CommonweightError, UsageError
from protocols.local import json_output
from protocols.messages.states import RunState

runs = typer.Typer(help="Training runs: start, stop, look at, delete.", no_args_is_help=True)


def _parameter(option: Option) -> inspect.Parameter:
    """An option of the table as Typer reads it."""
    kind: Any = list[str] | None if option.repeatable else option.kind
    bounds = option.bounds if option.kind in (int, float) else None
    least = bounds.least if bounds and not bounds.above_least else None
    shown = typer.Option(f"--{option.name}", help=option.help, min=least)
    return inspect.Parameter(
        _variable(option),
        inspect.Parameter.KEYWORD_ONLY,
        default=None if option.repeatable else option.default,
        annotation=Annotated[kind, shown],
    )


def _variable(option: Option) -> str:
    """The end keeps `--from` apart from Python's word, and `--task` from the argument."""
    return option.name.replace("-", "_") + "_"


def _with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take the options of a run in place of its `**typed`."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    argument, *flags = (one for one in own if one.kind is not one.VAR_KEYWORD)
    signature = inspect.Signature([argument, *map(_parameter, OPTIONS), *flags])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


@runs.command("start")
@_with_run_options
def start(
    task: Annotated[str, typer.Argument(help=OPTIONS[0].help)] = "",
    *,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until it has ended.")] = False,
    json: Json = False,
    **typed: Any,
) -> None:
    """Start a run."""
    from coordinator.remote.run_options import build_order

    given = {option.name: typed[_variable(option)] for option in OPTIONS}
    if task and given["task"]:
        raise UsageError("name one task", "commonweight run start mnist")
    given["task"] = task or given["task"]
    made = build_order({name: value for name, value in given.items() if value is not None})
    remote = connect()
    run_id = remote.start_run(made)
    if follow:
        run = _follow(remote, run_id, quiet=json)
        if run.state is RunState.FAILED:
            raise CommonweightError(
                f"{run.id} failed: {run.ended_because}", f"commonweight run show {run.id}"
            )
        if json:
            sys.stdout.write(json_output.ok(run) + "\n")
        return
    if json:
        sys.stdout.write(json_output.ok({"run": run_id}) + "\n")
    else:
        sys.stderr.write(f"started {run_id}; watch it: commonweight monitor\n")


def _follow(remote: Any, run_id: str, *, quiet: bool) -> Any:
    """Print a line for each round, and whom the run last refused, until it has ended; the run."""
    import time

    progress = run_text.Progress()
    while True:
        run = remote.run(run_id)
        if not quiet:
            for line in progress.lines(run, lambda: remote.fleet().peers):
                sys.stderr.write(line + "\n")
        if run.ended:
            if not quiet and run.state is not RunState.FAILED:
                sys.stderr.write(f"{run.id} {run.state}: {run.ended_because}\n")
            return run
        time.sleep(0.5)


@runs.command("metrics")
def metrics(
    run: str,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until it has ended.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Event files into this folder, in place of JSON lines.")
    ] = None,
    mlflow: Annotated[
        str, typer.Option(help="To MLflow at this address, in place of JSON lines.")
    ] = "",
) -> None:
    """Every round's metrics for other programs: a line of JSON each."""
    import time

    from coordinator.cli import tracking

    remote = connect()
    found = remote.run(run)
    sinks: list[tracking.Sink] = []
    if tensorboard is not None:
        sinks.append(tracking.TensorBoard(tensorboard))
    if mlflow:
        sinks.append(tracking.MLflow(mlflow, found))
    told = 0
    try:
        while True:
            for closed in found.history[told:]:
                for sink in sinks:
                    sink.put(found, closed)
                if not sinks:
                    sys.stdout.write(tracking.line(found, closed) + "\n")
                    sys.stdout.flush()
            told = len(found.history)
            if found.ended or not follow:
                break
            time.sleep(0.5)
            found = remote.run(found.id)
    finally:
        for sink in sinks:
            sink.close()


@runs.command("stop")
def stop(run: str) -> None:
    """End a run; what is committed stays."""
    connect().stop_run(run)
    sys.stderr.write(f"{run} is stopping\n")


@runs.command("resume")
def resume(run: str) -> None:
    """Go on with a run that was stopped or has failed, from its newest version."""
    connect().resume_run(run)
    sys.stderr.write(f"{run} goes on; watch it: commonweight monitor\n")


@runs.command("delete")
def delete(
    run: str,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete an ended run and its versions. The ledger keeps its record."""
    from coordinator.runs import deletion

    remote = connect()
    found = remote.deletion(run)
    sys.stderr.write(deletion.format_deletion(found) + "\n")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                "nothing was deleted: there is no terminal to confirm it on",
                f"commonweight run delete {found.run} --yes",
            )
        typer.confirm(f"delete {found.run}?", abort=True, err=True)
    deleted = remote.delete_run(found.run)
    if json:
        sys.stdout.write(json_output.ok(deleted) + "\n")
    else:
        sys.stderr.write(f"deleted {deleted.run}\n")


@runs.command("list")
def list_runs(json: Json = False) -> None:
    """All runs of this coordinator."""
    found = connect().runs()
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    rows = [
        {
            "run": run.id,
            "state": run.state.value,
            "round": f"{run.round}/{run.spec.rounds}",
            "best": run_text.best(run),
        }
        for run in found
    ]
    columns = {"run": "Run", "state": "State", "round": "Round", "best": "Best"}
    print_table(rows, columns, "no runs yet; start one: commonweight run start mnist")


@runs.command("show")
def show(run: str, json: Json = False) -> None:
    """One run: its settings, where it stands and what it waits for."""
    remote = connect()
    found = remote.run(run)
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    fleet = remote.fleet()
    shown, peers = fleet.runs.get(found.id), fleet.peers
    waiting = shown.changed.waiting_for if shown else ""
    sys.stdout.write(f"{found.id}: {found.state}, round {found.round}/{found.spec.rounds}\n")
    if shown and shown.changed.memory_bytes and not found.ended:
        needed = shown.changed.memory_bytes / 1e6
        sys.stdout.write(f"closing a round takes about {needed:,.0f} MB of memory\n")
    if waiting and not found.ended:
        sys.stdout.write(f"waits for {waiting}\n")
    if found.ended:
        sys.stdout.write(f"because {found.ended_because}\n")
    arguments = "".join(f" {name}={value}" for name, value in found.spec.strategy_args.items())
    sys.stdout.write(f"strategy {found.spec.strategy}{arguments}, codec {found.spec.codec}, ")
    sys.stdout.write(f"quorum {found.spec.quorum}, deadline {run_text.deadline(found)}, ")
    selects = f", select {found.spec.select:g}x" if found.spec.select else ""
    selects += ", late updates folded" if found.spec.late == "fold" else ""
    sys.stdout.write(f"weighting {found.spec.weighting}{selects}\n")
    if found.refusals:
        sys.stdout.write(run_text.refusal(found, peers) + "\n")
    for line in run_text.buffer_lines(found, peers):
        sys.stdout.write(line + "\n")
    for closed in found.history:
        mark = " ★" if found.best and closed.round == found.best.round else ""
        sys.stdout.write(f"{run_text.round_line(found, closed)} {closed.digest[:12]}{mark}\n")
    if found.best is not None:
        for line in run_text.fairness(found.best, peers):
            sys.stdout.write(line + "\n")
