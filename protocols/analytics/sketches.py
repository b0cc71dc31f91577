"""Quantiles and distinct counts from mergeable states, with ddsketch and datasketch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

import numpy as np

from protocols.analytics.mergeable_states import ALPHA, PRECISION, DistinctState, QuantileState
from protocols.extras import needs_extra


def count_distinct(values: Iterable[str]) -> DistinctState:
    """HyperLogLog++ registers of some texts. Pass each text once for speed."""
    counter = _library("datasketch").HyperLogLogPlusPlus(p=PRECISION, hashfunc=_hash)
    for value in values:
        counter.update(value.encode())
    return DistinctState(counter.reg.tobytes() if counter.reg.any() else b"")


def estimate_distinct(state: DistinctState) -> float:
    """The estimated number of different values."""
    if not state.registers:
        return 0.0
    registers = np.frombuffer(state.registers, np.int8)
    return float(_library("datasketch").HyperLogLogPlusPlus(reg=registers, hashfunc=_hash).count())


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


def _hash(value: bytes) -> int:
    return int.from_bytes(hashlib.sha256(value).digest()[:8], "big")


def _library(name: str) -> ModuleType:
    with needs_extra("analyze", "a quantile or distinct count"):
        return import_module(name)
