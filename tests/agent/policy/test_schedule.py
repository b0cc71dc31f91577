"""Work hours: parsing, and when they change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.policy import schedule
from agent.policy.schedule import DAY_MINUTES, WEEK_MINUTES, WeeklyHours
from protocols.errors import UsageError

MON, FRI, SAT, SUN = 0, 4 * DAY_MINUTES, 5 * DAY_MINUTES, 6 * DAY_MINUTES


@pytest.mark.parametrize(
    ("text", "minute", "is_open"),
    [
        ("", 0, True),
        ("mon 8:00-9:00", MON + 480, True),
        ("mon 8:00-9:00", MON + 540, False),
        ("mon-fri 18:00-08:00", MON + 18 * 60, True),
        ("mon-fri 18:00-08:00", MON + 12 * 60, False),
        ("mon-fri 18:00-08:00", SAT + 7 * 60, True),
        ("mon-fri 18:00-08:00", MON + 7 * 60, False),
        ("sun 22:00-06:00", MON + 5 * 60, True),
        ("sat-sun 0:00-24:00", SUN + 1439, True),
        ("sat-sun 0:00-24:00", MON, False),
        ("fri-mon 0:00-1:00", SUN + 30, True),
        ("fri-mon 0:00-1:00", DAY_MINUTES + 30, False),
        ("MON 8:00 - 9:00, sat 0:00-24:00", SAT + 5, True),
    ],
)
def test_parse_hours(text: str, minute: int, is_open: bool) -> None:
    assert schedule.parse(text).is_open(minute) is is_open


@pytest.mark.parametrize(
    "text",
    [
        "mon",
        "8:00-9:00",
        "mon 8-9",
        "mon 8:00-8:00",
        "mon 24:00-1:00",
        "mon 8:60-9:00",
        "x 1:00-2:00",
    ],
)
def test_malformed_hours_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a range of hours"):
        schedule.parse(text)


def test_the_whole_week_never_changes() -> None:
    assert schedule.parse("mon-sun 0:00-24:00").minutes_until_change(17) == 0
    assert schedule.parse("").minutes_until_change(17) == 0


@given(
    windows=st.lists(
        st.tuples(st.integers(0, WEEK_MINUTES - 1), st.integers(1, DAY_MINUTES)), max_size=5
    ),
    minute=st.integers(0, WEEK_MINUTES - 1),
)
def test_minutes_until_change(windows: list[tuple[int, int]], minute: int) -> None:
    week = WeeklyHours(tuple((begin, begin + length) for begin, length in windows))
    wait = week.minutes_until_change(minute)
    now = week.is_open(minute)
    last = wait or WEEK_MINUTES
    # Nothing changes before that minute, and it does at that minute.
    assert all(
        week.is_open((minute + m) % WEEK_MINUTES) == now for m in range(0, last, max(1, last // 97))
    )
    if wait:
        assert week.is_open((minute + wait) % WEEK_MINUTES) != now
        assert week.is_open((minute + wait - 1) % WEEK_MINUTES) == now
