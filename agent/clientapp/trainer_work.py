"""The work of a run as work for the trainer. Pure."""

from __future__ import annotations

from pathlib import Path

from agent.clientapp import secure_rules
from agent.home.run_state import RunStatePaths
from agent.tasks import Setting
from agent.tasks.work import Describe, Evaluate, Init, Train
from protocols.messages.work import Work


def describe(work: Work) -> Describe:
    """To describe this peer's data and model."""
    return Describe(task=work.task, settings=_settings(work))


def of(
    work: Work, base: Path, out: Path, personal: RunStatePaths | None
) -> Init | Train | Evaluate:
    """First weights, training or an evaluation from `base`; weights go to `out`.

    `personal`: the files of the peer's own part of the model, if the run has one.
    """
    settings, state = _settings(work), str(personal.file) if personal else ""
    if work.kind == "init":
        return Init(task=work.task, settings=dict(work.settings), seed=work.seed, out=str(out))
    if work.kind == "evaluate":
        return Evaluate(
            task=work.task,
            settings=settings,
            base=str(base),
            personal=state,
            masked=secure_rules.is_secure(work),
        )
    return Train(
        task=work.task,
        settings=settings,
        base=str(base),
        out=str(out),
        personal=state,
        personal_out=str(personal.next) if personal else "",
        masked=secure_rules.is_secure(work),
    )


def _settings(work: Work) -> dict[str, Setting]:
    """The run's settings with seed and round added. The model's rounds count from 1."""
    return {**work.settings, "seed": work.seed, "round": max(0, work.round - work.begun)}
