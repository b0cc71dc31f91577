"""`commonweight-agent predict`: predict with the shared model, on this machine and offline."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.common import print_line
from agent.cli.models import LATEST, find_model
from agent.home import settings
from protocols.errors import UsageError
from protocols.local import homes


def predict(
    source: Annotated[
        str,
        typer.Argument(help="The input: a table, a folder or a text, depending on the task."),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="latest, the newest version of this agent; the digest of a version; or a file of "
            "`commonweight models export`."
        ),
    ] = LATEST,
    out: Annotated[
        Path | None, typer.Option(help="The output file: .csv, .jsonl or .parquet; else stdout.")
    ] = None,
) -> None:
    """Predict with the shared model, on this machine and offline."""
    from agent.cli.local_trainer import LocalTrainer, paths_of
    from agent.inference import writers

    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", "choose another name")
    chosen = settings.read(homes.home_path("agent"))
    found = find_model(model)
    found.check_whole()
    read = [found.path, *paths_of(source)]
    with (
        tempfile.TemporaryDirectory(prefix="commonweight-") as folder,
        LocalTrainer(chosen, Path(folder), read) as trainer,
    ):
        count = writers.write(trainer.predict(found, source), out)
    where = f" in {out}" if out else ""
    print_line(f"{count} answers{where}, by {found.path.stem[:12]} of the task {found.task}")
