"""`commonweight models …`: the versions that runs have made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli.common import Json, connect, print_table
from protocols.local import homes, json_output

models = typer.Typer(help="The shared weights that runs have made.", no_args_is_help=True)


@models.command("list")
def list_models(json: Json = False) -> None:
    """The best and the newest version of every run."""
    rows: list[dict[str, Any]] = []
    for run in connect().runs():
        for mark, digest in (("best", run.best.digest if run.best else ""), ("latest", run.head)):
            if digest:
                rows.append({"run": run.id, "which": mark, "digest": digest})
    if json:
        sys.stdout.write(json_output.ok(rows) + "\n")
        return
    columns = {"run": "Run", "which": "Which", "digest": "Digest"}
    print_table(rows, columns, "no models yet; start a run: commonweight run start mnist")


@models.command("export")
def export(
    run: str,
    out: Annotated[Path, typer.Argument(help="Where to write the safetensors file.")],
    which: Annotated[str, typer.Option(help="best, latest, or a digest.")] = "best",
) -> None:
    """Write a version as safetensors, and beside it a card that says what it is and whence.

    Other forms, such as ONNX, are made where torch is: commonweight-agent export.
    """
    from coordinator.fleet.reducer import called
    from coordinator.runs import export as model_export
    from protocols.model import model_card

    remote = connect()
    found = remote.run(run)
    names = {peer.peer: called(peer) for peer in remote.fleet().peers.values()}
    version = model_export.export(homes.open_home("coordinator"), found, which, names, out)
    sys.stderr.write(f"wrote {out} ({version[:12]}) and {model_card.card_path(out)}\n")
