"""Measures the duration of rounds and of their phases. A restart of the coordinator resets it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from coordinator.storage.run_events import RunEvent

_PARTS = ("work", "wait", "aggregate", "evaluate")
_EDGES = ("UpdateAccepted", "TrainingClosed", "VersionCommitted")


class PhaseTimer:
    """Seconds since the start of the round, and since the start of the phase (`phase_s`)."""

    def __init__(self) -> None:
        self._opened_at = self._phase_at = time.monotonic()
        self._marks: dict[str, float] = {}

    def open_round(self) -> None:
        self._opened_at = self._phase_at = time.monotonic()
        self._marks = {}

    def open_phase(self) -> None:
        self._phase_at = time.monotonic()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The time in the block does not count for the phase."""
        stopped_at = time.monotonic()
        try:
            yield
        finally:
            self._phase_at += time.monotonic() - stopped_at

    def mark(self, event: RunEvent) -> None:
        """Note an event. The first of its kind ends a phase of the round."""
        self._marks.setdefault(type(event).__name__, time.monotonic())

    @property
    def phase_s(self) -> float:
        return time.monotonic() - self._phase_at

    @property
    def round_s(self) -> float:
        return time.monotonic() - self._opened_at

    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase of the round that closes now; empty if a restart interrupted it."""
        marks = [self._marks[name] for name in _EDGES if name in self._marks]
        if len(marks) < len(_EDGES):
            return {}
        edges = [self._opened_at, *marks, time.monotonic()]
        return {part: max(0.0, b - a) for part, (a, b) in zip(_PARTS, pairwise(edges), strict=True)}
