"""How long a round takes, and how that time is spent. Monotonic; a restart begins anew."""

from __future__ import annotations

import time
from itertools import pairwise

from coordinator.storage.run_events import RunEvent

_PARTS = ("work", "wait", "aggregate", "evaluate")
_EDGES = ("UpdateAccepted", "TrainingClosed", "VersionCommitted")


class PhaseTimer:
    """Runs from the opening of a round, and again from that of a phase (`phase_s`)."""

    def __init__(self) -> None:
        self._opened_at = self._phase_at = time.monotonic()
        self._marks: dict[str, float] = {}

    def open_round(self) -> None:
        self._opened_at = self._phase_at = time.monotonic()
        self._marks = {}

    def open_phase(self) -> None:
        self._phase_at = time.monotonic()

    def mark(self, event: RunEvent) -> None:
        """The first event of its kind in a round ends a part of it."""
        self._marks.setdefault(type(event).__name__, time.monotonic())

    @property
    def phase_s(self) -> float:
        return time.monotonic() - self._phase_at

    @property
    def round_s(self) -> float:
        return time.monotonic() - self._opened_at

    def phase_seconds(self) -> dict[str, float]:
        """Seconds by part of the round that closes now; nothing for one that a restart cut."""
        marks = [self._marks[name] for name in _EDGES if name in self._marks]
        if len(marks) < len(_EDGES):
            return {}
        edges = [self._opened_at, *marks, time.monotonic()]
        return {part: max(0.0, b - a) for part, (a, b) in zip(_PARTS, pairwise(edges), strict=True)}
