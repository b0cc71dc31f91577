"""`commonweight models …`: the versions of the shared weights that runs have made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.common import Json, connect, print_line, print_list
from coordinator.cli.names import RunName, find_run
from protocols.local.command_line import App

models = App(help="List and export the models that runs have made.")


@models.command("list")
def list_models(json: Json = False) -> None:
    """List the best and the newest version of every run."""
    rows = [
        {"run": run.id, "which": which, "digest": digest}
        for run in connect(may_be_stopped=True).runs()
        for which, digest in (("best", run.best.digest if run.best else ""), ("latest", run.head))
        if digest
    ]
    columns = {"Run": "run", "Which": "which", "Digest": "digest"}
    empty = "no models yet; start a run: commonweight run start mnist"
    print_list(rows, columns, empty, json=json)


@models.command("export")
def export(
    run: RunName,
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    which: Annotated[str, typer.Option(help="best, latest, or a digest.")] = "best",
) -> None:
    """Write a version as safetensors, with a model card in JSON.

    Other formats, such as ONNX, need torch: use commonweight-agent models export.
    """
    from coordinator.remote import version_files
    from protocols.model import model_card

    remote = connect(may_be_stopped=True)
    version = version_files.export_version(remote, find_run(remote, run), which, out)
    print_line(f"wrote {out} ({version[:12]}) and {model_card.card_path(out)}")
