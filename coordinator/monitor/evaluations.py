"""How each peer last evaluated the model of a run, as operators see it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from coordinator.fleet.state import Run, finite
from coordinator.monitor.round_table import metric_value
from coordinator.remote import formatting as fmt
from coordinator.runs.best_version import DEFAULT_METRICS, lower_is_better
from coordinator.runs.comparisons import WHY_MISSING
from coordinator.runs.state import Evaluation
from protocols.messages.comparisons import Comparison

#: Metrics that say how many rows there were, and nothing about the model.
_COUNTS = frozenset({"num-examples"})


class Evaluations(NamedTuple):
    """By peer, its last evaluation in `run`.

    `compared`: by peer, what it told after the end. `withheld`: why the run has no evaluation of
    single peers; `error`: why they could not be read.
    """

    run: str = ""
    by_peer: Mapping[str, Evaluation] = {}
    compared: Mapping[str, Comparison] = {}
    withheld: str = ""
    error: str = ""


class MetricRow(NamedTuple):
    """A metric as text: of the peer, the mean over all peers in that round, and their range."""

    name: str
    own: str
    mean: str
    spread: str


def metric_names(evaluation: Evaluation) -> list[str]:
    """The metrics of an evaluation, accuracy and loss first."""
    names = [name for name in evaluation.metrics if name not in _COUNTS]
    return sorted(names, key=lambda name: (*(name != known for known in DEFAULT_METRICS), name))


def format_metric(name: str, value: float | None) -> str:
    """A metric of a model; an accuracy in percent, and None for one that is not finite."""
    number = finite(value)
    if number is None:
        return fmt.DIVERGED
    return fmt.percent(number) if name == "accuracy" else fmt.decimal(number)


def metric_rows(evaluation: Evaluation, run: Run) -> list[MetricRow]:
    """The metrics of a peer, beside those of all peers where the round is still known."""
    closed = next((one for one in run.rounds if one.round == evaluation.round), None)
    rows = []
    for name in metric_names(evaluation):
        mean, spread = fmt.NOTHING, ""
        if closed is not None and (of_all := metric_value(closed, name)) is not None:
            mean = format_metric(name, of_all)
        if closed is not None and (three := closed.spread.get(name)):
            spread = f"{format_metric(name, three[0])} to {format_metric(name, three[2])}"
        own = format_metric(name, evaluation.metrics[name])
        rows.append(MetricRow(name.replace("_", " "), own, mean, spread))
    return rows


def describe(evaluation: Evaluation) -> str:
    """`accuracy 70.1 %  loss 1.1160 · 400 rows · round 10`."""
    names = metric_names(evaluation)[: len(DEFAULT_METRICS)]
    metrics = "  ".join(f"{name} {format_metric(name, evaluation.metrics[name])}" for name in names)
    rows = f"{fmt.count(evaluation.num_examples)} rows"
    return " · ".join(filter(None, (metrics, rows, f"round {evaluation.round}")))


def describe_comparison(told: Comparison) -> str:
    """`shared recommended · accuracy: alone 70.1 %, shared 80.2 %`; or why there is none."""
    if told.missing is not None:
        return f"no comparison: {WHY_MISSING[told.missing]}"
    models = ", ".join(
        f"{model} {format_metric(told.metric, one.value)}" for model, one in told.models.items()
    )
    return f"{told.recommended} recommended · {told.metric}: {models}"


def main_metric(found: Evaluations) -> str:
    """The metric by which peers are compared; "" without one."""
    names = [name for one in found.by_peer.values() for name in metric_names(one)]
    return next((name for name in (*DEFAULT_METRICS, *names) if name in names), "")


def worst_first(found: Evaluations, metric: str) -> list[tuple[str, float | None]]:
    """Each peer with its value, the worst first; before them those whose value is not finite."""
    sign = -1.0 if lower_is_better(metric) else 1.0
    values = [
        (peer, finite(one.metrics[metric]))
        for peer, one in found.by_peer.items()
        if metric in one.metrics
    ]
    return sorted(values, key=lambda item: (item[1] is not None, sign * (item[1] or 0.0), item[0]))
