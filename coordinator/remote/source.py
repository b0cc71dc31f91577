"""The interface between a monitor and a coordinator, a peer or a recording."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from coordinator.fleet.state import Fleet
from protocols.errors import CommonweightError
from protocols.messages.envelope import Envelope

if TYPE_CHECKING:
    from coordinator.remote.api_client import Remote

T = TypeVar("T")


class Source(Protocol):
    """Gives the state of a fleet, and passes requests to its coordinator."""

    async def snapshot(self) -> Fleet:
        """The fleet now, with its `at` stamped. Raises Unreachable or Refused."""
        ...

    def messages(self) -> AsyncIterator[Envelope]:
        """Verified live messages. Raises Unreachable when the connection is lost."""
        ...

    async def ask(self, request: Callable[[Remote], T]) -> T:
        """The coordinator's answer to a request. Raises CommonweightError."""
        ...


class ReadOnly:
    """The requests of a `Source` that only shows: each raises `refusal()`."""

    def refusal(self) -> CommonweightError:
        """Why requests are refused, and what to do."""
        raise NotImplementedError

    async def ask(self, request: Callable[[Remote], T]) -> T:
        raise self.refusal()
