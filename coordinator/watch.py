"""Where a watcher of the fleet gets what it shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

from coordinator.fleet import Fleet
from protocols.messages import Envelope

Action = Literal["pause", "resume", "finish"]


class Source(Protocol):
    """The seam between a watcher and the coordinator."""

    async def snapshot(self) -> Fleet:
        """The fleet now, with its `at` stamped. Raises Unreachable or Refused."""
        ...

    def messages(self) -> AsyncIterator[Envelope]:
        """Verified live messages, until the link is lost: then it raises Unreachable."""
        ...

    async def command(self, peer: str, action: Action, for_s: float = 0.0) -> str:
        """Ask a peer, by its id; gives words of the outcome. Raises CommonweightError."""
        ...

    async def ticket(self) -> str:
        """A new join ticket. Raises CommonweightError."""
        ...
