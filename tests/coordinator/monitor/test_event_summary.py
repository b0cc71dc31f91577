"""The counts and the details beside the list of events."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.fleet.state import Event
from coordinator.monitor.event_summary import (
    count_levels,
    count_subjects,
    subject_name,
    subject_state,
    timeline,
)
from tests.support.scene import IDS, NOW, busy_fleet

TIMES = st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=30)


def event(at: float = NOW, subject: str = "", level: str = "info") -> Event:
    return Event(at=at, level=level, text="x", subject=subject)  # type: ignore[arg-type]


def test_events_are_counted_by_level_and_by_what_they_are_about() -> None:
    fleet = busy_fleet()
    events = [event(subject=IDS["east"]), event(subject=IDS["east"], level="error"), event()]
    events += [event(subject="motion-7", level="error"), event(subject="gone")]
    assert count_levels(events) == {"info": 3, "warning": 0, "error": 2}
    assert count_subjects(events, fleet) == [("east", 2), ("gone", 1), ("motion-7", 1)]
    assert subject_name(events[2], fleet) == ""


def test_the_state_of_what_an_event_is_about() -> None:
    fleet = busy_fleet()
    east = subject_state(event(subject=IDS["east"]), fleet, NOW)
    assert east is not None
    assert east.text == "● training"
    run = subject_state(event(subject="motion-7"), fleet, NOW)
    assert run is not None
    assert run.text == "training · round 12/50"
    assert subject_state(event(subject="gone"), fleet, NOW) is None


def test_a_bar_of_the_timeline_has_a_round_span() -> None:
    found = timeline([event(NOW + second) for second in (0, 1, 30, 599)], 12)
    assert (found.step_s, found.counts["info"]) == (60, [3.0] + [0.0] * 8 + [1.0])
    assert timeline([event()], 12).counts["info"] == [1.0]


@example(times=[1.7976931348623157e308, -9.9792015476736e291], width=0)
@given(times=TIMES, width=st.integers(0, 50))
def test_the_timeline_has_every_event_once(times: list[float], width: int) -> None:
    found = timeline([event(at) for at in times], width)
    assert len(found.counts["info"]) <= max(width, 1)
    assert sum(found.counts["info"]) == len(times)
