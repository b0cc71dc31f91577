"""`commonweight-agent predict`: predict with the shared model, on this machine and offline."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.common import Json, print_line, print_result
from agent.cli.models import (
    LATEST,
    TaskFile,
    Use,
    UseOption,
    find_model,
    find_named_model,
    with_task,
)
from agent.home import settings
from protocols.errors import UsageError
from protocols.local import homes


class _Which(StrEnum):
    BEST = "best"
    LATEST = "latest"


def predict(
    source: Annotated[
        str,
        typer.Argument(help="The input: a table, a folder or a text, depending on the task."),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="latest (default), the newest version on this machine; a digest; or a file of "
            "`commonweight models export`."
        ),
    ] = "",
    run: Annotated[
        str, typer.Option(help="Use a version of this run, or of the newest run of this task.")
    ] = "",
    which: Annotated[
        _Which | None, typer.Option(help="With --run: the best version, or the latest.")
    ] = None,
    use: UseOption = Use.RECOMMENDED,
    task: TaskFile = "",
    id_column: Annotated[
        str, typer.Option(help="Copy this column of the table to the answers.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="The output file: .csv, .jsonl or .parquet; else stdout.")
    ] = None,
    json: Json = False,
) -> None:
    """Predict with the model recommended here, offline."""
    from agent.cli.local_trainer import LocalTrainer, paths_of
    from agent.inference import id_columns, writers

    if json and out is None:
        raise UsageError("without a file, the answers go to stdout", "--out answers.csv --json")
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", "choose another name")
    chosen = settings.read(homes.home_path("agent"))
    if which and not run:
        raise UsageError(f"--which {which.value} needs a run", "--run NAME, such as --run tabular")
    if run and model:
        raise UsageError("--run and --model both name a model", "leave one out")
    if run:
        found = find_named_model(run, (which or _Which.BEST).value)
    else:
        found = find_model(model or LATEST)
    if not (model or which):  # who names a version gets that one
        found = found.recommended(use)
    found.check_whole()
    chosen = with_task(chosen, found, task)
    read = [found.path, *paths_of(source)]
    with (
        tempfile.TemporaryDirectory(prefix="commonweight-") as folder,
        LocalTrainer(chosen, Path(folder), read) as trainer,
    ):
        answers = trainer.predict(found, source)
        if id_column:
            answers = id_columns.copied(answers, source, id_column)
        count = writers.write(answers, out)
        for line in trainer.said():
            print_line(line)
    where = f" in {out}" if out else ""
    answers_word = "answer" if count == 1 else "answers"
    data = {
        "rows": count,
        "out": out,
        "task": found.task,
        "model": found.kind,
        "digest": found.digest,
        "version": found.origin,
    }
    print_result(data, f"{count} {answers_word}{where}, by {found.title}", json=json)
    if found.origin and not json:
        print_line(f"that is {found.origin}")
