"""The models that a run of `model=auto` trains, one after the other. Pure.

Each begins with first weights and ends when it gets no better, like a run of one model. The
best version of the run is the best of all of them. Rounds are numbered through, and the first
weights of each further model have a number of their own, so no two versions of a run have the same
one.
"""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.runs import best_version, model_choice, steps
from coordinator.runs.rollback import present
from coordinator.runs.state import Candidate, Round, Run
from coordinator.storage.run_events import ModelBegun
from protocols.messages.states import RunState
from protocols.tables.model_scores import Model

#: The longest text for the ledger, in characters.
_MAX_TEXT = 400


def after(run: Run, end: steps.EndRun) -> steps.EndRun | steps.BeginModel:
    """The event after the end of the present model: the next model begins, or the run ends.

    A model that fails ends the run only if there is no version of another one.
    """
    is_failure = end.state is RunState.FAILED
    if is_failure and run.best is None:
        return end
    if run.upcoming:
        return steps.BeginModel(run.upcoming[0], end.because[:_MAX_TEXT])
    if not run.trained:
        return end
    because = f"{present(run).model}: {end.because}" if is_failure else ""
    return steps.EndRun(RunState.FINISHED, "; ".join(filter(None, (summary(run), because))))


def event(run: Run, step: steps.BeginModel) -> ModelBegun:
    """What the ledger records when the run begins this model. Raises UsageError."""
    assert run.ordered is not None, "a run of several models keeps its settings"
    first, spec = run.round + 1, model_choice.with_model(run.ordered, step.model)
    spec = replace(spec, first_round=first + 1, rounds=first + spec.rounds)
    return ModelBegun(step.model, spec, first, step.because)


def of_version(run: Run, digest: str) -> Run:
    """The run with the settings, first weights, card and last round of this version's model."""
    number = next((one.round for one in reversed(run.history) if one.digest == digest), 0)
    if run.best is not None and run.best.digest == digest:
        number = run.best.round
    if digest in ("", run.first, run.head) or number >= run.spec.first_round:
        return run
    following = run.spec
    for one in reversed(run.trained):
        if digest == one.first or number >= one.spec.first_round:
            last = following.first_round - 2
            return replace(run, spec=one.spec, first=one.first, card=one.card, round=last)
        following = one.spec
    return run


def summary(run: Run) -> str:
    """A text about the kept model and the result of each; empty without a version."""
    if run.best is None:
        return ""
    return f"{_kept(run)} is kept ({_reached(run, [*run.trained, present(run)])})"


def _kept(run: Run) -> Model:
    assert run.best is not None
    return present(of_version(run, run.best.digest)).model


def _reached(run: Run, models: list[Candidate]) -> str:
    return "; ".join(f"{one.model}: {_result(run, one)}" for one in models)


def _result(run: Run, one: Candidate) -> str:
    best = one.standing.best
    if best is None or not (shown := shown_metrics(run, best)):
        return one.because or "no version"
    return f"{shown} in round {best.round}"


def shown_metrics(run: Run, closed: Round) -> str:
    """The metrics that decide, as text: in the target's units, if there are any."""
    metrics = closed.metrics
    name = best_version.metric_of(run.spec, metrics)
    names = ["rmse"] if name == "loss" and "rmse" in metrics else [name]
    if name == "accuracy" and not run.spec.best_metric:
        names.append("loss")
    told = [(model_choice.SHOWN.get(n, n), metrics.get(n)) for n in names]
    return ", ".join(f"{shown} {value:.4g}" for shown, value in told if value is not None)


def text(run: Run) -> str:
    """The text about the model for operators and owners: the choice, or which is trained now and
    the results of those before it. Empty before a choice."""
    if run.choice is None:
        return ""
    if not (run.trained or run.upcoming):
        return model_choice.text(run.choice)
    if run.ended:
        return summary(run) or model_choice.text(run.choice)
    number, total = len(run.trained) + 1, len(run.trained) + 1 + len(run.upcoming)
    said = f"{present(run).model} now, {number} of {total}"
    return f"{said} ({_reached(run, list(run.trained))})" if run.trained else said


def text_for_owners(run: Run) -> str:
    """The same for owners. In a secure run it has no metrics, because a peer could subtract its own
    and so learn those of all others together."""
    if not (run.spec.secure and run.trained):
        return text(run)
    said, _, _ = text(run).partition(" (")
    before = [one.model for one in run.trained]
    if run.ended:
        return f"{said} (of {', '.join([*before, present(run).model])})"
    return f"{said} (after {', '.join(before)})"
