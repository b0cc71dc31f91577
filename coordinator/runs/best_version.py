"""Which version is the best, and which peer has the worst metrics. Pure."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from coordinator.runs.state import Round, Standing
from coordinator.storage.run_events import RunSpec, Update
from protocols.errors import UnknownName
from protocols.messages.envelope import Metrics

#: The metrics that decide by default: the first that the peers report.
DEFAULT_METRICS = ("accuracy", "loss")
#: Lower is better for metrics whose last word is one of these; for all others, higher is better.
_LOWER_IS_BETTER = frozenset(
    {"loss", "error", "mae", "mse", "rmse", "ece", "perplexity", "distance"}
)
#: A model whose loss at the peers in the middle is more than this times the least one is not kept.
MAX_MIDDLE_LOSS = 1.25
_TWO_CLASSES = frozenset({"auc", "average_precision"})
_SHARES = frozenset({"accuracy", "balanced_accuracy", "ece", "macro_f1"}) | _TWO_CLASSES
_CLASSIFICATION = frozenset({"accuracy", "balanced_accuracy", "ece", "loss", "macro_f1"})
_REGRESSION = frozenset({"loss", "mae", "mse", "r2", "rmse"})
#: The metrics of the built-in tasks. Those of custom tasks are known to their peers only.
TASK_METRICS: Mapping[str, frozenset[str]] = {
    "images": _CLASSIFICATION | _TWO_CLASSES,
    "lora": _CLASSIFICATION | _TWO_CLASSES,
    "mnist": _CLASSIFICATION,
    "motion": _CLASSIFICATION,
    "ping": frozenset(),
    "tabular": _CLASSIFICATION | _TWO_CLASSES | _REGRESSION,
    "text-lm": frozenset({"accuracy", "loss"}),
}
_KINDS = {"classification": _CLASSIFICATION | _TWO_CLASSES, "regression": _REGRESSION}
_NOT_NEGATIVE = frozenset({"loss", "mae", "mse", "rmse"})
#: Prefix of the metrics of a model with the peer's own layers in it (FedBN).
_PERSONAL = "personal_"
_DEFAULT_ORDER = tuple(prefix + name for name in DEFAULT_METRICS for prefix in (_PERSONAL, ""))


def check(spec: RunSpec) -> None:
    """Raise UnknownName if the task does not report the metric that is to decide."""
    if spec.task not in TASK_METRICS:
        return
    known = TASK_METRICS[spec.task]
    if spec.task == "tabular":
        known = _KINDS.get(str(spec.settings.get("kind", "")), known)
    if spec.best_metric and plain_name(spec.best_metric) in known:
        return
    if not spec.best_metric and (known or (spec.target is None and not spec.patience)):
        return
    wanted = spec.best_metric or " or ".join(DEFAULT_METRICS)
    known_names = ", ".join(sorted(known)) or "it has none"
    raise UnknownName(
        f"the task {spec.task} reports no metric {wanted!r}", f"its metrics: {known_names}"
    )


def plain_name(metric: str) -> str:
    """The name of a metric without the mark of a peer's own layers."""
    return metric.removeprefix(_PERSONAL)


def lower_is_better(name: str) -> bool:
    return name.lower().replace("-", "_").split("_")[-1] in _LOWER_IS_BETTER


def bounds_of(task: str, metric: str) -> tuple[float, float]:
    """The least and the greatest value that a metric can have.

    An accuracy is a share in every task. The other metrics are known of the built-in tasks only: a
    loss of a custom task may be negative.
    """
    name = plain_name(metric)
    if name == "accuracy" or (task in TASK_METRICS and name in _SHARES):
        return 0.0, 1.0
    if task in TASK_METRICS and name in _NOT_NEGATIVE:
        return 0.0, math.inf
    return -math.inf, 1.0 if task in TASK_METRICS and name == "r2" else math.inf


def metric_of(spec: RunSpec, metrics: Metrics) -> str:
    """The metric by which this run's versions are compared; empty if the peers reported none."""
    names = (spec.best_metric,) if spec.best_metric else _DEFAULT_ORDER
    return next((name for name in names if name in metrics), "")


def decisive(closed: Round) -> Metrics:
    """The metrics of a round by which versions are compared: of the peers in the middle, if there
    are enough (`outlier_limits.decisive_metrics`)."""
    return {**closed.metrics, **closed.decisive}


def _judged(spec: RunSpec, closed: Round) -> Metrics:
    """The metrics by which the versions of a model are compared. Without a limit on outliers, as
    trees have none, these are the means of all peers."""
    return decisive(closed) if spec.outlier_limit else closed.metrics


def score(spec: RunSpec, metrics: Metrics) -> float:
    """How good a version is: higher is better, -inf without a finite metric."""
    name = metric_of(spec, metrics)
    value = metrics.get(name)
    return -math.inf if value is None else _signed(spec, name, value)


def standing(spec: RunSpec, rounds: Iterable[Round]) -> Standing:
    """How the versions of these rounds compare.

    Without metrics, as in a run with noise, the last is the best. Among equals it is the first, or
    with the accuracy by default, which is the same for many versions where few rows are held out,
    that with the lowest loss (`RunSpec.ties`).
    """
    return functools.reduce(functools.partial(after, spec), rounds, Standing())


def after(spec: RunSpec, before: Standing, closed: Round) -> Standing:
    """How the versions compare with one more.

    A version is a gain if it is better than all before; by default one with a lower loss counts as
    well, as an accuracy over few rows stays the same while a model learns.
    """
    if before.best is None or before.peak is None or not spec.measures:
        loss = _loss(_judged(spec, closed))
        low = loss if math.isfinite(loss) else None
        return Standing(best=closed, peak=closed, loss=low, gained=closed.round)
    peak = _best_exactly(spec, (before.peak, closed))
    lower, loss = before.loss, _loss(_judged(spec, closed))
    is_gain = peak is closed or (not spec.best_metric and loss < _or_infinite(lower))
    return Standing(
        best=_best(spec, (before.best, closed), peak),
        peak=peak,
        loss=min(loss, _or_infinite(lower)) if math.isfinite(loss) else lower,
        gained=closed.round if is_gain else before.gained,
    )


def of_models(spec: RunSpec, models: Sequence[Standing]) -> Round | None:
    """The best version of several models, in the order in which they were trained. `spec`: the
    settings that they have in common.

    Only the best version of each counts, as the highest accuracy of many versions says little. By
    default the mean over all held-out rows decides, since of three peers the one in the middle has
    few rows; but no model counts that the peers in the middle find much worse.
    """
    bests = [one.best for one in models if one.best is not None]
    if len(bests) < 2:
        return bests[0] if bests else None
    if not spec.best_metric:
        losses = [_loss(decisive(one)) for one in bests]
        if math.isfinite(min(losses)):
            most, right = MAX_MIDDLE_LOSS * min(losses), max(map(_accuracy, bests))
            both = zip(bests, losses, strict=True)
            bests = [one for one, loss in both if loss <= most or _accuracy(one) >= right]
            spec = replace(spec, outlier_limit=0.0)
    return _best(spec, bests, _best_exactly(spec, bests))


def _best(spec: RunSpec, rounds: Sequence[Round], peak: Round) -> Round:
    """The best of these rounds. `peak`: the one that is best by the metric alone, among more."""
    if _has_near_ties(spec, peak):
        accuracy = score(spec, _judged(spec, peak))
        variance = max(0.0, accuracy * (1 - accuracy)) / max(1, peak.num_evaluated)
        least = accuracy - math.sqrt(variance)
        if near := [one for one in rounds if score(spec, _judged(spec, one)) >= least]:
            return min(near, key=lambda one: _loss(_judged(spec, one)))
    return _best_exactly(spec, rounds)


def _has_near_ties(spec: RunSpec, closed: Round) -> bool:
    metrics = _judged(spec, closed)
    is_usual = not spec.best_metric and metric_of(spec, metrics) == "accuracy"
    return spec.ties != "exact" and is_usual and math.isfinite(_loss(metrics))


def _best_exactly(spec: RunSpec, rounds: Sequence[Round]) -> Round:
    def rank(closed: Round) -> tuple[float, float]:
        metrics = _judged(spec, closed)
        return score(spec, metrics), 0.0 if spec.best_metric else -_loss(metrics)

    return max(rounds, key=rank)


def _accuracy(closed: Round) -> float:
    """The accuracy at the peers in the middle; NaN without one, so that the loss alone counts."""
    value = decisive(closed).get("accuracy")
    return math.nan if value is None else value


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _loss(metrics: Metrics) -> float:
    """The loss; infinite without a finite one."""
    value = metrics.get("loss")
    return value if value is not None and math.isfinite(value) else math.inf


def reaches_target(spec: RunSpec, metrics: Metrics) -> bool:
    """True if these metrics are at least as good as `spec.target`."""
    if spec.target is None:
        return False
    return score(spec, metrics) >= _signed(spec, metric_of(spec, metrics), spec.target)


def is_lower_better(spec: RunSpec, name: str) -> bool:
    """True if versions of this run are better with a lower value of the metric."""
    return lower_is_better(name) if not spec.best_direction else spec.best_direction == "min"


def _signed(spec: RunSpec, name: str, value: float) -> float:
    return -value if is_lower_better(spec, name) else value


def worst_peers(updates: Mapping[str, Update]) -> dict[str, str]:
    """By metric, the peer with the worst finite value, the first in name order among equals."""
    worst: dict[str, tuple[float, str]] = {}
    for peer, update in sorted(updates.items()):
        for name, value in update.metrics.items():
            if value is None or not math.isfinite(value):
                continue
            badness = value if lower_is_better(name) else -value
            if name not in worst or badness > worst[name][0]:
                worst[name] = (badness, peer)
    return {name: peer for name, (_, peer) in worst.items()}
