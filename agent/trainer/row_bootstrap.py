"""Intervals for metrics of several models on the same rows, by the bootstrap over rows. Pure.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentile intervals.
All models are drawn with the same rows, so that the difference of two of them is a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from protocols.messages.comparisons import Comparison, Estimate, Model, recommend

Floats = npt.NDArray[np.float64]
#: By name, one number for each row.
RowMetrics = Mapping[str, Floats]

#: Samples of rows; fewer for many rows, where intervals are narrow anyway.
SAMPLES, _MIN_SAMPLES, _MAX_DRAWS = 1000, 200, 50_000_000
_BLOCK = 4_000_000
_SEED = 20_260_101


def compare(
    run: str, rows: Mapping[Model, RowMetrics], rounds: Mapping[Model, int]
) -> Comparison | None:
    """The comparison; None if a metric is not finite on some row.

    The metric is the accuracy, else the root of the mean of "mse", else the loss.
    """
    known = set.intersection(*(set(of) for of in rows.values()))
    name = next(name for name in ("accuracy", "mse", "loss") if name in known)
    values = np.stack([rows[model][name] for model in rows])
    if not np.isfinite(values).all():
        return None
    is_root = name == "mse"
    exact, drawn = values.mean(1), _resampled_means(values)
    if is_root:
        exact, drawn = np.sqrt(exact), np.sqrt(drawn)
    sign = 1.0 if name == "accuracy" else -1.0
    models = {model: _estimate(exact[at], drawn[:, at]) for at, model in enumerate(rows)}
    if name == "accuracy":
        models = {model: _of_share(one.value, values.shape[1]) for model, one in models.items()}
    base = list(rows).index("shared")
    gains: dict[Model, Estimate] = {
        model: _estimate(sign * (exact[at] - exact[base]), sign * (drawn[:, at] - drawn[:, base]))
        for at, model in enumerate(rows)
        if at != base
    }
    return Comparison(
        run=run,
        metric="rmse" if is_root else name,
        rows=values.shape[1],
        models=models,
        gains=gains,
        rounds=dict(rounds),
        recommended=recommend(gains),
    )


def _resampled_means(values: Floats) -> Floats:
    """float64[samples, models]: means of float64[models, n] over rows drawn with replacement."""
    count = values.shape[1]
    samples = max(_MIN_SAMPLES, min(SAMPLES, _MAX_DRAWS // count))
    chance, step = np.random.default_rng(_SEED), max(1, _BLOCK // count)
    made = []
    for first in range(0, samples, step):
        drawn = chance.multinomial(count, np.full(count, 1 / count), min(step, samples - first))
        made.append(drawn @ values.T / count)
    return np.concatenate(made)


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
    low, high = np.quantile(drawn, (0.025, 0.975))
    # The same model twice differs by nothing, and a sum of floats may round.
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))
