"""`commonweight run …`: start, follow, stop, look at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli import run_text
from coordinator.cli.common import Json, connect, print_table
from coordinator.remote import run_options
from protocols.errors import CommonweightError
from protocols.local import json_output
from protocols.messages.states import RunState

runs = typer.Typer(help="Training runs: start, stop, look at.", no_args_is_help=True)


@runs.command("start")
def start(
    task: Annotated[
        str, typer.Argument(help="What to train: mnist, or ./my_task.py:MyTask that agents have.")
    ] = "",
    task_: Annotated[str, typer.Option("--task", help="The same, as an option.")] = "",
    kind: Annotated[str, typer.Option(help="Of a table: auto, classification or regression.")] = "",
    features: Annotated[
        str, typer.Option(help="Of a table: columns to predict from; what most peers have.")
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 10,
    quorum: Annotated[int, typer.Option(min=1, help="Updates that a round needs.")] = 1,
    deadline: Annotated[
        str,
        typer.Option(
            help="A round goes on after this, if the quorum is there; auto: twice what the "
            "slowest peer needed before."
        ),
    ] = "10m",
    select: Annotated[
        str,
        typer.Option(
            help="Ask so many quorums of peers (1.2x), and go on as soon as the quorum is there."
        ),
    ] = "",
    late: Annotated[
        str,
        typer.Option(
            help="An update whose round has closed: drop, or fold it into the next with less "
            "weight the later it is."
        ),
    ] = "drop",
    keep_versions: Annotated[
        int, typer.Option(min=1, help="So many of the newest versions stay on disk, and the best.")
    ] = 2,
    strategy: Annotated[
        str,
        typer.Option(
            help="How updates are aggregated: fedavg, fedprox, fedavgm, fedadam, fedyogi, "
            "fedadagrad, fedmedian, fedtrimmedavg, krum, multikrum, bulyan, qfedavg, diloco, "
            "scaffold, fedbn, or module:Class of one's own."
        ),
    ] = "fedavg",
    strategy_arg: Annotated[
        list[str] | None,
        typer.Option("--strategy-arg", help="An argument of the strategy: key=value."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the task: key=value.")
    ] = None,
    codec: Annotated[
        str,
        typer.Option(
            help="How updates travel: fp32 (whole), or their change as bf16, int8, sign, ternary, "
            "topk (ternary:0.1 and topk:0.02 for another share than 20 and 1 %)."
        ),
    ] = "fp32",
    seed: Annotated[int, typer.Option(help="For first weights and sampling.")] = 0,
    weighting: Annotated[str, typer.Option(help="examples, or equal.")] = "examples",
    max_weight_share: Annotated[
        float, typer.Option(help="No peer counts for more than this share of a round.")
    ] = 1.0,
    clip_norm: Annotated[
        float, typer.Option(min=0.0, help="No update moves the weights further (0: off).")
    ] = 0.0,
    min_examples: Annotated[
        int, typer.Option(min=1, help="A peer that trains on fewer gets no work of this run.")
    ] = 1,
    mode: Annotated[
        str,
        typer.Option(help="synchronous rounds, or buffered: no peer waits for another (FedBuff)."),
    ] = "synchronous",
    buffer: Annotated[
        int, typer.Option(min=0, help="Buffered: so many updates make a version.")
    ] = 0,
    max_staleness: Annotated[
        int, typer.Option(min=0, help="Buffered: an update may be so many versions behind.")
    ] = 10,
    concurrency: Annotated[
        int, typer.Option(min=0, help="Buffered: so many peers train at a time (0: all).")
    ] = 0,
    server_lr: Annotated[
        float, typer.Option("--server-lr", help="Buffered: how far a version follows its updates.")
    ] = 1.0,
    best_metric: Annotated[
        str,
        typer.Option(
            help="What makes a version best: a metric of the task's (accuracy, else loss)."
        ),
    ] = "",
    best_direction: Annotated[
        str, typer.Option(help="max or min; by default as the metric's name says.")
    ] = "",
    patience: Annotated[
        int, typer.Option(min=0, help="End after so many rounds without a better version (0: off).")
    ] = 0,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="A number, or METRIC=NUMBER: end when the metric has reached it. A name: of a "
            "table, the column to be predicted (task tabular). May be given twice."
        ),
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="First weights: a safetensors file.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until it has ended.")] = False,
    json: Json = False,
) -> None:
    """Start a run."""
    order = run_options.order(
        task=task,
        task_=task_,
        target=target,
        kind=kind,
        features=features,
        rounds=rounds,
        quorum=quorum,
        deadline=deadline,
        select=select,
        late=late,
        keep_versions=keep_versions,
        strategy=strategy,
        strategy_arg=strategy_arg,
        set_=set_,
        codec=codec,
        seed=seed,
        weighting=weighting,
        max_weight_share=max_weight_share,
        clip_norm=clip_norm,
        min_examples=min_examples,
        mode=mode,
        buffer=buffer,
        max_staleness=max_staleness,
        concurrency=concurrency,
        server_lr=server_lr,
        best_metric=best_metric,
        best_direction=best_direction,
        patience=patience,
        from_=from_,
    )
    remote = connect()
    run_id = remote.start_run(order)
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
