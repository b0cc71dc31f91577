"""What the Events page shows beside its list: one event in full, and counts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, get_args

from coordinator.fleet.readings import shown_state
from coordinator.fleet.state import Event, Fleet, Level, finite
from coordinator.monitor.peer_table import TONES, Cell, peer_name
from protocols.messages.states import label

LEVEL_NAMES: tuple[Level, ...] = get_args(Level)
#: Steps of the time axis, in seconds.
_STEPS_S = (1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 86400)
#: Unix s, as in `envelope.Time`.
_MAX_TIME = 2.0**40


class Timeline(NamedTuple):
    """How many events of each level there were in each span of `step_s` seconds, oldest first."""

    step_s: int
    counts: dict[Level, list[float]]


def subject_name(event: Event, fleet: Fleet | None) -> str:
    """The name of the peer that the event is about, or the run; "" for the whole fleet."""
    return peer_name(fleet, event.subject) if fleet else event.subject


def subject_state(event: Event, fleet: Fleet | None, now: float) -> Cell | None:
    """The state now of the peer or run that the event is about."""
    if fleet is None:
        return None
    if (peer := fleet.peers.get(event.subject)) is not None:
        state = shown_state(peer, now)
        return Cell(label(state, peer.reason if state is peer.state else ""), TONES[state])
    if (run := fleet.runs.get(event.subject)) is not None:
        changed = run.changed
        return Cell(f"{changed.state.value} · round {changed.round}/{changed.rounds}")
    return None


def count_levels(events: Sequence[Event]) -> dict[Level, int]:
    """The number of events of each level."""
    counts = Counter(event.level for event in events)
    return {level: counts[level] for level in LEVEL_NAMES}


def count_subjects(events: Sequence[Event], fleet: Fleet | None) -> list[tuple[str, int]]:
    """How many events each peer and run has, the most first."""
    counts = Counter(name for event in events if (name := subject_name(event, fleet)))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def timeline(events: Sequence[Event], width: int) -> Timeline:
    """The events over time, in at most `width` spans of the finest step that fits."""
    # Dates of others may be absurd: their differences must stay finite.
    times = [min(max(finite(event.at) or 0.0, -_MAX_TIME), _MAX_TIME) for event in events]
    first, last = min(times, default=0.0), max(times, default=0.0)
    fits = (step for step in _STEPS_S if (last - first) // step + 1 <= max(width, 1))
    step = next(fits, 0) or int((last - first) // max(width, 1)) + 1
    spans = min(int((last - first) // step) + 1, max(width, 1))
    counts: dict[Level, list[float]] = {level: [0.0] * spans for level in LEVEL_NAMES}
    for event, at in zip(events, times, strict=True):
        counts[event.level][min(int((at - first) // step), spans - 1)] += 1
    return Timeline(step, counts)
