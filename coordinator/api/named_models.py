"""Finds the version that an agent requests by the name of a run or of its task."""

from __future__ import annotations

from coordinator.api.service import CoordinatorService
from coordinator.jobs import model_refs
from coordinator.runs import best_version, candidates, messages
from coordinator.runs.export import resolve_version
from coordinator.runs.recorded import named_run
from coordinator.strategies import personal
from protocols.errors import UnknownName
from protocols.messages.states import ENDED
from protocols.messages.work import NamedModel
from protocols.model.personalization import PERSONAL_LAYERS


def find(service: CoordinatorService, name: str, which: str) -> NamedModel:
    """The best or latest version. Raises UnknownName, and UsageError for a Flower app.

    The settings name the layers that are in no version.
    """
    if which not in ("best", "latest"):
        raise UnknownName(f"a version is best or latest, not {which!r}")
    try:
        run = named_run(filter(model_refs.has_version, service.runs.all()), name)
    except UnknownName as err:
        raise UnknownName(
            f"there is no run and no task {name!r} with a version", "commonweight run list"
        ) from err
    model_refs.check_task(run)
    digest = resolve_version(run, which)
    choice = messages.owners_text(run) if run.ordered is not None else ""
    run = candidates.of_version(run, digest)
    rounds = [one for one in (*run.history, run.best) if one and one.digest == digest]
    layers = model_refs.local_layers(run)
    file = service.transfer.store.version_path(digest)
    if not file.exists():
        raise UnknownName(f"the {which} version of {run.id} is no longer on the coordinator's disk")
    return NamedModel(
        run=run.id,
        round=rounds[-1].round if rounds else 0,
        task=run.spec.task,
        digest=digest,
        nbytes=file.stat().st_size,
        settings=model_refs.settings_of(run) | ({PERSONAL_LAYERS: layers} if layers else {}),
        ended_rounds=run.round - run.begun if run.state in ENDED else 0,
        personal_mu=personal.mu_of(run.spec),
        metric=best_version.plain_name(run.spec.best_metric),
        lower_is_better=best_version.is_lower_better(run.spec, run.spec.best_metric),
        choice=choice,
    )
