"""Checks and describes the peers' evaluations of a run, and comparisons after its end. Pure."""

from __future__ import annotations

from coordinator.runs import best_version
from coordinator.runs.state import Run
from protocols.messages.comparisons import (
    MODELS,
    Comparison,
    Estimate,
    Missing,
    Model,
    cut_text,
    recommend,
    without_numbers,
)

#: The metrics by which models are compared, beside that of the run.
_METRICS = frozenset({"accuracy", "rmse", "loss"})

WHY_MISSING: dict[Missing, str] = {
    "task": "its task cannot measure models row by row, or not with --personal as it is",
    "rows": "its held-out rows do not allow it",
    "failed": "it failed there; its owner sees why in commonweight-agent status",
}


def why_none(run: Run) -> str:
    """Why no peer has sent a comparison of a run that has ended; empty if some have."""
    if run.comparisons or not peers_of(run):
        return ""
    if run.spec.app:
        return "no comparison: only the Flower app can measure its models"
    if run.spec.secure or not run.spec.measures:
        how = "--secure" if run.spec.secure else "noise"
        return f"no comparison here: after a run with {how}, each owner alone sees it"
    return (
        "no comparison: no peer has sent one. It comes a while after the end; owners may keep it; "
        "simulated peers make none"
    )


def why_no_evaluations(run: Run) -> str:
    """Why the evaluations of single peers are not known; empty if they are."""
    if run.evaluations:
        return ""
    if run.spec.private:
        return (
            "this run adds noise to updates, so it asks no peer for an evaluation, which has none"
        )
    if run.spec.secure:
        return "this run is secure: the coordinator sees only the evaluation of all peers together"
    if any(closed.num_evaluated or closed.metrics for closed in run.history):
        return "the evaluations of single peers are not known in this run"
    return "no peer has evaluated a version of this run yet"


def peers_of(run: Run) -> frozenset[str]:
    """The peers that the run has evaluations or updates of."""
    trained = {peer for closed in run.history for peer in closed.contributors}
    return frozenset(trained | run.evaluations.keys())


def objection(run: Run, peer: str, told: Comparison) -> str:
    """Why a comparison cannot be true, or is none of this run; empty if it counts."""
    if not run.ended:
        return f"the run {run.id} has not ended"
    if run.spec.secure or not run.spec.measures:
        return "this run shows no metric of a single peer"
    if peer not in peers_of(run):
        return "this peer has no part in the run"
    if told.missing is not None:
        has_numbers = told != without_numbers(told.run, told.missing)
        return "a comparison that is missing has no numbers" if has_numbers else ""
    if told.metric not in _METRICS | {best_version.plain_name(run.spec.best_metric)}:
        return "models are not compared by this metric"
    _, held_out = run.declared.get(peer, (0, 0))
    if told.rows < 1 or (held_out and told.rows > held_out):
        return "the number of rows is not that of the peer"
    if not {"alone", "shared"} <= told.models.keys():
        return "a model is missing"
    if "blend" in told.models:
        return "a blend stays on its machine"
    if told.gains.keys() != told.models.keys() - {"shared"}:
        return "the gains are not those of the models"
    if told.recommended != recommend(told.gains):
        return "the recommended model does not follow from the gains"
    low, high = best_version.bounds_of(run.spec.task, told.metric)
    if not all(low <= one.low <= one.value <= one.high <= high for one in told.models.values()):
        return "a metric is out of its bounds"
    if not all(one.low <= one.value <= one.high for one in told.gains.values()):
        return "a gain is not within its interval"
    return ""


def line(name: str, told: Comparison) -> str:
    """A line about a peer for people."""
    if told.missing is not None:
        return f"{name}: no comparison: {WHY_MISSING[told.missing]}"
    models = ", ".join(
        f"{model} {_estimate(one)}" for model, one in sorted(told.models.items(), key=_order)
    )
    cut = f"; {cut_text(told)}" if told.cut else ""
    said = f"{name}: {told.recommended} is recommended; {told.metric}: {models}"
    return f"{said} ({told.rows} rows){cut}"


def _order(item: tuple[Model, Estimate]) -> int:
    return MODELS.index(item[0])


def _estimate(one: Estimate) -> str:
    return f"{one.value:.4g} [{one.low:.4g}, {one.high:.4g}]"
