"""When a run ends, and when one of its models does. Pure."""

from __future__ import annotations

from coordinator.runs import best_version, steps
from coordinator.runs.state import Run
from protocols.messages.states import RunState


def of_run(run: Run) -> steps.EndRun | None:
    """The end of a run that has done its only part, is good enough, lacks its metric, or has spent
    its ε."""
    if _only_part_is_done(run):
        return steps.EndRun(RunState.FINISHED, f"its only part is done: {run.spec.only}")
    if _rounds_are_done(run) and not run.trained and not run.upcoming:
        return of_model(run)
    return _early_stop(run) or _budget_end(run)


def of_model(run: Run) -> steps.EndRun | None:
    """The end of a model whose rounds are done, or that gets no better."""
    if _rounds_are_done(run):
        done = run.spec.rounds - run.begun
        return steps.EndRun(RunState.FINISHED, f"all {done} rounds are done")
    return _lost_patience(run)


def _rounds_are_done(run: Run) -> bool:
    return run.round >= run.spec.rounds and run.spec.only != "evaluate"


def _only_part_is_done(run: Run) -> bool:
    """True if the run has the single part that was requested (`RunSpec.only`)."""
    done = {"describe": run.card is not None, "init": bool(run.head)}
    return bool(run.spec.only) and done.get(run.spec.only, bool(run.history))


def _early_stop(run: Run) -> steps.EndRun | None:
    """The end of a run that is good enough, or lacks its metric."""
    spec, best = run.spec, run.best
    last = run.history[-1] if run.history else None
    if last is None or best is None or not last.metrics:
        return None
    name = best_version.metric_of(spec, last.metrics)
    if not name and (spec.best_metric or spec.patience or spec.target is not None):
        wanted = spec.best_metric or " or ".join(best_version.DEFAULT_METRICS)
        reported = ", ".join(sorted(last.metrics))
        because = f"no peer reports the metric {wanted}; they report: {reported}"
        return steps.EndRun(RunState.FAILED, because)
    deciding = best_version.decisive(best)
    if best_version.reaches_target(spec, deciding):
        because = f"{name} is {deciding[name]:.4g} in round {best.round}"
        return steps.EndRun(RunState.FINISHED, because)
    return None


def _lost_patience(run: Run) -> steps.EndRun | None:
    """The end of a model that gets no better; of one of several also if no evaluation succeeds."""
    spec, best = run.spec, run.standing.best
    if not spec.patience or best is None:
        return None
    metrics = run.own_rounds[-1].metrics
    if run.round - run.standing.gained < spec.patience or not (metrics or run.ordered):
        return None
    name = best_version.metric_of(spec, metrics) or "metric"
    or_loss = " or loss" if not spec.best_metric and name != "loss" else ""
    because = f"no better {name}{or_loss} in {spec.patience} rounds; best is round {best.round}"
    return steps.EndRun(RunState.FINISHED, because)


def _budget_end(run: Run) -> steps.EndRun | None:
    """The end of a run whose versions have cost their ε, as rounds were repeated."""
    allowed = run.spec.private_versions
    if allowed is None or run.num_spent < allowed.rounds:
        return None
    repeated = run.num_spent - len(run.history)
    because = f"its ε of {allowed.epsilon:g} is spent: {repeated} of its rounds were repeated"
    return steps.EndRun(RunState.FINISHED, because)
