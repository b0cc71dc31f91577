"""One request in which an agent sends a reply and gets its next work."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from coordinator.fleet.sessions import NoSession, Sessions
from coordinator.fleet.witnesses import Witnesses
from coordinator.jobs.manager import JobManager
from coordinator.runs.manager import RunManager
from coordinator.transport.flower import Superlink
from coordinator.transport.weights import WeightTransfer
from protocols.local.failpoints import failpoint
from protocols.messages.envelope import strip_controls
from protocols.messages.states import RunState
from protocols.messages.work import MAX_NOTICES, PollRequest, PollResponse

#: Time that a request with a reply waits for the next work. It saves a doorbell and a request.
LONG_POLL_S = 1.0
_MAX_NOTICE_CHARS = 400


class PollHandler:
    """Handles polls. `on_request(action, node_id)` is called as for Flower's own requests."""

    def __init__(
        self,
        superlink: Superlink,
        sessions: Sessions,
        transfer: WeightTransfer,
        runs: RunManager,
        jobs: JobManager,
        long_polls: LongPolls,
        witnesses: Witnesses,
        notices: OwnerNotices,
    ) -> None:
        self._witnesses, self._notices = witnesses, notices
        self._superlink, self._sessions, self._transfer = superlink, sessions, transfer
        self._runs, self._jobs, self._long_polls = runs, jobs, long_polls
        self.on_request: Callable[[str, int], None] = lambda action, node_id: None
        #: The number of the list of offered tasks.
        self.offers_number: Callable[[], int] = lambda: 0

    async def poll(self, peer: str, request: PollRequest) -> PollResponse:
        """Store the peer's reply and return its next work.

        Raises BadMessage, NoSession, and HTTPException if the update in the request is refused.
        """
        node = self._sessions.node_of(peer)
        if node is None or not self._sessions.is_open(peer):
            raise NoSession(f"{peer} has no session")
        # Taken first, so that the charge of an answer is recorded before the answer counts.
        charged = (
            self._witnesses.exchange_charged(peer, request.charged) if request.charged else b""
        )
        response = await self._answer(peer, node, request)
        if charged:
            response = msgspec.structs.replace(response, charged=charged)
        if notices := self._notices.take(peer):
            response = msgspec.structs.replace(response, notices=notices)
        if number := self.offers_number():
            response = msgspec.structs.replace(response, offers=number)
        if request.seen is None:
            return response
        return msgspec.structs.replace(response, log=self._witnesses.exchange(peer, request.seen))

    def _owner_has_decided(self, peer: str) -> None:
        self._runs.owner_has_decided(peer)
        self._jobs.owner_has_decided(peer)

    async def _answer(self, peer: str, node: int, request: PollRequest) -> PollResponse:
        session = self._sessions.session_number(peer)
        if request.reply is None:
            response = await self._superlink.poll_async(node, request)
            self.on_request("exchange", node)
            self._note(peer, request, response)
            if request.owner_has_decided:
                self._owner_has_decided(peer)
            if response.work is None and request.open_sum is not None:
                is_over = self._runs.is_sum_over(peer, request.open_sum)
                response = msgspec.structs.replace(response, sum_is_over=is_over)
            if request.run and self._runs.is_over(request.run):
                response = msgspec.structs.replace(response, run_is_over=True)
            return self._with_version(response)
        # Before the reply is stored, because the run may handle it at once.
        request_id = self._superlink.request_id_of(request.reply)
        if request.update and self._runs.is_awaited(request_id):  # otherwise it is not needed
            await self._transfer.receive_inline(peer, request.update)
        future = self._jobs.ack_future(request_id) or self._runs.ack_future(request_id)
        await self._superlink.poll_async(node, PollRequest(reply=request.reply, wants_work=False))
        failpoint("reply.taken")
        self.on_request("push-object", node)
        self._note(peer, request, PollResponse())
        acknowledged = await self._runs.acknowledged(future)
        if request.owner_has_decided:
            self._owner_has_decided(peer)
        if not request.wants_work:
            return PollResponse(acknowledged=acknowledged)
        following = PollRequest(steps_only=request.steps_only)
        response = await self._superlink.poll_async(node, following)
        if response.work is None and (self._runs.current is not None or self._jobs.is_working):
            await self._long_polls.wait(peer, LONG_POLL_S)
            if self._sessions.session_number(peer) != session:
                # The agent has restarted: the work belongs to its new session.
                raise NoSession(f"{peer} has another session")
            response = await self._superlink.poll_async(node, following)
        self._note(peer, request, response)
        return self._with_version(msgspec.structs.replace(response, acknowledged=acknowledged))

    def _note(self, peer: str, request: PollRequest, response: PollResponse) -> None:
        answered, got_work = request.reply is not None, response.work is not None
        wants_work = request.wants_work and not request.steps_only
        self._sessions.on_poll(peer, answered=answered, wants_work=wants_work, got_work=got_work)

    def _with_version(self, response: PollResponse) -> PollResponse:
        """Add the version to evaluate, if it is new to all peers and small."""
        loop = self._runs.current
        if response.work is None or loop is None or loop.run.state is not RunState.EVALUATING:
            return response
        version = self._transfer.store.inline_bytes(loop.run.head)
        self._transfer.bytes_down += len(version)
        return msgspec.structs.replace(response, version=version)


class OwnerNotices:
    """Lines for the owners of peers, until the peers poll. Of each peer, the newest are kept."""

    def __init__(self) -> None:
        self._by_peer: dict[str, deque[str]] = {}

    def put(self, peer: str, text: str) -> None:
        lines = self._by_peer.setdefault(peer, deque(maxlen=MAX_NOTICES))
        lines.append(strip_controls(text)[:_MAX_NOTICE_CHARS])

    def take(self, peer: str) -> tuple[str, ...]:
        return tuple(self._by_peer.pop(peer, ()))

    forget = take


class LongPolls:
    """Peers whose request waits for work, so they need no doorbell. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def wait(self, peer: str, max_s: float) -> None:
        """Wait until `wake` is called for this peer, for at most `max_s`."""
        woken = asyncio.get_running_loop().create_future()
        self.wake(peer)  # an earlier request, which its sender gave up
        self._waiting[peer] = woken
        try:
            await asyncio.wait({woken}, timeout=max_s)
        finally:
            if self._waiting.get(peer) is woken:
                del self._waiting[peer]

    def wake(self, peer: str) -> bool:
        """End the wait of a peer, as there is work. Returns False if it does not wait."""
        woken = self._waiting.pop(peer, None)
        if woken is None or woken.done():
            return False
        woken.set_result(None)
        return True
