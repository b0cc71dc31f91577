"""Resolves names of models, such as "best" or RUN:latest, to versions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coordinator import strategies
from coordinator.runs.export import resolve_version
from coordinator.runs.state import Run
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

    RUN is the id of a run, or a task: then its newest run, whose id is in `names`.

    Raises UnknownName, and UsageError for models of several tasks or settings, and for those of a
    run whose peers keep some layers.
    """
    candidates = [run for run in runs if run.head and task in ("", run.spec.task)]
    if not candidates:
        of_task = f" of the task {task!r}" if task else ""
        raise UnknownName(f"no run{of_task} has a version", _HINT)
    asked = [_full_name(candidates, name) for name in dict.fromkeys(names)]
    found = [_resolve(candidates, name) for name in asked]
    for run, _ in found:
        check_whole(run)
    (task, settings), *others = [(run.spec.task, settings_of(run)) for run, _ in found]
    if any(other != (task, settings) for other in others):
        raise UsageError(
            "these models have different tasks or settings", "start one job for each of them"
        )
    digests = dict.fromkeys(digest for _, digest in found)
    if len(digests) < len(found):
        raise UsageError("two of these models are the same version", "name each version once")
    return ResolvedModels(task, settings, tuple(ModelRef(d, 0) for d in digests), tuple(asked))


def check_whole(run: Run) -> None:
    """Raise UsageError if a part of the run's model stays on each peer."""
    own = strategies.find(run.spec.strategy).trainer_settings(run.spec.strategy_args)
    if layers := own.get(personalization.PERSONAL_LAYERS):
        raise UsageError(
            f"the layers {layers} of run {run.id} stay on each peer: no version is a whole model",
            "choose the model of a run with another --strategy",
        )


def _full_name(runs: Sequence[Run], name: str) -> str:
    """The name with the id of the newest run in place of its task, if it is a task."""
    start, colon, which = name.partition(":")
    of_task = [run.id for run in runs if run.spec.task == start]
    known = {"best", "latest", *(run.id for run in runs)}
    return f"{of_task[-1]}{colon}{which}" if of_task and start not in known else name


def _resolve(runs: Sequence[Run], name: str) -> tuple[Run, str]:
    if name in ("best", "latest"):
        return runs[-1], resolve_version(runs[-1], name)
    run_id, colon, which = name.partition(":")
    for run in runs:
        if run.id == run_id:
            return run, resolve_version(run, which if colon else "best")
    for run in reversed(runs):
        try:
            return run, resolve_version(run, name)
        except UnknownName:
            continue
    raise UnknownName(f"no run has a version {name!r}", _HINT)


def settings_of(run: Run) -> dict[str, Setting]:
    """What the task needs to know in order to use a model of this run."""
    shared: dict[str, Setting] = {"preprocessing": run.preprocessing} if run.preprocessing else {}
    return {**run.spec.settings, "seed": run.spec.seed, **shared}
