"""`commonweight-agent export`: write a shared model in a format of other programs.

The agent does this and not the coordinator, which has neither torch nor the tasks.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.common import Json, print_result
from agent.cli.models import find_model
from agent.home import settings
from protocols.errors import UnknownName, UsageError
from protocols.local import homes


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="latest, the newest version of this agent; the digest of a version; or a file of "
            "`commonweight models export` with its card beside it."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The output: MODEL.onnx, or a folder for merged.")],
    form: Annotated[
        str,
        typer.Option("--form", help="onnx, or merged (for lora); default: as OUT ends."),
    ] = "",
    json: Json = False,
) -> None:
    """Write a shared model for other programs: as ONNX, or with its adapters merged."""
    from agent.tasks import Exporting, registry

    chosen = settings.read(homes.home_path("agent"))
    found = find_model(model)
    form = form or ("onnx" if out.suffix == ".onnx" else "merged")
    if out.exists():
        raise UsageError(f"{out} exists already", "choose another name")
    out = out.absolute()
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}")
    task = registry.create(found.task, chosen.task_files.get(found.task, ""), chosen.framework)
    forms = task.forms if isinstance(task, Exporting) else ()
    if form not in forms:
        hint = f"its forms: {', '.join(forms)}" if forms else "use the safetensors file"
        raise UnknownName(f"the task {found.task} has no form {form!r}", hint)
    assert isinstance(task, Exporting)
    with tempfile.TemporaryDirectory(prefix="commonweight-") as folder:
        data = settings.data_settings(chosen, Path(folder))
        task.export(found.load_weights(), found.task_settings, form, data, out)
    print_result({"form": form, "out": out}, f"wrote {out} ({form})", json=json)
