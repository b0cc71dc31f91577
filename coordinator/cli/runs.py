"""`commonweight run …`: start, follow, stop, resume, delete, list and show training runs."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.cli import check, run_forecast, run_text
from coordinator.cli.common import (
    Columns,
    Json,
    Yes,
    confirm,
    connect,
    print_json,
    print_line,
    print_list,
    print_result,
)
from coordinator.cli.names import OneRun, RunName, complete_tasks, find_run
from coordinator.runs.options import OPTIONS, Option
from protocols.errors import CommonweightError, Unreachable, UsageError
from protocols.local.command_line import MORE, App
from protocols.messages.states import RunState

if TYPE_CHECKING:
    from coordinator.remote.api_client import Remote
    from coordinator.runs.state import Run

runs = App(help="Start, show, stop, resume and delete training runs.")

Follow = Annotated[bool, typer.Option("--follow", help="Stay until the run has ended.")]

#: In older versions a column and a value of a metric.
_ONCE_REPEATABLE = ("target",)
_METAVARS = {
    "target": "COLUMN",
    "features": "COLUMNS",
    "preprocessing": "FILE",
    "until": "METRIC=NUMBER",
    "deadline": "TIME",
    "strategy": "NAME",
    "strategy-arg": "KEY=VALUE",
    "set": "KEY=VALUE",
    "codec": "NAME",
    "flower": "FOLDER",
}


def _parameter(option: Option) -> inspect.Parameter:
    """An option of the table as a parameter that Typer reads."""
    is_list = option.repeatable or option.name in _ONCE_REPEATABLE
    kind: Any = list[str] | None if is_list else option.kind
    bounds = option.bounds if option.kind in (int, float) else None
    has_minimum = bounds and not bounds.above_minimum and not bounds.or_zero
    minimum = bounds.minimum if bounds and has_minimum else None
    return inspect.Parameter(
        _variable(option),
        inspect.Parameter.KEYWORD_ONLY,
        default=None if is_list else option.default,
        annotation=Annotated[
            kind,
            typer.Option(
                f"--{option.name}",
                help=option.help,
                min=minimum,
                metavar=_METAVARS.get(option.name),
                hidden=option.name == "task",
                rich_help_panel=None if option.is_common else MORE,
            ),
        ],
    )


def _variable(option: Option) -> str:
    """The name of an option's parameter.

    The last `_` keeps `--from` apart from the keyword, and `--task` from the argument.
    """
    return option.name.replace("-", "_") + "_"


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a run in place of its `**typed`: see `typed_options`."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    argument, *flags = (one for one in own if one.kind is not one.VAR_KEYWORD)
    signature = inspect.Signature([argument, *map(_parameter, OPTIONS), *flags])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


def typed_options(task: str, typed: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, by their names in the table. Raises UsageError."""
    given = {option.name: typed[_variable(option)] for option in OPTIONS}
    if task and given["task"]:
        raise UsageError("name one task", "commonweight run start mnist")
    given["task"] = task or given["task"]
    return {name: value for name, value in given.items() if value is not None}


@runs.command("start")
@with_run_options
def start(
    task: Annotated[str, typer.Argument(help=OPTIONS[0].help, autocompletion=complete_tasks)] = "",
    *,
    follow: Follow = False,
    json: Json = False,
    **typed: Any,
) -> None:
    """Start a training run. Without options: federated averaging until no version is better."""
    from coordinator.remote.run_options import build_order, split_target

    given = typed_options(task, typed)
    order = build_order(given)
    if goal := split_target(given.get("target", ""))[1]:
        print_line(f"note: --target takes a column; the goal is now set by: --until {goal}")
    remote = connect()
    for line in run_forecast.lines(remote, order.spec):
        print_line(line)
    run_id = remote.start_run(order)
    if not follow:
        text = f"started {run_id}; watch it: commonweight monitor"
        if not json and (before := run_text.run_before(run_id, remote.fleet())):
            text = (
                f"{run_id} starts when run {before} has ended; to end that: commonweight run stop "
                f"{before}"
            )
        print_result({"run": run_id}, text, json=json)
        return
    try:
        run = _follow(remote, run_id, quiet=json)
    except KeyboardInterrupt:
        print_line(f"{run_id} continues; watch it: commonweight run show {run_id}")
        raise
    except Unreachable as err:
        then = f"then {run_id} continues; watch it: commonweight run show {run_id}"
        raise Unreachable(err.message, f"{err.hint}; {then}") from err
    if run.state is RunState.FAILED:
        because = run.ended_because if json else run.ended_briefly  # refusals were printed
        raise CommonweightError(f"{run.id} failed: {because}", f"commonweight run show {run.id}")
    if json:
        print_json(run)


def _follow(remote: Remote, run_id: str, *, quiet: bool) -> Run:
    """Print new refusals and closed rounds until the run has ended; return the run."""
    for step in run_text.follow(remote, run_id):
        run = step.run
        if not quiet:
            for line in step.lines():
                print_line(line)
    if not quiet and run.state is not RunState.FAILED:
        print_line(f"{run.id} {run.state}: {run.ended_because}")
    return run


runs.command("check")(check.check)


@runs.command("metrics")
def metrics(
    run: RunName,
    follow: Follow = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write event files to this folder instead of JSON lines.")
    ] = None,
    mlflow: Annotated[
        str, typer.Option(help="Log to MLflow at this address instead of JSON lines.")
    ] = "",
) -> None:
    """Print each round's metrics as JSON, or send them elsewhere."""
    from coordinator.cli import tracking

    remote = connect(may_be_stopped=True)
    found = find_run(remote, run)
    with contextlib.ExitStack() as stack:
        sinks: list[tracking.Sink] = []
        if tensorboard is not None:
            sinks.append(tracking.TensorBoard(tensorboard))
            stack.callback(sinks[-1].close)
        if mlflow:
            sinks.append(tracking.MLflow(mlflow, found))
            stack.callback(sinks[-1].close)
        num_written = 0
        while True:
            for closed in found.history[num_written:]:
                for sink in sinks or [tracking.JsonLines()]:
                    sink.put(found, closed)
            num_written = len(found.history)
            if found.ended or remote.is_stopped or not follow:
                break
            time.sleep(run_text.POLL_S)
            found = remote.run(found.id)


@runs.command("stop")
def stop(run: RunName) -> None:
    """Stop a run. Its versions stay."""
    remote = connect()
    found = find_run(remote, run)
    if found.ended:
        print_line(f"{found.id} has ended already: {found.state}")
        return
    remote.stop_run(found.id)
    print_line(f"{found.id} is stopping")


@runs.command("resume")
def resume(run: RunName) -> None:
    """Resume a run that was stopped or failed, from its newest version."""
    remote = connect()
    found = find_run(remote, run)
    remote.resume_run(found.id)
    print_line(f"{found.id} is resumed; watch it: commonweight monitor")


@runs.command("delete")
def delete(run: OneRun, yes: Yes = False, json: Json = False) -> None:
    """Delete an ended run and its versions. The ledger keeps its record."""
    from coordinator.runs import deletion

    remote = connect()
    found = remote.deletion(run)
    print_line(deletion.format_deletion(found))
    if not yes:
        command = f"commonweight run delete {found.run}"
        confirm(f"delete {found.run}?", "nothing was deleted", command)
    deleted = remote.delete_run(found.run)
    print_result(deleted, f"deleted {deleted.run}", json=json)


@runs.command("list")
def list_runs(json: Json = False) -> None:
    """List all runs of this coordinator."""
    columns: Columns[Run] = {
        "Run": lambda run: run.id,
        "State": lambda run: run.state.value,
        "Round": lambda run: f"{run.round}/{run.spec.rounds}",
        "Best": run_text.best,
    }
    empty = "no runs yet; start one: commonweight run start mnist"
    print_list(connect(may_be_stopped=True).runs(), columns, empty, json=json)


@runs.command("show")
def show(run: RunName, json: Json = False) -> None:
    """Show one run: its settings, its state and what it waits for."""
    remote = connect(may_be_stopped=True)
    found = find_run(remote, run)
    if json:
        print_json(found)
        return
    for line in run_text.describe(found, remote.fleet()):
        sys.stdout.write(line + "\n")
