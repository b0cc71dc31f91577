"""`commonweight-agent export`: a shared model in a form that other programs read.

It is made here and not at the coordinator, which has neither torch nor the tasks.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli.control import Json, say
from protocols.errors import CommonweightError, UnknownName, UsageError
from protocols.local import homes, json_output

if TYPE_CHECKING:
    from agent.home.settings import AgentSettings
    from agent.tasks import Predicting

LATEST = "latest"


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A file of `commonweight models export`, its card beside it; or latest, the "
            "newest version that this agent has; or a version's digest."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="What to write: MODEL.onnx, or a folder for merged.")],
    form: Annotated[
        str, typer.Option("--form", help="onnx, or merged (of lora); else as OUT ends.")
    ] = "",
    json: Json = False,
) -> None:
    """Write a shared model as ONNX, or with its adapters merged, for programs without us."""
    from agent.home import settings
    from agent.tasks import Exporting, registry
    from protocols.model import personalization

    chosen = settings.read(homes.home_path("agent"))
    path, task_name, asked = find_model(model)
    form = form or ("onnx" if out.suffix == ".onnx" else "merged")
    if out.exists():
        raise UsageError(f"{out} exists already", "choose another name")
    out = out.absolute()
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}")
    task = registry.create(task_name, chosen.task_files.get(task_name, ""), chosen.framework)
    forms = task.forms if isinstance(task, Exporting) else ()
    if form not in forms:
        known = f"it can be {', '.join(forms)}" if forms else "safetensors and the card are all"
        raise UnknownName(f"the task {task_name} has no form {form!r}", known)
    assert isinstance(task, Exporting)
    if asked.get(personalization.PERSONAL_LAYERS):
        raise UsageError(
            f"this run's {asked[personalization.PERSONAL_LAYERS]} stay at home: no version is whole"
        )
    plain = {name: value for name, value in asked.items() if name not in personalization.SETTINGS}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="commonweight-")))
        data = settings.data_settings(chosen, folder)
        task.export(load_weights(path), plain, form, data, out)
    if json:
        sys.stdout.write(json_output.ok({"form": form, "out": out}) + "\n")
    else:
        say(f"wrote {out} ({form})")


def find_model(model: str) -> tuple[Path, str, dict[str, Any]]:
    """The file, its task and that one's settings. Raises UsageError, UnknownName, NotEnrolled."""
    from agent.home import settings
    from agent.transport import version_proofs
    from protocols.model import model_card

    path = Path(model).expanduser()
    is_digest = re.fullmatch(r"[0-9a-f]{6,64}", model) and not path.exists()
    if model != LATEST and not is_digest:
        card = model_card.read(path)
        return path, card.task, card.settings
    home = homes.open_home("agent")
    enrollment = settings.read_enrollment(home)
    mine = version_proofs.list_verified(home / "cache", enrollment.coordinator_public)
    for found in mine:
        if not is_digest or found.work.base.startswith(model):
            return found.path, found.work.task, found.work.settings
    if mine:
        here = ", ".join(found.work.base[:12] for found in mine)
        raise UnknownName(f"this agent has no version {model}", f"it has {here}")
    raise UnknownName("this agent has no version yet", "it gets one with its first work")


def load_predicting_task(name: str, chosen: AgentSettings, cache: Path) -> Predicting:
    """The task `name`, ready to predict: loaded, if the owner has set data or base models.

    Raises UnknownName, TaskUnusable, and what the task's `load` raises.
    """
    from agent.home import settings
    from agent.tasks import Predicting, registry

    task = registry.create(name, chosen.task_files.get(name, ""), chosen.framework)
    if not isinstance(task, Predicting):
        raise UnknownName(f"the task {name} gives no answers", "its class needs a method predict")
    data = settings.data_settings(chosen, cache)
    if data.is_set:
        task.load(data)
    return task


def load_weights(path: Path) -> Any:
    from protocols.model import personalization, weights

    try:
        return personalization.without_controls(weights.load(path))
    except OSError as err:
        raise CommonweightError(f"cannot read {path}: {err.strerror}") from err
