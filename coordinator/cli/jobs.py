"""`commonweight infer …` and `commonweight job …`: ask the fleet beside its training."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli.common import Json, connect, print_table
from coordinator.remote.durations import parse_seconds
from protocols.errors import CommonweightError, UsageError
from protocols.local import homes, json_output

jobs = typer.Typer(help="Jobs beside training: look at them, stop them.", no_args_is_help=True)

_POLL_S = 0.2


def add_to(app: typer.Typer) -> None:
    app.command("infer")(infer)
    app.add_typer(jobs, name="job")


def infer(
    task: Annotated[str, typer.Argument(help="The task; by default that of the model.")] = "",
    private: Annotated[
        bool, typer.Option("--private", help="Each peer measures on its own rows.")
    ] = False,
    scatter: Annotated[
        Path | None,
        typer.Option(
            "--scatter", help="Rows to spread: CSV, Parquet, .txt, or a folder of pictures."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="best, latest, RUN, RUN:latest or a digest; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the answers go: .csv, .jsonl or .parquet.")
    ] = None,
    quorum: Annotated[
        int, typer.Option(min=1, help="So many peers must give the same answer.")
    ] = 1,
    min_group: Annotated[
        int, typer.Option(min=1, help="No metric over fewer rows leaves a peer.")
    ] = 10,
    deadline: Annotated[
        str, typer.Option(help="Of --private: go on without peers that have not answered then.")
    ] = "10m",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Answers from shared models: on the peers' own rows, or for rows that you give away."""
    if private == (scatter is not None):
        raise UsageError("either --private or --scatter INPUT", "commonweight infer --help")
    remote = connect()
    pins = _pinned(remote, model or ["best"], task)
    if scatter is not None:
        _scattered(remote, scatter, pins, out, quorum, yes=yes, json=json)
    else:
        _measured(remote, pins, min_group, parse_seconds(deadline), json=json)


def _pinned(remote: Any, words: list[str], task: str) -> Any:
    from coordinator.jobs import model_refs

    return model_refs.resolve(remote.runs(), words, task)


def _scattered(
    remote: Any, source: Path, pins: Any, out: Path | None, quorum: int, *, yes: bool, json: bool
) -> None:
    from coordinator.jobs import output as job_output
    from coordinator.jobs.input import prepare
    from coordinator.jobs.store import JobStore
    from coordinator.storage.job_events import JobSpec

    if out is None:
        raise UsageError("where do the answers go?", "--out answers.csv")
    if len(pins.models) != 1:
        raise UsageError("rows are spread for one model", "name one --model")
    job_output.check_target(out)
    if remote.role != "operator" or not (homes.home_path("coordinator") / homes.STAMP).exists():
        raise UsageError("rows are spread from the coordinator's own machine")
    store = JobStore(homes.open_home("coordinator") / "jobs")
    given = prepare(source, store.folder, store.suffix)
    sys.stderr.write(
        f"the rows of {source} leave this machine: peers whose owners take such rows see them\n"
    )
    if sys.stdin.isatty() and not (yes or json):
        typer.confirm("go on?", abort=True, err=True)
    spec = JobSpec(
        kind="scatter",
        task=pins.task,
        settings=pins.settings,
        models=pins.models,
        names=pins.names,
        input=given.digest,
        suffix=given.suffix,
        blocks=given.blocks,
        quorum=quorum,
    )
    job = _wait_until_ended(
        remote, _same_job(remote, spec, store) or remote.start_job(spec), quiet=json
    )
    if job.state != "finished":
        raise CommonweightError(
            f"job {job.id} {job.state}: {job.ended_because}",
            "the same command goes on where it stopped",
        )
    rows = job_output.merge(job, store, out)
    with contextlib.suppress(CommonweightError):  # then the files stay for a while
        remote.mark_job_taken(job.id)
    if json:
        told = {"job": job.id, "out": out, "rows": rows, "dropped": job.dropped}
        sys.stdout.write(json_output.ok(told) + "\n")
    else:
        sys.stderr.write(f"wrote {rows:,} answers to {out}\n")


def _same_job(remote: Any, spec: Any, store: Any) -> str:
    """The job that was asked the same before and whose answers nobody has taken, or none.

    One that had ended early is made to go on; one whose answers were dropped is of no use.
    """
    from msgspec.structs import replace

    for job in reversed(remote.jobs()):
        old = job.spec
        models = tuple(replace(model, nbytes=0) for model in old.models)
        same = not job.taken and replace(old, models=models, names=spec.names) == spec
        if same and all(map(store.has, job.on_disk)):
            if job.state in ("stopped", "failed"):
                remote.resume_job(job.id)
            return str(job.id)
    return ""


def _measured(remote: Any, pins: Any, min_group: int, deadline_s: float, *, json: bool) -> None:
    from coordinator.jobs import output as job_output
    from coordinator.storage.job_events import JobSpec

    spec = JobSpec(
        kind="private",
        task=pins.task,
        settings=pins.settings,
        models=pins.models,
        names=pins.names,
        min_group=min_group,
        deadline_s=deadline_s,
    )
    job = _wait_until_ended(remote, remote.start_job(spec), quiet=json)
    scores = job_output.scores_of(job)
    called = {peer["peer"]: peer["name"] for peer in remote.peers()}
    found = job_output.matrices(scores)
    missing = {called.get(peer, peer): reason for peer, reason in job.excused.items()}
    if json:
        rows = {
            peer: {m: score.num_examples for m, score in of.items()} for peer, of in scores.items()
        }
        told = {
            "job": job.id,
            "state": job.state,
            "models": dict(zip((m.digest for m in pins.models), pins.names, strict=True)),
            "peers": {"asked": len(job.units), "answered": len(scores), "excused": missing},
            "rows": rows,
            "metrics": [matrix._asdict() for matrix in found],
        }
        sys.stdout.write(json_output.ok(told) + "\n")
    else:
        _show_matrices(found, pins, called)
        sys.stderr.write(f"{len(scores)} of {len(job.units)} peers answered\n")
        if scores and not found:
            sys.stderr.write("no metric: each peer has fewer rows than it tells metrics of\n")
        for name, reason in missing.items():
            sys.stderr.write(f"{name}: {reason}\n")
    if not scores:
        raise CommonweightError(f"job {job.id} {job.state}: {job.ended_because}")


def _show_matrices(found: Any, pins: Any, called: dict[str, str]) -> None:
    names = dict(zip((model.digest for model in pins.models), pins.names, strict=True))
    for matrix in found:
        columns = {"peer": matrix.metric} | {
            digest: f"{name} {digest[:8]}" for digest, name in names.items()
        }
        rows = [
            {"peer": called.get(peer, peer)} | {d: _figure(row.get(d)) for d in names}
            for peer, row in matrix.by_peer.items()
        ]
        rows.append({"peer": "weighted"} | {d: _figure(matrix.weighted.get(d)) for d in names})
        rows.append({"peer": "worst"} | {d: _worst(matrix.worst.get(d), called) for d in names})
        print_table(rows, columns, "")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _worst(found: tuple[str, float] | None, called: dict[str, str]) -> str:
    return "–" if found is None else f"{found[1]:.4f} {called.get(found[0], found[0])}"


def _wait_until_ended(remote: Any, job_id: str, *, quiet: bool) -> Any:
    """The job, once it has ended, with a bar meanwhile."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, quiet=quiet)
    with Progress(console=console, disable=quiet or not console.is_terminal) as bar:
        shown = bar.add_task(job_id, total=None)
        while True:
            stands = remote.job_status(job_id)
            bar.update(shown, total=stands.total, completed=stands.done)
            if stands.state != "working":
                return remote.job(job_id)
            time.sleep(_POLL_S)


# --- all jobs --------------------------------------------------------------------------------


@jobs.command("list")
def list_jobs(json: Json = False) -> None:
    """All jobs of this coordinator."""
    from coordinator.jobs.messages import job_changed

    found = [job_changed(job) for job in connect().jobs()]
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    rows = [
        {
            "job": job.job,
            "task": job.task or "–",
            "state": job.state,
            "done": f"{job.done:,}/{job.total:,}",
            "because": job.ended_because,
        }
        for job in found
    ]
    columns = {"job": "Job", "task": "Task", "state": "State", "done": "Done", "because": "Because"}
    print_table(rows, columns, "no jobs yet; start one: commonweight infer --private TASK")


@jobs.command("show")
def show(job: str, json: Json = False) -> None:
    """One job: its units, who did them, and what was dropped."""
    from coordinator.jobs.messages import job_changed

    remote = connect()
    found = remote.job(job)
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    called = {peer["peer"]: peer["name"] for peer in remote.peers()}
    stands = job_changed(found)
    sys.stdout.write(f"{found.id}: {found.state}, {stands.done:,} of {stands.total:,}\n")
    if found.ended_because:
        sys.stdout.write(f"because {found.ended_because}\n")
    states: dict[str, int] = {}
    done: dict[str, list[int]] = {}
    for unit in found.units.values():
        states[unit.state] = states.get(unit.state, 0) + 1
        for peer, given in unit.given.items():
            done.setdefault(peer, []).append(given.rows)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    sys.stdout.write(f"units: {counts or 'none yet'}\n")
    for peer, rows in sorted(done.items()):
        rate = f", {found.rates[peer]:,.0f} rows/s" if peer in found.rates else ""
        name = called.get(peer, peer)
        sys.stdout.write(f"  {name}: {len(rows)} units, {sum(rows):,} rows{rate}\n")
    for reason, count in sorted(found.dropped.items()):
        sys.stdout.write(f"dropped answers: {count} {reason}\n")
    for peer, reason in found.excused.items():
        sys.stdout.write(f"excused {called.get(peer, peer)}: {reason}\n")


@jobs.command("stop")
def stop(job: str, json: Json = False) -> None:
    """End a job; what is verified stays."""
    remote = connect()
    remote.stop_job(job)
    if json:
        sys.stdout.write(json_output.ok({"job": job}) + "\n")
    else:
        sys.stderr.write(f"{job} is stopping\n")
