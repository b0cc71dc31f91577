"""Messages to peers whose replies are awaited, by their ids.

A request is one message to one peer. It is in flight until its reply is taken or it is canceled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from flwr.app import Message

from coordinator.runs.context import RunContext
from coordinator.runs.state import Run
from protocols.local.failpoints import failpoint
from protocols.messages.refusals import AGENT_FAILED

R = TypeVar("R")


class Request(NamedTuple):
    """A request in flight; `at`: when it was sent, monotonic s. `round`: of a Flower app's run, the
    number of the message."""

    peer: str
    round: int
    kind: str
    at: float = 0.0

    def is_of(self, run: Run) -> bool:
        """True if it is the request that the run has open now."""
        return (self.round, self.kind) == (run.round, run.kind)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.at


class InFlight(Generic[R]):
    """Requests by the ids of their messages, and who waits until their replies are recorded."""

    def __init__(self) -> None:
        self._in_flight: dict[str, R] = {}
        self._ack_futures: dict[str, asyncio.Future[bool]] = {}

    def ack_future(self, mid: str) -> asyncio.Future[bool] | None:
        """Done when the reply to a request is in the ledger (True) or never will be (False); None
        if it is not in flight."""
        if mid not in self._in_flight:
            return None
        return self._ack_futures.setdefault(mid, asyncio.get_running_loop().create_future())

    def acknowledge(self, mids: Iterable[str], recorded: bool) -> None:
        for mid in mids:
            future = self._ack_futures.pop(mid, None)
            if future is not None and not future.done():
                future.set_result(recorded)


class RequestsInFlight(InFlight[Request]):
    """The requests in flight of one run."""

    def __init__(self, ctx: RunContext) -> None:
        super().__init__()
        self._ctx = ctx
        self._is_sending = False
        #: Replies that were found when their requests were to be canceled.
        self._arrived: list[Message] = []

    async def push(self, outgoing: Sequence[tuple[Request, Message]]) -> list[Request]:
        """Send these messages. Returns the requests that are in flight: their nodes exist."""
        failpoint("work.pushing")
        self._is_sending = True
        try:
            messages = [message for _, message in outgoing]
            sent = set(await asyncio.to_thread(self._ctx.grid.push_messages, messages))
            failpoint("work.pushed")
            now = time.monotonic()
            reached = {
                mid: request._replace(at=now)
                for request, message in outgoing
                if (mid := message.metadata.message_id) in sent
            }
            self._in_flight |= reached
        finally:
            self._is_sending = False
        self._ctx.ring([request.peer for request in reached.values()])
        return list(reached.values())

    def rounds(self) -> set[int]:
        """The rounds of the requests in flight."""
        return {request.round for request in self._in_flight.values()}

    def ring_again(self) -> None:
        """Ring at every peer whose reply is awaited: the broker lost its doorbells."""
        self._ctx.ring(sorted({request.peer for request in self._in_flight.values()}))

    # --- replies ---

    async def take_replies(self) -> list[tuple[str, Request, Message]]:
        """Remove the answered requests: message id, request and reply of each."""
        if not self._in_flight:
            return []
        pulled = await asyncio.to_thread(self._ctx.grid.pull_messages, set(self._in_flight))
        # `_arrived` wins: for a request that was canceled at the same time, Flower replies with an
        # error.
        replies = {m.metadata.reply_to_message_id: m for m in (*pulled, *self._arrived)}
        self._arrived = []
        if replies:
            failpoint("reply.pulled")
        # Without an await: a session that opens at that time must not cancel an answered request.
        answered = {mid: request for mid in replies if (request := self._in_flight.pop(mid, None))}
        return [(mid, request, replies[mid]) for mid, request in answered.items()]

    def is_awaited(self, mid: str) -> bool:
        """True if the reply to this message may count. A peer can reply while messages are sent."""
        return mid in self._in_flight or self._is_sending

    # --- canceling ---

    def cancel_from(self, peer: str) -> None:
        self.cancel(lambda request: request.peer == peer)

    def cancel_all(self) -> None:
        self.cancel(lambda _: True)

    def cancel(self, is_obsolete: Callable[[Request], bool]) -> None:
        """Forget these requests, except answered ones: the ledger must record every reply."""
        mids = {mid for mid, request in self._in_flight.items() if is_obsolete(request)}
        if not mids:
            return
        pulled = self._ctx.grid.pull_messages(mids)
        # Flower's own errors, about nodes that are gone, are no replies of peers.
        self._arrived += [m for m in pulled if not m.has_error() or m.error.code == AGENT_FAILED]
        mids -= {reply.metadata.reply_to_message_id for reply in self._arrived}
        self._ctx.grid.delete_messages(mids)
        for mid in mids:
            del self._in_flight[mid]
        self.acknowledge(mids, False)
