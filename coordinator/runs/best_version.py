"""What makes one version better than another, and which peer is served worst. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from coordinator.storage.run_events import RunSpec, Update
from protocols.errors import UnknownName
from protocols.messages.envelope import Metrics

#: What makes a version best where nothing else was asked for: the first of these that is told, as
#: it is with each peer's own layers where there are such.
DEFAULT_METRICS = ("accuracy", "loss")
#: Of metrics with one of these as their last word less is better; of all others more is.
_LOWER_IS_BETTER = frozenset(
    {"loss", "error", "mae", "mse", "rmse", "ece", "perplexity", "distance"}
)
_CLASSIFICATION = frozenset({"accuracy", "balanced_accuracy", "ece", "loss", "macro_f1"})
_REGRESSION = frozenset({"loss", "mae", "mse", "r2", "rmse"})
#: What the built-in tasks tell of a version. What a task of one's own tells, only its peers know.
TASK_METRICS: Mapping[str, frozenset[str]] = {
    "images": _CLASSIFICATION,
    "lora": _CLASSIFICATION,
    "mnist": _CLASSIFICATION,
    "motion": _CLASSIFICATION,
    "ping": frozenset(),
    "tabular": _CLASSIFICATION | _REGRESSION,
    "text-lm": frozenset({"accuracy", "loss"}),
}
_KINDS = {"classification": _CLASSIFICATION, "regression": _REGRESSION}
#: Begins what a peer tells of a model with its own layers in it (FedBN).
_PERSONAL = "personal_"
_DEFAULT_ORDER = tuple(prefix + name for name in DEFAULT_METRICS for prefix in (_PERSONAL, ""))


def check(spec: RunSpec) -> None:
    """Raises UnknownName where a version would be chosen by a metric that the task never tells."""
    if spec.task not in TASK_METRICS:
        return
    known = TASK_METRICS[spec.task]
    if spec.task == "tabular":
        known = _KINDS.get(str(spec.settings.get("kind", "")), known)
    if spec.best_metric and spec.best_metric.removeprefix(_PERSONAL) in known:
        return
    if not spec.best_metric and (known or (spec.target is None and not spec.patience)):
        return
    asked = spec.best_metric or " or ".join(DEFAULT_METRICS)
    told = ", ".join(sorted(known)) or "it has none"
    raise UnknownName(f"the task {spec.task} tells no metric {asked!r}", f"its metrics: {told}")


def lower_is_better(name: str) -> bool:
    return name.lower().replace("-", "_").split("_")[-1] in _LOWER_IS_BETTER


def metric_of(spec: RunSpec, metrics: Metrics) -> str:
    """The metric by which this run's versions are compared; empty if none is told."""
    names = (spec.best_metric,) if spec.best_metric else _DEFAULT_ORDER
    return next((name for name in names if name in metrics), "")


def score(spec: RunSpec, metrics: Metrics) -> float:
    """More is better; minus infinity for a version of which nothing, or no number, is told."""
    name = metric_of(spec, metrics)
    value = metrics.get(name)
    if value is None:
        return -math.inf
    return _signed(spec, name, value)


def reaches_target(spec: RunSpec, metrics: Metrics) -> bool:
    """True if these metrics are as good as `spec.target`."""
    if spec.target is None:
        return False
    return score(spec, metrics) >= _signed(spec, metric_of(spec, metrics), spec.target)


def _signed(spec: RunSpec, name: str, value: float) -> float:
    less = lower_is_better(name) if not spec.best_direction else spec.best_direction == "min"
    return -value if less else value


def worst_peers(answers: Mapping[str, Update]) -> dict[str, str]:
    """By metric the peer that is served worst, the first in name order among equals."""
    found: dict[str, tuple[float, str]] = {}
    for peer, answer in sorted(answers.items()):
        for name, value in answer.metrics.items():
            if value is None or not math.isfinite(value):
                continue
            bad = value if lower_is_better(name) else -value
            if name not in found or bad > found[name][0]:
                found[name] = (bad, peer)
    return {name: peer for name, (_, peer) in found.items()}
