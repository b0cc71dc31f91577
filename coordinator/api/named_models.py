"""Which version of a run an agent asks for, by the name of the run or of its task."""

from __future__ import annotations

from coordinator.api.service import CoordinatorService
from coordinator.jobs import model_refs
from protocols.errors import UnknownName
from protocols.messages.work import NamedModel


def find(service: CoordinatorService, name: str, which: str) -> NamedModel:
    """The best or latest version. Raises UnknownName, and UsageError if no version is whole."""
    if which not in ("best", "latest"):
        raise UnknownName(f"a version is best or latest, not {which!r}")
    runs = service.runs.all()
    if not any(name in (run.id, run.spec.task) for run in runs):
        raise UnknownName(f"there is no run and no task {name!r}", "commonweight run list")
    found = model_refs.resolve(runs, [f"{name}:{which}"])
    digest, run_id = found.models[0].digest, found.names[0].partition(":")[0]
    run = next(run for run in runs if run.id == run_id)
    rounds = [one for one in (*run.history, run.best) if one and one.digest == digest]
    file = service.transfer.store.version_path(digest)
    if not file.exists():
        raise UnknownName(f"the {which} version of {run.id} is no longer on the coordinator's disk")
    return NamedModel(
        run=run.id,
        round=rounds[-1].round if rounds else 0,
        task=found.task,
        digest=digest,
        nbytes=file.stat().st_size,
        settings=found.settings,
    )
