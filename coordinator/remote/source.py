"""The interface between a monitor and a coordinator, a peer or a recording."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

from coordinator.api.schema import StartRunRequest
from coordinator.fleet.state import Fleet
from protocols.errors import CommonweightError
from protocols.messages.envelope import Envelope, LogLine

Action = Literal["pause", "resume", "finish", "approve", "remove"]


class Source(Protocol):
    """Gives the state of a fleet, and takes commands, which raise CommonweightError."""

    async def snapshot(self) -> Fleet:
        """The fleet now, with its `at` stamped. Raises Unreachable or Refused."""
        ...

    def messages(self) -> AsyncIterator[Envelope]:
        """Verified live messages. Raises Unreachable when the connection is lost."""
        ...

    async def command(self, peer: str, action: Action, for_s: float = 0.0) -> str:
        """Send a command about a peer, by its id; return its outcome as text."""
        ...

    async def ticket(self) -> str:
        """A new join ticket."""
        ...

    async def start_run(self, order: StartRunRequest) -> str:
        """Start a run; its id."""
        ...

    async def stop_run(self, run: str) -> None:
        """Stop a run."""
        ...

    async def stop_job(self, job: str) -> None:
        """Stop a job."""
        ...

    async def logs(self, peer: str) -> list[LogLine]:
        """The last lines of a peer's log that its owner shares."""
        ...


class ReadOnly:
    """The commands of a `Source` that only shows: each raises `refusal()`."""

    def refusal(self) -> CommonweightError:
        """Why commands are refused, and what to do."""
        raise NotImplementedError

    async def _refuse(self, *_: object, **__: object) -> Any:
        raise self.refusal()

    command = ticket = start_run = stop_run = stop_job = logs = _refuse
