"""`commonweight run …` and `commonweight models …`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from coordinator.cli_fleet import Json, _remote, _table, seconds
from protocols import homes, output
from protocols.errors import UsageFault

runs = typer.Typer(help="Training runs: start, stop, look at.", no_args_is_help=True)
models = typer.Typer(help="The shared weights that runs have made.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(runs, name="run")
    app.add_typer(models, name="models")


#: A round that sets its own deadline takes no longer than that.
_LONGEST_AUTO_S = 600.0


def setting(text: str) -> tuple[str, str | int | float | bool]:
    """`key=value` with the value as the number or truth value it looks like. Raises UsageFault."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageFault(f"{text!r} is not key=value")
    if value in ("true", "false"):
        return key, value == "true"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


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
            help="How updates travel: fp32 (whole), or their change as bf16, int8, sign, topk "
            "(topk:0.02 for another share than 1 %)."
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
            help="A number: end when the metric has reached it. A name: of a table, the column to "
            "be predicted (task tabular). May be given twice."
        ),
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="First weights: a safetensors file.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until it has ended.")] = False,
    json: Json = False,
) -> None:
    """Start a run."""
    order = typed_order(
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
    remote = _remote()
    run_id = remote.start_run(order)
    if follow:
        run = _follow(remote, run_id, quiet=json)
        if json:
            sys.stdout.write(output.ok(run) + "\n")
        return
    if json:
        sys.stdout.write(output.ok({"run": run_id}) + "\n")
    else:
        sys.stderr.write(f"started {run_id}; watch it: commonweight monitor\n")


def typed_order(
    *,
    task: str,
    task_: str,
    target: list[str] | tuple[str, ...] | None,
    kind: str,
    features: str,
    **others: Any,
) -> Any:
    """The order for the options of `start` as they were typed, there or in the monitor's form.

    Raises UsageFault and its kin.
    """
    if bool(task) == bool(task_):
        raise UsageFault("name one task", "commonweight run start mnist")
    column, goal = _targets(list(target or []))
    table = {"target": column, "kind": kind, "features": features}
    chosen = {name: value for name, value in table.items() if value}
    return run_order(task=task or task_, table=chosen, target=goal, **others)


def run_order(
    *,
    task: str,
    rounds: int,
    quorum: int,
    deadline: str,
    strategy: str,
    set_: list[str] | None,
    codec: str,
    seed: int,
    weighting: str,
    max_weight_share: float,
    clip_norm: float,
    from_: Path | None,
    select: str = "",
    late: str = "drop",
    keep_versions: int = 2,
    min_examples: int = 1,
    mode: str = "synchronous",
    buffer: int = 0,
    max_staleness: int = 10,
    concurrency: int = 0,
    server_lr: float = 1.0,
    strategy_arg: list[str] | None = None,
    best_metric: str = "",
    best_direction: str = "",
    patience: int = 0,
    target: float | None = None,
    table: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """The order for these options. Raises UsageFault."""
    from coordinator.facts import RunSpec
    from coordinator.orders import RunOrder
    from protocols import codecs

    codecs.find(codec)
    if weighting not in ("examples", "equal"):
        raise UsageFault(f"weighting is examples or equal, not {weighting!r}")
    if late not in ("drop", "fold"):
        raise UsageFault(f"--late is drop or fold, not {late!r}")
    if mode not in ("synchronous", "buffered"):
        raise UsageFault(f"the mode is synchronous or buffered, not {mode!r}")
    if best_direction not in ("", "max", "min"):
        raise UsageFault(f"the best direction is max or min, not {best_direction!r}")
    spec = RunSpec(
        task=_task_name(task),
        rounds=rounds,
        quorum=quorum,
        deadline_s=_LONGEST_AUTO_S if deadline == "auto" else seconds(deadline),
        deadline="auto" if deadline == "auto" else "fixed",
        select=_times(select) if select else 0.0,
        late="fold" if late == "fold" else "drop",
        keep_versions=keep_versions,
        strategy=strategy,
        strategy_args=dict(setting(text) for text in strategy_arg or []),
        settings={**dict(setting(text) for text in set_ or []), **table},
        codec=codec,
        seed=seed,
        weighting="equal" if weighting == "equal" else "examples",
        max_weight_share=max_weight_share,
        clip_norm=clip_norm,
        min_examples=min_examples,
        mode="buffered" if mode == "buffered" else "synchronous",
        buffer=buffer,
        max_staleness=max_staleness,
        concurrency=concurrency,
        server_lr=server_lr,
        handshake=True,
        best_metric=best_metric,
        best_direction=best_direction,  # type: ignore[arg-type]
        patience=patience,
        target=target,
    )
    return RunOrder(spec=spec, from_digest=_adopt(from_) if from_ else "")


def _targets(given: list[str]) -> tuple[str, float | None]:
    """The column and the value of the metric among what was given. Raises UsageFault."""
    column, goal = "", None
    for text in given:
        try:
            goal = float(text)
        except ValueError:
            if column:
                raise UsageFault(
                    f"{column} and {text} cannot both be predicted", "start two runs"
                ) from None
            column = text
    return column, goal


def _task_name(text: str) -> str:
    """A task's name. Of one in a file only "file.py:Class": each agent has its own copy of it."""
    path, colon, attribute = text.rpartition(":")
    if not (colon and path.endswith(".py")) and ("/" in text or text.endswith(".py")):
        raise UsageFault(f"{text!r} names no task", "write file and class: ./my_task.py:MyTask")
    return f"{Path(path).name}:{attribute}" if colon and path.endswith(".py") else text


def _times(text: str) -> float:
    """`1.2x` or `1.2`. Raises UsageFault."""
    try:
        return float(text.removesuffix("x"))
    except ValueError as err:
        raise UsageFault(f"{text!r} is no factor", "write 1.2x") from err


def _adopt(path: Path) -> str:
    """Put a safetensors file into the home as a version; its digest."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from coordinator.lane import Lane
    from protocols.weights import Weights

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise UsageFault(f"cannot read {path} as safetensors: {err}") from err
    return Lane(homes.open_home("coordinator")).commit(Weights(tensors))


def _follow(remote: Any, run_id: str, *, quiet: bool) -> Any:
    """Print a line a round until the run has ended; the run."""
    import time

    told = 0
    while True:
        run = remote.run(run_id)
        for closed in run.history[told:]:
            if not quiet:
                sys.stderr.write(_round_line(run, closed) + "\n")
        told = len(run.history)
        if run.ended:
            if not quiet:
                sys.stderr.write(f"{run.id} {run.state}: {run.ended_because}\n")
            return run
        time.sleep(0.5)


def _round_line(run: Any, closed: Any) -> str:
    metrics = " ".join(
        f"{name} {value:.4f}" for name, value in closed.metrics.items() if value is not None
    )
    behind = f"staleness ≤ {max(closed.staleness.values())} " if closed.staleness else ""
    return (
        f"round {closed.round}/{run.spec.rounds} {metrics} {behind}"
        f"peers {len(closed.contributors)} {closed.seconds:.2f} s "
        f"up {closed.bytes_up / 1e6:.2f} MB down {closed.bytes_down / 1e6:.2f} MB"
    )


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

    from coordinator import tracking

    remote = _remote()
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
    _remote().stop_run(run)
    sys.stderr.write(f"{run} is stopping\n")


@runs.command("resume")
def resume(run: str) -> None:
    """Go on with a run that was stopped or has failed, from its newest version."""
    _remote().resume_run(run)
    sys.stderr.write(f"{run} goes on; watch it: commonweight monitor\n")


@runs.command("list")
def list_runs(json: Json = False) -> None:
    """All runs of this coordinator."""
    found = _remote().runs()
    if json:
        sys.stdout.write(output.ok(found) + "\n")
        return
    rows = [
        {
            "run": run.id,
            "state": run.state.value,
            "round": f"{run.round}/{run.spec.rounds}",
            "best": _best(run),
        }
        for run in found
    ]
    columns = {"run": "Run", "state": "State", "round": "Round", "best": "Best"}
    _table(rows, columns, "no runs yet; start one: commonweight run start mnist")


def _best(run: Any) -> str:
    from coordinator import merit

    if run.best is None:
        return "–"
    name = merit.metric_of(run.spec, run.best.metrics)
    value = run.best.metrics.get(name)
    figure = f" {name} {value:.4f}" if value is not None else ""
    return f"round {run.best.round}{figure}"


@runs.command("show")
def show(run: str, json: Json = False) -> None:
    """One run: its settings, where it stands and what it waits for."""
    remote = _remote()
    found = remote.run(run)
    if json:
        sys.stdout.write(output.ok(found) + "\n")
        return
    shown = remote.fleet().runs.get(found.id)
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
    sys.stdout.write(f"quorum {found.spec.quorum}, deadline {_deadline(found)}, ")
    selects = f", select {found.spec.select:g}x" if found.spec.select else ""
    selects += ", late updates folded" if found.spec.late == "fold" else ""
    sys.stdout.write(f"weighting {found.spec.weighting}{selects}\n")
    for line in _buffer_lines(found, remote.fleet().peers):
        sys.stdout.write(line + "\n")
    for closed in found.history:
        mark = " ★" if found.best and closed.round == found.best.round else ""
        sys.stdout.write(f"{_round_line(found, closed)} {closed.digest[:12]}{mark}\n")
    if found.best is not None:
        for line in _fairness(found.best, remote.fleet().peers):
            sys.stdout.write(line + "\n")


def _buffer_lines(run: Any, peers: Any) -> list[str]:
    """Who is left out, and of a buffered run its settings and how far behind each peer is."""
    from coordinator import buffered
    from coordinator.fleet import called

    def name(peer: str) -> str:
        return called(peers[peer]) if peer in peers else peer

    spec = run.spec
    lines = [
        f"{name(peer)} is left out: too few examples; {spec.min_examples} at least"
        for peer in sorted(run.excluded)
    ]
    if not run.buffered:
        return lines
    lines.append(
        f"buffered: {spec.buffer} updates a version, at most {spec.max_staleness} versions behind, "
        f"{spec.concurrency or 'all'} peers at a time, server learning rate {spec.server_lr:g}"
    )
    behind = {name(peer): buffered.staleness(run, given) for peer, given in run.given.items()}
    if behind:
        told = ", ".join(f"{who} {count}" for who, count in sorted(behind.items()))
        lines.append(f"at work, versions behind: {told}")
    return lines


def _fairness(closed: Any, peers: Any) -> list[str]:
    """By metric: whom the version serves worst, and how far apart the peers are."""
    from coordinator.fleet import called

    lines = []
    for name, (least, median, most) in sorted(closed.spread.items()):
        peer = closed.worst.get(name, "")
        who = called(peers[peer]) if peer in peers else peer
        lines.append(
            f"round {closed.round}: {name} {least:.4f} … {median:.4f} … {most:.4f} over the peers"
            + (f"; worst: {who}" if who else "")
        )
    return lines


def _deadline(run: Any) -> str:
    from coordinator.decisions import deadline_s

    word = "auto, now " if run.spec.deadline == "auto" else ""
    return f"{word}{deadline_s(run):g} s"


@models.command("list")
def list_models(json: Json = False) -> None:
    """The best and the newest version of every run."""
    rows: list[dict[str, Any]] = []
    for run in _remote().runs():
        for mark, digest in (("best", run.best.digest if run.best else ""), ("latest", run.head)):
            if digest:
                rows.append({"run": run.id, "which": mark, "digest": digest})
    if json:
        sys.stdout.write(output.ok(rows) + "\n")
        return
    columns = {"run": "Run", "which": "Which", "digest": "Digest"}
    _table(rows, columns, "no models yet; start a run: commonweight run start mnist")


@models.command("export")
def export(
    run: str,
    out: Annotated[Path, typer.Argument(help="Where to write the safetensors file.")],
    which: Annotated[str, typer.Option(help="best, latest, or a digest.")] = "best",
) -> None:
    """Write a version as safetensors, and beside it a card that says what it is and whence.

    Other forms, such as ONNX, are made where torch is: commonweight-agent export.
    """
    from coordinator import model_export
    from coordinator.fleet import called
    from protocols import model_card

    remote = _remote()
    found = remote.run(run)
    names = {peer.peer: called(peer) for peer in remote.fleet().peers.values()}
    version = model_export.export(homes.open_home("coordinator"), found, which, names, out)
    sys.stderr.write(f"wrote {out} ({version[:12]}) and {model_card.beside(out)}\n")
