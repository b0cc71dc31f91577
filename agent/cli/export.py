"""`commonweight-agent models export`: write a shared model in a format of other programs.

The agent does this and not the coordinator, which has neither torch nor the tasks.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.cli.common import Json, print_data, print_line, print_result
from agent.cli.models import (
    LATEST,
    TaskFile,
    Use,
    UseOption,
    find_model,
    local_models,
    with_task,
)
from agent.home import own_results, settings
from protocols.errors import UsageError
from protocols.local import homes


def list_models(json: Json = False) -> None:
    """List the versions on this machine, the newest first."""
    kept = {found.result.digest for found in own_results.best_versions(homes.home_path("agent"))}
    rows: list[dict[str, Any]] = [
        {
            "digest": one.digest,
            "task": one.task,
            "model": one.kind,
            "version": one.origin,
            "kept": one.digest in kept,
        }
        for one in local_models()
    ]
    lines = (
        f"{row['digest'][:12]}  {row['task']:12} {row['model']:6} {row['version']}"
        f"{' ★' if row['kept'] else ''}"
        for row in rows
    )
    print_data(rows, lines, json=json)
    if not (rows or json):
        print_line("no model yet; the agent downloads one with its first work")


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="latest, the newest version of this agent; the digest of a version; or a file of "
            "`commonweight models export` with its card beside it."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="The output: MODEL.onnx, TREES.json, or a folder for merged.")
    ],
    form: Annotated[
        str,
        typer.Option(
            "--form", help="onnx, xgboost (for trees) or merged (for lora); default: as OUT ends."
        ),
    ] = "",
    use: UseOption = Use.RECOMMENDED,
    task: TaskFile = "",
    json: Json = False,
) -> None:
    """Write a model as ONNX, for XGBoost, or with its adapters merged."""
    from agent.cli.local_trainer import LocalTrainer
    from agent.tasks.work import Export

    chosen = settings.read(homes.home_path("agent"))
    found = find_model(model)
    if model == LATEST:
        found = found.exportable(use)
    form = form or {".onnx": "onnx", ".json": "xgboost"}.get(out.suffix, "merged")
    if out.exists():
        raise UsageError(f"{out} exists already", "choose another name")
    out = out.absolute()
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}", "create it, or name another file")
    found.check_whole()
    chosen = with_task(chosen, found, task)
    with (
        tempfile.TemporaryDirectory(prefix="commonweight-") as folder,
        LocalTrainer(chosen, Path(folder), [found.path]) as trainer,
    ):
        made = trainer.work / out.name
        trainer.run(
            Export(
                task=found.task,
                settings=found.settings,
                base=str(found.path),
                form=form,
                out=str(made),
            )
        )
        shutil.move(made, out)
    made_of = {"form": form, "out": out, "model": found.kind, "version": found.origin}
    print_result(made_of, f"wrote {out} ({form})", json=json)
    if found.origin and not json:
        print_line(f"that is {found.origin}")
