"""Finds a shared model on this machine, for `predict`, `serve` and `export`."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from msgspec.structs import replace

from agent.home import enrollment_file, own_results
from agent.home.settings_schema import AgentSettings
from agent.tasks import registry
from protocols.errors import UnknownName, UsageError
from protocols.local import homes
from protocols.local.flower_apps import PREFIX
from protocols.messages.comparisons import Model
from protocols.messages.work import Which

LATEST = "latest"


class Use(StrEnum):
    """Which model of a run: the one that is recommended here, or the shared one."""

    RECOMMENDED = "recommended"
    SHARED = "shared"


#: An option of commands that use the model of a run.
UseOption = Annotated[
    Use,
    typer.Option(
        help="recommended: the shared model, or one of this machine's rows if the comparison after "
        "the run found it better here; shared."
    ),
]


class LocalModel(NamedTuple):
    """A version of a shared model: its file, the name of its task, and the run's settings.

    `origin` says which version it is, if that is known, and `run` of which run.
    """

    path: Path
    task: str
    settings: dict[str, Any]
    origin: str = ""
    run: str = ""

    def recommended(self, use: Use) -> LocalModel:
        """The model of the same run that is recommended on this machine, or the shared one if that
        is wanted; itself if this machine has no other file of it."""
        from protocols.model import personalization
        from protocols.privacy import private_training

        if not self.run:
            return self
        wanted: Model | None = "shared" if use is Use.SHARED else None
        found = own_results.recommended(homes.home_path("agent"), self.run, wanted)
        if found is None:
            return self
        name, path, of = found
        kept = personalization.SETTINGS | private_training.SETTINGS
        settings = {key: value for key, value in of.settings.items() if key not in kept}
        origin = f"the {name} model of {self.run}"
        if name == "shared":
            origin = f"the best version of {self.run}, a model of the kind {settings.get('model')}"
        elif use is Use.RECOMMENDED:
            origin += ", which is recommended on this machine; for the shared one: --use shared"
        return LocalModel(path, self.task, settings, origin, self.run)

    def check_whole(self) -> None:
        """Raise UsageError if a part of the model stays on each peer."""
        from protocols.model import personalization

        if layers := self.settings.get(personalization.PERSONAL_LAYERS):
            raise UsageError(
                f"the layers {layers} of this run stay on each peer: no model is complete"
            )


#: An option of commands that run a model's task.
TaskFile = Annotated[
    str,
    typer.Option(
        "--task", help="File and class of its task, ./my_task.py:MyTask, if not registered here."
    ),
]


def with_task(chosen: AgentSettings, model: LocalModel, source: str) -> AgentSettings:
    """The settings with the file of the model's task: `source`, or the registered one if empty.

    Raises UsageError, and UnknownName if this machine does not have the task.
    """
    if source:
        registry.check_source(source)
        path, attribute = registry.split_source(source)
        files = {**chosen.task_files, model.task: f"{path}:{attribute}"}
        return replace(chosen, task_files=files)
    if model.task.startswith(PREFIX):
        raise UsageError(
            "the model is that of a Flower app, and only the app can use it",
            "load the safetensors file in a program of your own",
        )
    if model.task not in {*chosen.task_files, *registry.names()}:
        example = f"./{model.task}" if ".py:" in model.task else "./my_task.py:MyTask"
        raise UnknownName(
            f"this machine has no task {model.task!r}",
            f"name its file: --task {example}, in Python task={example!r}; tasks here: "
            f"{', '.join(sorted({*chosen.task_files, *registry.names()}))}",
        )
    return chosen


def local_models() -> list[LocalModel]:
    """The verified versions on this machine, the newest first. Raises NotEnrolled."""
    from agent.transport import version_proofs
    from protocols.p2p.gossip import version_number

    home = homes.open_home("agent")
    enrollment = enrollment_file.read_enrollment(home)
    public, fleet = enrollment.coordinator_public, enrollment.fleet
    return [
        LocalModel(
            version.path,
            version.work.task,
            version.work.settings,
            f"{version.work.run}, after round {version_number(version.work)}",
            version.work.run,
        )
        for version in version_proofs.list_verified(home / "cache", public, fleet)
    ]


def find_named_model(name: str, which: Which) -> LocalModel:
    """The best or latest version of a run or task, from the coordinator.

    Raises UnknownName, Unreachable, NotEnrolled.
    """
    from agent.setup import named_models

    path, model = named_models.fetch(homes.open_home("agent"), name, which)
    origin = f"the {which} version of {model.run}, after round {model.round}"
    return LocalModel(path, model.task, model.settings, origin, model.run)


def find_model(model: str) -> LocalModel:
    """Find `latest`, a digest or an exported file. Raises UsageError, UnknownName, NotEnrolled."""
    from protocols.model import model_card

    path = Path(model).expanduser()
    is_digest = re.fullmatch(r"[0-9a-f]{6,64}", model) and not path.exists()
    if model != LATEST and not is_digest:
        card = model_card.read(path)
        return LocalModel(path, card.task, card.settings)
    cached = local_models()
    for version in cached:
        if not is_digest or version.path.stem.startswith(model):
            return version
    if cached:
        digests = ", ".join(version.path.stem[:12] for version in cached)
        raise UnknownName(f"this agent has no version {model}", f"it has {digests}")
    raise UnknownName("this agent has no version yet", "it downloads one with its first work")
