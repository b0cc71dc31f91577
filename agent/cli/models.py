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
from protocols.messages.envelope import Settings
from protocols.messages.work import Which
from protocols.tables.model_scores import kind_of

LATEST = "latest"


class Use(StrEnum):
    """Which model of a run: the one that is recommended here, or the shared one."""

    RECOMMENDED = "recommended"
    SHARED = "shared"


#: An option of commands that use the model of a run.
UseOption = Annotated[
    Use,
    typer.Option(
        help="recommended: the shared model, or a blend or a model of this machine's rows if the "
        "comparison after the run found it better here; shared."
    ),
]


class LocalModel(NamedTuple):
    """A version of a shared model: its file, the name of its task, and the run's settings.

    `origin`: which version it is, if that is known; `run`: its run. `digest`: of a version; empty
    for a file, and for a model that was trained here alone. `is_blend`: a mean of several models.
    """

    path: Path
    task: str
    settings: dict[str, Any]
    origin: str = ""
    run: str = ""
    digest: str = ""
    is_blend: bool = False

    @property
    def kind(self) -> str:
        """The kind of model, such as trees or blend; empty if it is not of a table."""
        return "blend" if self.is_blend else kind_of(self.task, self.settings) or ""

    @property
    def title(self) -> str:
        """Which model it is, for people."""
        if self.is_blend:
            return f"a blend of models of the task {self.task}"
        kind = f", model {self.kind}" if self.kind else ""
        return f"{self.digest[:12] or self.path.stem[:12]} of the task {self.task}{kind}"

    def recommended(self, use: Use) -> LocalModel:
        """The model of the same run that is recommended on this machine, or the shared one, as
        `use` says. Returns this object if the machine has no other file.

        Raises UnknownName if the shared one is damaged on this disk."""
        if not self.run:
            return self
        wanted: Model | None = "shared" if use is Use.SHARED else None
        home = homes.home_path("agent")
        found = own_results.recommended(home, self.run, wanted)
        if found is None:
            better = own_results.text_of_better(home, self.run, self.digest)
            return self._replace(origin=f"{self.origin}{better}") if better else self
        if found.model == "shared":
            best = _best_version(found)
            if _is_intact(best):
                return best
            if best.digest == self.digest:
                return self
            raise _damaged(best)
        is_blend = found.model == "blend"
        origin = f"the {'blend' if is_blend else f'{found.model} model'} of {self.run}"
        if use is Use.RECOMMENDED:
            origin += ", which is recommended on this machine; for the shared one: --use shared"
        return LocalModel(
            found.path,
            self.task,
            _to_predict(found.settings),
            origin,
            self.run,
            is_blend=is_blend,
        )

    def exportable(self, use: Use) -> LocalModel:
        """As `recommended`, with the shared model in place of a blend, which has no other form."""
        found = self.recommended(use)
        if not found.is_blend:
            return found
        shared = self.recommended(Use.SHARED)
        origin = shared.origin or f"the newest version of {shared.run} here"
        return shared._replace(origin=f"{origin}; a blend, which predicts here, cannot be written")

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


def _to_predict(settings: Settings) -> Settings:
    """The settings of a run without those of its training alone."""
    from protocols.model import personalization
    from protocols.privacy import private_training

    of_training = personalization.SETTINGS | private_training.SETTINGS
    return {key: value for key, value in settings.items() if key not in of_training}


def _best_version(found: own_results.ModelFile) -> LocalModel:
    """The best version of a run that has ended."""
    result = found.result
    origin = f"the best version of {result.run}, after round {result.round}"
    origin += f": {result.choice}" if result.choice else ""
    settings = _to_predict(found.settings)
    return LocalModel(found.path, result.task, settings, origin, result.run, result.digest)


def local_models() -> list[LocalModel]:
    """The verified versions on this machine, the newest first, then the best versions of runs that
    have ended, which are verified when they are used. Raises NotEnrolled."""
    from agent.transport import version_proofs
    from protocols.p2p.gossip import version_number

    home = homes.open_home("agent")
    enrollment = enrollment_file.read_enrollment(home)
    public, fleet = enrollment.coordinator_public, enrollment.fleet
    cached = [
        LocalModel(
            version.path,
            version.work.task,
            version.work.settings,
            f"{version.work.run}, after round {version_number(version.work)}",
            version.work.run,
            version.work.base,
        )
        for version in version_proofs.list_verified(home / "cache", public, fleet)
    ]
    known = {one.digest for one in cached}
    best = (_best_version(found) for found in own_results.best_versions(home))
    return cached + [one for one in best if one.digest not in known]


def _is_intact(version: LocalModel) -> bool:
    """True for a version with the bytes of its digest. One whose file has the name of its digest is
    from the cache, and `local_models` has verified it."""
    from protocols.model.weights import file_digest

    return version.path.stem == version.digest or file_digest(version.path) == version.digest


def _damaged(version: LocalModel) -> UnknownName:
    return UnknownName(
        f"the version {version.digest[:12]} is damaged on this disk",
        f"use the coordinator's: --run {version.run}",
    )


def find_named_model(name: str, which: Which) -> LocalModel:
    """The best or latest version of a run or task, from the coordinator.

    Raises UnknownName, Unreachable, NotEnrolled.
    """
    from agent.setup import named_models

    path, model = named_models.fetch(homes.open_home("agent"), name, which)
    origin = f"the {which} version of {model.run}, after round {model.round}"
    origin += f": {model.choice}" if model.choice and which == "best" else ""
    return LocalModel(path, model.task, model.settings, origin, model.run, model.digest)


def find_model(model: str) -> LocalModel:
    """Find `latest`, a digest or an exported file. Raises UsageError, UnknownName, NotEnrolled."""
    from protocols.model import model_card

    path = Path(model).expanduser()
    is_digest = re.fullmatch(r"[0-9a-f]{6,64}", model) and not path.exists()
    if model != LATEST and not is_digest:
        card = model_card.read(path)
        return LocalModel(path, card.task, card.settings)
    known = local_models()
    wanted = [one for one in known if not is_digest or one.digest.startswith(model)]
    for version in wanted:
        if _is_intact(version):
            return version
    if wanted:
        raise _damaged(wanted[0])
    if known:
        digests = ", ".join(version.digest[:12] for version in known)
        raise UnknownName(f"this agent has no version {model}", f"it has {digests}")
    raise UnknownName("this agent has no version yet", "it downloads one with its first work")
