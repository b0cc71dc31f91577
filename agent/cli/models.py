"""Finds a shared model on this machine, for `predict`, `serve` and `export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.home import settings
from agent.home.settings import AgentSettings
from protocols.errors import CommonweightError, UnknownName, UsageError
from protocols.local import homes

if TYPE_CHECKING:
    from agent.tasks import Predicting

LATEST = "latest"


class LocalModel(NamedTuple):
    """A version of a shared model: its file, the name of its task, and the run's settings."""

    path: Path
    task: str
    settings: dict[str, Any]

    @property
    def task_settings(self) -> dict[str, Any]:
        """The settings of the task alone."""
        from protocols.model import personalization

        items = self.settings.items()
        return {key: value for key, value in items if key not in personalization.SETTINGS}

    def load_weights(self) -> Any:
        """The tensors by name. Raises CommonweightError."""
        from protocols.model import personalization, weights

        if layers := self.settings.get(personalization.PERSONAL_LAYERS):
            raise UsageError(
                f"the layers {layers} of this run stay on each peer: no model is complete"
            )
        try:
            return personalization.without_controls(weights.load(self.path))
        except OSError as err:
            raise CommonweightError(f"cannot read {self.path}: {err.strerror}") from err


def find_model(model: str) -> LocalModel:
    """Find `latest`, a digest or an exported file. Raises UsageError, UnknownName, NotEnrolled."""
    from agent.transport import version_proofs
    from protocols.model import model_card

    path = Path(model).expanduser()
    is_digest = re.fullmatch(r"[0-9a-f]{6,64}", model) and not path.exists()
    if model != LATEST and not is_digest:
        card = model_card.read(path)
        return LocalModel(path, card.task, card.settings)
    home = homes.open_home("agent")
    enrollment = settings.read_enrollment(home)
    cached = version_proofs.list_verified(home / "cache", enrollment.coordinator_public)
    for version in cached:
        if not is_digest or version.work.base.startswith(model):
            return LocalModel(version.path, version.work.task, version.work.settings)
    if cached:
        digests = ", ".join(version.work.base[:12] for version in cached)
        raise UnknownName(f"this agent has no version {model}", f"it has {digests}")
    raise UnknownName("this agent has no version yet", "it gets one with its first work")


def load_predicting_task(name: str, chosen: AgentSettings, cache: Path) -> Predicting:
    """The task `name`, ready to predict: loaded, if the owner has set data or base models.

    Raises UnknownName, TaskUnusable, and what the task's `load` raises.
    """
    from agent.tasks import Predicting, registry

    task = registry.create(name, chosen.task_files.get(name, ""), chosen.framework)
    if not isinstance(task, Predicting):
        raise UnknownName(f"the task {name} cannot predict", "its class needs a method predict")
    data = settings.data_settings(chosen, cache)
    if data.is_set:
        task.load(data)
    return task
