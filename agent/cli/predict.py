"""`commonweight-agent predict`: answers from the shared model, on this machine and offline."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.control import say
from protocols.errors import UsageError
from protocols.local import homes


def predict(
    source: Annotated[
        str,
        typer.Argument(help="What to answer for: a table, a folder, a text; as the task has it."),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="latest: the newest version that this agent has; a version's digest; or a file "
            "of `commonweight models export`."
        ),
    ] = "latest",
    out: Annotated[
        Path | None, typer.Option(help="Where to: .csv, .jsonl or .parquet; else stdout.")
    ] = None,
) -> None:
    """Answer from the shared model, here and offline."""
    from agent.cli.export import find_model, load_predicting_task, load_weights
    from agent.home import settings
    from agent.inference import writers
    from protocols.model import personalization

    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", "choose another name")
    chosen = settings.read(homes.home_path("agent"))
    path, name, asked = find_model(model)
    plain = {key: value for key, value in asked.items() if key not in personalization.SETTINGS}
    with tempfile.TemporaryDirectory(prefix="commonweight-") as folder:
        task = load_predicting_task(name, chosen, Path(folder))
        count = writers.write(task.predict(load_weights(path), plain, source), out)
    where = f" in {out}" if out else ""
    say(f"{count} answers{where}, by {path.stem[:12]} of the task {name}")
