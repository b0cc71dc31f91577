"""Quantiles from mergeable states, with ddsketch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from protocols.analytics.mergeable_states import ALPHA, QuantileState
from protocols.extras import needs_extra


def quantile(state: QuantileState, q: float) -> float | None:
    """The q-quantile within a relative error of `ALPHA`; None without values."""
    sketches, stores = _library("ddsketch.ddsketch"), _library("ddsketch.store")
    sides = []
    for counts in (state.positive, state.negative):
        store = stores.DenseStore()
        for place, count in counts.items():
            store.add(place, count)
        sides.append(store)
    mapping = _library("ddsketch.mapping").LogarithmicMapping(ALPHA)
    found = sketches.BaseDDSketch(mapping, *sides, state.zeros).get_quantile_value(q)
    return None if found is None else float(found)


def quantile_histogram(state: QuantileState, bins: int) -> tuple[float, float, tuple[int, ...]]:
    """A histogram with equal bins between the 1 % and the 99 % quantile: low, high, counts.

    Values outside are counted in the first and the last bin.
    """
    least, most = quantile(state, 0.01), quantile(state, 0.99)
    if least is None or most is None:
        return 0.0, 0.0, (0,) * bins
    mapping = _library("ddsketch.mapping").LogarithmicMapping(ALPHA)
    width = (most - least) / bins or 1.0
    counts = [0] * bins
    values = [(-mapping.value(p), n) for p, n in state.negative.items()] + [(0.0, state.zeros)]
    for value, count in values + [(mapping.value(p), n) for p, n in state.positive.items()]:
        counts[min(max(int((value - least) / width), 0), bins - 1)] += count
    return least, most, tuple(counts)


def _library(name: str) -> ModuleType:
    with needs_extra("analyze", "a quantile"):
        return import_module(name)
