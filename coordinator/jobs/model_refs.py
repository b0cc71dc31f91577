"""Which versions a job's models are, from the words for them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coordinator.runs.export import resolve_version
from coordinator.runs.state import Run
from protocols.errors import UnknownName, UsageError
from protocols.messages.jobs import ModelRef, Setting

_HINT = "commonweight models list"


class ResolvedModels(NamedTuple):
    """Models by digest (of 0 bytes: the coordinator knows their size), and what was said of them.

    `settings` are what the task needs to know of them.
    """

    task: str
    settings: dict[str, Setting]
    models: tuple[ModelRef, ...]
    names: tuple[str, ...]


def resolve(runs: Sequence[Run], words: Sequence[str], task: str = "") -> ResolvedModels:
    """The versions that are meant: "best", "latest", RUN, RUN:latest, or a digest's beginning.

    Raises UnknownName, and UsageError for models that one task cannot use alike.
    """
    fitting = [run for run in runs if run.head and task in ("", run.spec.task)]
    if not fitting:
        of = f" of the task {task!r}" if task else ""
        raise UnknownName(f"no run{of} has a version", _HINT)
    found = [_found(fitting, word) for word in dict.fromkeys(words)]
    settings = [_settings(run) for run, _ in found]
    tasks = {run.spec.task for run, _ in found}
    if len(tasks) > 1 or any(other != settings[0] for other in settings):
        raise UsageError(
            "these models are of other tasks or settings", "one job is of one task: ask for each"
        )
    models = dict.fromkeys(digest for _, digest in found)
    if len(models) < len(found):
        raise UsageError("two of these models are the same version", "name each once")
    return ResolvedModels(
        tasks.pop(),
        settings[0],
        tuple(ModelRef(digest, 0) for digest in models),
        tuple(dict.fromkeys(words)),
    )


def _found(runs: Sequence[Run], word: str) -> tuple[Run, str]:
    if word in ("best", "latest"):
        return runs[-1], resolve_version(runs[-1], word)
    name, colon, which = word.partition(":")
    named = [run for run in runs if run.id == name]
    if named:
        return named[0], resolve_version(named[0], which if colon else "best")
    for run in reversed(runs):
        try:
            return run, resolve_version(run, word)
        except UnknownName:
            continue
    raise UnknownName(f"no run has a version {word!r}", _HINT)


def _settings(run: Run) -> dict[str, Setting]:
    shared: dict[str, Setting] = {"preprocessing": run.preprocessing} if run.preprocessing else {}
    return {**run.spec.settings, "seed": run.spec.seed, **shared}
