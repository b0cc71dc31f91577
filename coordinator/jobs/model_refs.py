"""Resolves names of models, such as "best" or RUN:latest, to versions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coordinator.runs import candidates
from coordinator.runs.export import resolve_version
from coordinator.runs.recorded import named_run
from coordinator.runs.state import Run
from coordinator.strategies import personal
from protocols.errors import UnknownName, UsageError
from protocols.messages.envelope import Setting
from protocols.messages.jobs import ModelRef
from protocols.model import personalization

_HINT = "commonweight models list"


class ResolvedModels(NamedTuple):
    """Models by digest, the names that they were given, and their task with its settings.

    Their size is 0 here: the coordinator knows it.
    """

    task: str
    settings: dict[str, Setting]
    models: tuple[ModelRef, ...]
    names: tuple[str, ...]


def resolve(runs: Sequence[Run], names: Sequence[str], task: str = "") -> ResolvedModels:
    """The versions for "best", "latest", RUN, RUN:latest, or the start of a digest.

    RUN is the id of a run, or a task: then its newest run with a version, whose id is in `names`.

    Raises UnknownName, and UsageError for models of several tasks or settings, and for those of a
    run whose peers keep some layers.
    """
    known = [run for run in runs if has_version(run) and task in ("", run.spec.task)]
    if not known:
        of_task = f" of the task {task!r}" if task else ""
        raise UnknownName(f"no run{of_task} has a version", _HINT)
    found = [_resolve(known, name) for name in dict.fromkeys(names)]
    for run, _, _ in found:
        check_whole(run)
    (task, settings), *others = [
        (run.spec.task, settings_of(candidates.of_version(run, digest))) for run, digest, _ in found
    ]
    if any(other != (task, settings) for other in others):
        raise UsageError(
            "these models have different tasks or settings", "start one job for each of them"
        )
    digests = dict.fromkeys(digest for _, digest, _ in found)
    if len(digests) < len(found):
        raise UsageError("two of these models are the same version", "name each version once")
    names = tuple(name for _, _, name in found)
    return ResolvedModels(task, settings, tuple(ModelRef(d, 0) for d in digests), names)


def has_version(run: Run) -> bool:
    """True if the run has made a version, or has first weights."""
    return bool(run.head or run.best)


def check_task(run: Run) -> None:
    """Raise UsageError if the run is not of a task."""
    if run.spec.app:
        raise UsageError(
            f"run {run.id} is of a Flower app, and only the app can use its model",
            f"commonweight models export {run.id} model.safetensors",
        )


def local_layers(run: Run) -> str:
    """The layers that stay on each peer, as patterns; empty if a version is a whole model."""
    return str(personal.trainer_settings(run.spec).get(personalization.PERSONAL_LAYERS, ""))


def check_whole(run: Run) -> None:
    """Raise UsageError if the run's versions are not whole models of a task."""
    check_task(run)
    if layers := local_layers(run):
        raise UsageError(
            f"the layers {layers} of run {run.id} stay on each peer: no version is a whole model",
            "choose the model of a run with another --strategy",
        )


def _resolve(runs: Sequence[Run], name: str) -> tuple[Run, str, str]:
    """A run, the digest of its version, and the name with the id of the run in it."""
    if name in ("best", "latest"):
        return runs[-1], resolve_version(runs[-1], name), name
    start, _, which = name.rpartition(":")  # the name of a task may have a colon
    for run_name, asked in ((name, ""), (start, which)):
        try:
            run = named_run(runs, run_name) if run_name else None
        except UnknownName:
            continue
        if run is not None:
            full = f"{run.id}:{asked}" if asked else run.id
            return run, resolve_version(run, asked or "best"), full
    for run in reversed(runs):
        try:
            return run, resolve_version(run, name), name
        except UnknownName:
            continue
    raise UnknownName(f"no run has a version {name!r}", _HINT)


def settings_of(run: Run) -> dict[str, Setting]:
    """What the task needs to know in order to use a model of this run, which is that of the
    version (`candidates.of_version`)."""
    shared: dict[str, Setting] = {"preprocessing": run.preprocessing} if run.preprocessing else {}
    return {**run.spec.settings, "seed": run.spec.seed, **shared}
