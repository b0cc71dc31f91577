"""`commonweight infer …`: inference beside training; `infer list`, `show` and `stop`."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from coordinator.cli.common import (
    Columns,
    Json,
    Yes,
    connect,
    print_json,
    print_line,
    print_list,
    print_result,
    print_table,
    print_text,
)
from coordinator.cli.names import JobName, complete_models, complete_tasks
from protocols.errors import CommonweightError, UsageError
from protocols.local.command_line import App

if TYPE_CHECKING:
    from coordinator.jobs.output import Matrix
    from coordinator.jobs.state import Job
    from coordinator.remote.api_client import Remote
    from coordinator.storage.job_events import JobSpec
    from protocols.messages.envelope import JobChanged

jobs = App(help="Jobs beside training: list, show, stop.")

#: Characters of a question in a list.
_MAX_QUESTION = 60
#: By the word before `list`, the jobs that it lists; others list all.
_KINDS = {"infer": ("private", "scatter"), "analyze": ("analyze",)}


def _complete_infer() -> list[tuple[str, str]]:
    commands = [("list", "all jobs"), ("show", "one job"), ("stop", "stop a job")]
    return [*commands, *complete_tasks()]


def add_to(app: typer.Typer) -> None:
    app.command("infer")(infer)
    app.add_typer(jobs, name="job")


def infer(
    task: Annotated[
        str,
        typer.Argument(
            help="The task; by default that of the model.", autocompletion=_complete_infer
        ),
    ] = "",
    private: Annotated[
        bool, typer.Option("--private", help="Each peer evaluates on its own rows.")
    ] = False,
    scatter: Annotated[
        Path | None,
        typer.Option(
            "--scatter",
            help="Rows to send to peers: CSV, Parquet, .txt, or a folder of pictures.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="best, latest, RUN, RUN:latest or a digest; may be repeated.",
            autocompletion=complete_models,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the answers go: .csv, .jsonl or .parquet.")
    ] = None,
    quorum: Annotated[
        int, typer.Option(min=1, help="How many peers must give the same answer.")
    ] = 1,
    min_group: Annotated[
        int, typer.Option(min=1, help="No metric over fewer rows leaves a peer.")
    ] = 10,
    deadline: Annotated[
        str, typer.Option(help="With --private: continue then without the missing peers.")
    ] = "10m",
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Use models on the peers' own rows, or on rows that you send.

    Its jobs: commonweight infer list, infer show JOB, infer stop JOB.
    """
    from coordinator.remote import inference

    if private == (scatter is not None):
        raise UsageError("either --private or --scatter INPUT", "commonweight infer --help")
    if scatter is not None and not scatter.exists():
        raise UsageError(f"there is no file {scatter}", "name a CSV, Parquet or text file of rows")
    if scatter is not None and not yes and (json or not sys.stdin.isatty()):
        raise UsageError(
            "nothing was sent: rows would leave this machine, and there is no terminal to confirm "
            "it on",
            "add --yes",
        )
    remote = connect()
    given = list(dict.fromkeys(model or ["best"]))
    spec = inference.make_spec(
        remote,
        "scatter" if scatter else "private",
        given,
        task,
        quorum=quorum,
        min_group=min_group,
        deadline=deadline,
    )
    for name, found in zip(given, spec.names, strict=True):
        if name != found:
            run, colon, which = found.partition(":")
            print_line(f"the newest run of {name.removesuffix(colon + which)} is {run}")
    if scatter is not None:
        _scatter(remote, spec, scatter, out, yes=yes, json=json)
    else:
        _evaluate(remote, spec, json=json)


# --- rows that you send ----------------------------------------------------------------------


def _scatter(
    remote: Remote, spec: JobSpec, source: Path, out: Path | None, *, yes: bool, json: bool
) -> None:
    from coordinator.jobs import output
    from coordinator.remote import inference

    if out is None:
        raise UsageError("--scatter needs a file for the answers", "--out answers.csv")
    output.check_target(out)
    store = inference.open_store(remote)
    spec = inference.with_rows(spec, source, store)
    print_line(
        f"the rows of {source} leave this machine: they go to peers whose owners accept them"
    )
    if not yes:
        typer.confirm("continue?", abort=True, err=True)
    job = _wait_until_ended(remote, inference.start_or_continue(remote, spec, store), quiet=json)
    count = inference.collect(remote, job, store, out)
    data = {"job": job.id, "out": out, "rows": count, "dropped": job.dropped}
    print_result(data, f"wrote {count:,} answers to {out}", json=json)


def _wait_until_ended(remote: Remote, job_id: str, *, quiet: bool) -> Job:
    """Show a progress bar until the job has ended; return the job."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from coordinator.remote import inference

    console = Console(stderr=True, quiet=quiet)
    with Progress(console=console, disable=quiet or not console.is_terminal) as bar:
        shown = bar.add_task(escape(job_id), total=None)
        for status in inference.statuses(remote, job_id):
            bar.update(shown, total=status.total, completed=status.done)
    return remote.job(job_id)


# --- the peers' own rows ---------------------------------------------------------------------


def _evaluate(remote: Remote, spec: JobSpec, *, json: bool) -> None:
    from coordinator.jobs import output

    job = _wait_until_ended(remote, remote.start_job(spec), quiet=json)
    scores = output.scores_of(job)
    matrices = output.matrices(scores)
    names = remote.peer_names()
    titles = dict(zip((m.digest for m in spec.models), spec.names, strict=True))
    missing = {names.get(peer, peer): reason for peer, reason in job.excused.items()}
    if json:
        data = {
            "job": job.id,
            "state": job.state,
            "models": titles,
            "peers": {"asked": len(job.units), "answered": len(scores), "excused": missing},
            "rows": {
                peer: {model: score.num_examples for model, score in by_model.items()}
                for peer, by_model in scores.items()
            },
            "metrics": [matrix._asdict() for matrix in matrices],
        }
        print_json(data)
    else:
        for matrix in matrices:
            _print_matrix(matrix, titles, names)
        print_line(f"{len(scores)} of {len(job.units)} peers answered")
        if scores and not matrices:
            print_line("no metric: every peer has fewer rows than its minimum for a metric")
        for name, reason in missing.items():
            print_line(f"{name}: {reason}")
    if not scores:
        raise CommonweightError(f"job {job.id} {job.state}: {job.ended_because}")


def _print_matrix(matrix: Matrix, models: dict[str, str], names: dict[str, str]) -> None:
    """Print a metric: a row for each peer, a column for each model."""

    def value(number: float | None) -> str:
        return "–" if number is None else f"{number:.4f}"

    def worst(model: str) -> str:
        peer, number = matrix.worst.get(model) or ("", None)
        return f"{value(number)} {names.get(peer, peer)}".rstrip()

    rows = [
        [names.get(peer, peer), *(value(by_model.get(model)) for model in models)]
        for peer, by_model in matrix.by_peer.items()
    ]
    rows.append(["weighted", *(value(matrix.weighted.get(model)) for model in models)])
    rows.append(["worst", *map(worst, models)])
    titles = (f"{name} {digest[:8]}" for digest, name in models.items())
    print_table([matrix.metric, *titles], rows)


# --- all jobs --------------------------------------------------------------------------------


@jobs.command("list")
def list_jobs(
    steps: Annotated[
        bool, typer.Option("--steps", help="Of analyze: each step of a question as a job.")
    ] = False,
    json: Json = False,
) -> None:
    """List all jobs of this coordinator; after analyze, the questions."""
    from coordinator.jobs.messages import job_changed

    columns: Columns[JobChanged] = {
        "Job": lambda job: job.job,
        "Task": lambda job: job.task or "–",
        "State": lambda job: job.state,
        "Done": lambda job: f"{job.done:,}/{job.total:,}",
        "Because": lambda job: job.ended_because,
    }
    empty = "no jobs yet; start one: commonweight infer --private TASK"
    asked = click.get_current_context().parent
    kinds = _KINDS.get(asked.info_name or "" if asked else "", ())
    found = [job for job in connect().jobs() if not kinds or job.spec.kind in kinds]
    if kinds == _KINDS["analyze"] and not steps:
        _list_questions(found, json=json)
        return
    print_list([job_changed(job) for job in found], columns, empty, json=json)


def _list_questions(found: list[Job], *, json: bool) -> None:
    from coordinator.jobs.questions import Question, questions
    from coordinator.remote.formatting import truncate

    columns: Columns[Question] = {
        "Job": lambda one: one.job,
        "Question": lambda one: truncate(one.text, _MAX_QUESTION),
        "State": lambda one: one.state,
        "Steps": lambda one: f"{one.done}/{len(one.steps)}",
        "Peers": lambda one: f"{one.steps[-1].done:,}/{one.steps[-1].total:,}",
        "Because": lambda one: one.because,
    }
    empty = 'no questions yet; ask one: commonweight analyze "count, mean(age)"'
    print_list(questions(found, time.time()), columns, empty, json=json)


@jobs.command("show")
def show(job: JobName, json: Json = False) -> None:
    """Show one job: its units, who did them, and dropped answers."""
    from coordinator.jobs.messages import job_changed

    remote = connect()
    found = remote.job(job)
    if json:
        print_json(found)
        return
    names = remote.peer_names()
    status = job_changed(found)
    lines = [f"{found.id}: {found.state}, {status.done:,} of {status.total:,}"]
    if found.ended_because:
        lines.append(f"because {found.ended_because}")
    states = Counter(unit.state for unit in found.units.values())
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    lines.append(f"units: {counts or 'none yet'}")
    rows_by_peer: dict[str, list[int]] = defaultdict(list)
    for unit in found.units.values():
        for peer, answer in unit.answers.items():
            rows_by_peer[peer].append(answer.rows)
    for peer, rows in sorted(rows_by_peer.items()):
        rate = f", {found.rates[peer]:,.0f} rows/s" if peer in found.rates else ""
        lines.append(f"  {names.get(peer, peer)}: {len(rows)} units, {sum(rows):,} rows{rate}")
    lines += [f"dropped answers: {count} {why}" for why, count in sorted(found.dropped.items())]
    lines += [f"excused {names.get(peer, peer)}: {why}" for peer, why in found.excused.items()]
    print_text("\n".join(lines))


@jobs.command("stop")
def stop(job: JobName, json: Json = False) -> None:
    """Stop a job. Verified answers stay."""
    remote = connect()
    found = remote.job_status(job)
    if found.state == "working":
        remote.stop_job(job)
    told = "is stopping" if found.state == "working" else f"has ended already: {found.state}"
    print_result({"job": job}, f"{job} {told}", json=json)
