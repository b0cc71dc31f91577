"""The messages of the footer: which one is shown, and for how long. Pure."""

from __future__ import annotations

from typing import NamedTuple

from coordinator.fleet.state import Level

SHOWN_S = 6.0
_RANK: dict[Level, int] = {"info": 0, "warning": 1, "error": 2}


class Message(NamedTuple):
    """A line for the footer, and the number of other messages that are as new."""

    level: Level
    text: str
    num_more: int = 0


class RecentMessages:
    """The messages of the last `SHOWN_S`. `now` is monotonic s."""

    def __init__(self) -> None:
        self._messages: list[tuple[float, Message]] = []

    def add(self, level: Level, text: str, now: float, shown_s: float = SHOWN_S) -> None:
        """Show `text`. A message that is shown already is shown for longer, and counts once."""
        self._messages = [one for one in self._messages if one[1].text != text]
        self._messages.append((now + shown_s, Message(level, text)))

    def clear(self) -> None:
        self._messages = []

    def current(self, now: float) -> Message | None:
        """The worst message, the newest among equals; None if none is left."""
        self._messages = [one for one in self._messages if one[0] > now]
        if not self._messages:
            return None
        worst = max(enumerate(self._messages), key=lambda at: (_RANK[at[1][1].level], at[0]))
        return worst[1][1]._replace(num_more=len(self._messages) - 1)
