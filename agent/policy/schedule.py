"""Parses the hours of a week in which an agent may work. Pure.

`mon-fri 18:00-08:00, sat-sun 00:00-24:00`: days, then hours of local time. Hours that end before
they begin last into the next day. An empty text is the whole week.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from protocols.errors import UsageError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES, WEEK_MINUTES = 1440, 7 * 1440
_DAYS = "|".join(DAYS)
_PART = re.compile(rf"({_DAYS})(?:-({_DAYS}))? +(\d\d?):(\d\d) *- *(\d\d?):(\d\d)", re.IGNORECASE)


class WeeklyHours(NamedTuple):
    """Windows in minutes from Monday 0:00. `end` may be up to one day after the week's end."""

    windows: tuple[tuple[int, int], ...] = ()

    def is_open(self, minute: int) -> bool:
        """True if the minute of the week is in a window, or if there are no windows."""
        return not self.windows or any(
            begin <= at < end
            for begin, end in self.windows
            for at in (minute, minute + WEEK_MINUTES)
        )

    def minutes_until_change(self, minute: int) -> int:
        """Minutes until `is_open` changes; 0 if it never does."""
        now = self.is_open(minute)
        edges = {edge % WEEK_MINUTES for window in self.windows for edge in window}
        waits = sorted((edge - minute - 1) % WEEK_MINUTES + 1 for edge in edges)
        return next((w for w in waits if self.is_open((minute + w) % WEEK_MINUTES) != now), 0)


def parse(text: str) -> WeeklyHours:
    """Parse the hours in `text`. Raises UsageError."""
    windows: list[tuple[int, int]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = _PART.fullmatch(part)
        begin, end = (_minutes(*found.group(n, n + 1)) if found else -1 for n in (3, 5))
        if (
            found is None
            or not 0 <= begin < DAY_MINUTES
            or not 0 <= end <= DAY_MINUTES
            or begin == end
        ):
            raise UsageError(
                f"{part!r} is not a range of hours",
                "write for example: mon-fri 18:00-08:00, sat 0:00-24:00",
            )
        first = DAYS.index(found[1].lower())
        last = DAYS.index((found[2] or found[1]).lower())
        for day in range(first, first + (last - first) % 7 + 1):
            at = day % 7 * DAY_MINUTES
            windows.append((at + begin, at + end + DAY_MINUTES * (end < begin)))
    return WeeklyHours(tuple(sorted(windows)))


def _minutes(hours: str, minutes: str) -> int:
    return int(hours) * 60 + int(minutes) if int(minutes) < 60 else -1


def format_minute(minute: int) -> str:
    """Format a minute of the week: `mon 18:00`."""
    day, left = divmod(minute % WEEK_MINUTES, DAY_MINUTES)
    return f"{DAYS[day]} {left // 60:02}:{left % 60:02}"
