"""Intervals for metrics of several models on the same rows, by the bootstrap over rows. Pure.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentile intervals.
All models are drawn with the same rows, so that the difference of two of them is a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from protocols.messages.comparisons import Comparison, Estimate, Model, has_bounds, recommend
from protocols.tables import evaluation_counts

Floats = npt.NDArray[np.float64]
#: By name, one number for each row.
RowMetrics = Mapping[str, Floats]

#: Samples of rows; fewer for many rows, where intervals are narrow anyway.
SAMPLES, _MIN_SAMPLES, _MAX_DRAWS = 1000, 200, 50_000_000
_BLOCK = 4_000_000
_SEED = 20_260_101
#: Metrics that are no means over rows, by the numbers of each row that they are computed from
#: beside its class: that of the prediction, or the log-odds of the second of two classes.
_NO_MEANS = {
    "guess": frozenset({"balanced_accuracy", "macro_f1"}),
    "log_odds": frozenset({"auc", "average_precision"}),
}
#: Numbers of rows that are no metrics.
_PARTS = frozenset({"class", *_NO_MEANS})


def compare(
    run: str,
    rows: Mapping[Model, RowMetrics],
    rounds: Mapping[Model, int],
    metric: str = "",
    *,
    lower_is_better: bool = False,
) -> Comparison | None:
    """The comparison; None if a metric is not finite on some row, or too large for a message.

    The metric is that of the run, if the rows have what it needs. By default it is the accuracy,
    else the root of the mean of "mse", else the loss.
    """
    known = set.intersection(*(set(of) for of in rows.values()))
    part = next((part for part, of in _NO_MEANS.items() if metric in of and part in known), "")
    means = known - _PARTS | ({"rmse"} if "mse" in known else set())
    name = metric
    if not part and metric not in means:
        name = next(name for name in ("accuracy", "mse", "loss") if name in known)
        name, lower_is_better = "rmse" if name == "mse" else name, name != "accuracy"
    column = part or ("mse" if name == "rmse" else name)
    values = np.stack([rows[model][column] for model in rows])
    if not np.isfinite(values).all():
        return None
    if part:
        exact, drawn = _resampled_counts(rows["shared"]["class"], values, part, name)
    else:
        exact, drawn = values.mean(1), _resampled_means(values)
    if column == "mse" and name == "rmse":
        exact, drawn = np.sqrt(exact), np.sqrt(drawn)
    if not np.isfinite(exact).all():  # such as a class that no held-out row has
        return compare(run, rows, rounds)
    sign = -1.0 if lower_is_better else 1.0
    models = {model: _estimate(exact[at], drawn[:, at]) for at, model in enumerate(rows)}
    if name == "accuracy":
        models = {model: _of_share(one.value, values.shape[1]) for model, one in models.items()}
    base = list(rows).index("shared")
    gains: dict[Model, Estimate] = {
        model: _estimate(sign * (exact[at] - exact[base]), sign * (drawn[:, at] - drawn[:, base]))
        for at, model in enumerate(rows)
        if at != base
    }
    found = Comparison(
        run=run,
        metric=name,
        rows=values.shape[1],
        models=models,
        gains=gains,
        rounds=dict(rounds),
        recommended=recommend(gains),
    )
    return found if has_bounds(found) else None


def _draws(count: int) -> Iterator[npt.NDArray[np.int64]]:
    """How often each of `count` rows is in a sample: blocks of int64[samples, count]."""
    samples = max(_MIN_SAMPLES, min(SAMPLES, _MAX_DRAWS // count))
    chance, step = np.random.default_rng(_SEED), max(1, _BLOCK // count)
    for first in range(0, samples, step):
        yield chance.multinomial(count, np.full(count, 1 / count), min(step, samples - first))


def _resampled_means(values: Floats) -> Floats:
    """float64[samples, models]: means of float64[models, n] over rows drawn with replacement."""
    count = values.shape[1]
    return np.concatenate([drawn @ values.T / count for drawn in _draws(count)])


def _resampled_counts(
    truth: Floats, values: Floats, part: str, metric: str
) -> tuple[Floats, Floats]:
    """float64[models] and float64[samples, models]: a metric of counts of rows by class float64[n]
    and float64[models, n], of all rows and of samples. NaN where the metric does not exist."""
    classes = truth.astype(np.int64)
    if part == "guess":
        tally, count = "confusion", int(max(truth.max(), values.max())) + 1
        cells = evaluation_counts.confusion_cells(classes, values, count)
        size = count**2
    else:  # a bin for each number that occurs, as only their order counts
        tally, size = "scores", 2 * values.shape[1]
        cells = np.stack([2 * np.unique(row, return_inverse=True)[1] + classes for row in values])

    def metric_of(row: npt.NDArray[np.int64], weights: Floats | None) -> float:
        counts: Any = np.bincount(row, weights, size)
        return evaluation_counts.compute_metrics({tally: counts}).get(metric, math.nan)

    exact = np.array([metric_of(row, None) for row in cells])
    drawn = [
        [metric_of(row, weights) for row in cells]
        for block in _draws(values.shape[1])
        for weights in block.astype(np.float64)
    ]
    return exact, np.array(drawn)


def _of_share(share: float, count: int) -> Estimate:
    """A share of rows with the score interval of Wilson (1927): the bootstrap gives an interval
    without width where all rows are right."""
    z = 1.959964
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low, high = (center - spread) / scale, (center + spread) / scale
    return Estimate(share, max(0.0, min(low, share)), min(1.0, max(high, share)))


def _estimate(value: float, drawn: Floats) -> Estimate:
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    # The same model twice differs by nothing, and a sum of floats may round.
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))
