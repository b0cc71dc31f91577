"""`commonweight simulate`: many peers on this machine."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.cli.common import Json, print_json, print_line
from coordinator.cli.runs import typed_options, with_run_options
from protocols.errors import UsageError

if TYPE_CHECKING:
    from coordinator.runs.state import Run


@with_run_options
def simulate(
    task: Annotated[str, typer.Argument(help="What to train: mnist, or ./my_task.py:MyTask.")] = "",
    *,
    peers: Annotated[int, typer.Option(min=1, help="How many peers.")] = 10,
    per_round: Annotated[
        int, typer.Option(min=0, help="How many peers are asked in each round (0: all).")
    ] = 0,
    split: Annotated[
        str,
        typer.Option(
            help="How a shared data set is divided: iid (default), shards (few labels a peer), or "
            "dirichlet:0.3 (the less, the fewer labels a peer)."
        ),
    ] = "",
    dropout: Annotated[
        float, typer.Option(min=0, help="The share of the asked peers that leaves in the work.")
    ] = 0.0,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes; by default one for each core.")
    ] = 0,
    ray: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Work on this Ray cluster; auto: that of this machine, or a new one.",
        ),
    ] = "",
    owner: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A setting of every owner, such as data=clinics/{part}.csv; may be repeated.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The home of the result, a new folder.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the simulation in --out.")
    ] = False,
    json: Json = False,
    **typed: Any,
) -> None:
    """Train with many simulated peers on this machine.

    It has the digests of a run of a real fleet. Ctrl-C stops it; --resume continues it.
    """
    from commonweight.own_tasks import place_task
    from commonweight.simulation.simulate import Simulation, create
    from coordinator.remote.run_options import parse_setting

    if resume:
        if out is None or task:
            raise UsageError(
                "--resume takes the task and the options from the folder of --out",
                "commonweight simulate --resume --out FOLDER",
            )
        made = Simulation.open(out.expanduser().absolute())
    else:
        given = typed_options(task, typed)
        if not given["task"] and not given.get("flower"):
            raise UsageError("name a task", "commonweight simulate mnist")
        made = create(
            given,
            peers,
            source=place_task(given["task"])[1],
            per_round=per_round,
            split=split,
            dropout=dropout,
            owner=dict(map(parse_setting, owner or ())),
            out=out,
        )
    print_line(f"{made.run_id} in {made.home}")
    try:
        with _progress(quiet=json) as on_round:
            run = made.run(workers, on_round, ray=ray)
    except KeyboardInterrupt:
        print_line(f"stopped; continue: commonweight simulate --resume --out {made.home}")
        raise
    made.check(run)
    if json:
        print_json(run)
        return
    print_line(f"{run.id} {run.state}: {run.ended_because}")
    print_line(f"show it: COMMONWEIGHT_HOME={made.home} commonweight run show {run.id}")


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[Run], None]]:
    """What to call after each round: it draws a bar, or prints a line without a terminal."""
    from commonweight.simulation.log_filters import is_unexpected
    from coordinator.cli import run_text

    def print_round(run: Run) -> None:
        print_line(run_text.round_line(run, run.history[-1]))

    # Peers that drop out are part of the simulation.
    logging.getLogger("commonweight.run").addFilter(is_unexpected)
    if quiet or not sys.stderr.isatty():
        yield (lambda run: None) if quiet else print_round
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("peers describe their data", total=None)

        def draw(run: Run) -> None:
            closed = run.history[-1]
            metrics = " ".join(f"{k} {v:.4f}" for k, v in closed.metrics.items() if v is not None)
            text = f"round {closed.round}/{run.spec.rounds} {metrics}"
            progress.update(bar, description=text, completed=closed.round, total=run.spec.rounds)

        yield draw
