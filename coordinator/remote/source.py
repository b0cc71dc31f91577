"""Where a watcher of the fleet gets what it shows, and how it acts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

from coordinator.api.schema import StartRunRequest
from coordinator.fleet.state import Fleet
from protocols.errors import CommonweightError
from protocols.messages.envelope import Envelope, LogLine

Action = Literal["pause", "resume", "finish", "approve", "remove"]


class Source(Protocol):
    """The seam between a watcher and the coordinator. What acts raises CommonweightError."""

    async def snapshot(self) -> Fleet:
        """The fleet now, with its `at` stamped. Raises Unreachable or Refused."""
        ...

    def messages(self) -> AsyncIterator[Envelope]:
        """Verified live messages, until the link is lost: then it raises Unreachable."""
        ...

    async def command(self, peer: str, action: Action, for_s: float = 0.0) -> str:
        """Ask for something about a peer, by its id; words for what was sent."""
        ...

    async def ticket(self) -> str:
        """A new join ticket."""
        ...

    async def start_run(self, order: StartRunRequest) -> str:
        """Start a run; its id."""
        ...

    async def stop_run(self, run: str) -> None:
        """Ask for the end of a run."""
        ...

    async def stop_job(self, job: str) -> None:
        """Ask for the end of a job."""
        ...

    async def logs(self, peer: str) -> list[LogLine]:
        """The last lines of the peer's log that it lets others see."""
        ...


class ReadOnly:
    """The acting half of a `Source` that can only show: each request raises `refusal()`."""

    def refusal(self) -> CommonweightError:
        """Why nothing can be asked for here, and what to do."""
        raise NotImplementedError

    async def command(self, peer: str, action: Action, for_s: float = 0.0) -> str:
        raise self.refusal()

    async def ticket(self) -> str:
        raise self.refusal()

    async def start_run(self, order: StartRunRequest) -> str:
        raise self.refusal()

    async def stop_run(self, run: str) -> None:
        raise self.refusal()

    async def stop_job(self, job: str) -> None:
        raise self.refusal()

    async def logs(self, peer: str) -> list[LogLine]:
        raise self.refusal()
