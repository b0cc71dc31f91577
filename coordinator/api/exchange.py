"""An agent hands in a reply and takes its next message, in one request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from coordinator.fleet.sessions import NoSession, Sessions
from coordinator.jobs.manager import JobManager
from coordinator.runs.manager import RunManager
from coordinator.transport.flower import Superlink
from coordinator.transport.weights import WeightTransfer
from protocols.failpoints import failpoint
from protocols.messages.states import RunState
from protocols.messages.work import PollRequest, PollResponse

#: Who hands in an answer is told of work that comes so soon after, without doorbell and question.
LONG_POLL_S = 1.0


class Exchanges:
    """`on_request(action, node_id)` is told of what arrived, as of Flower's own requests."""

    def __init__(
        self,
        superlink: Superlink,
        sessions: Sessions,
        transfer: WeightTransfer,
        runs: RunManager,
        jobs: JobManager,
        long_polls: LongPolls,
    ) -> None:
        self._superlink, self._sessions, self._transfer = superlink, sessions, transfer
        self._runs, self._jobs = runs, jobs
        self._long_polls = long_polls
        self.on_request: Callable[[str, int], None] = lambda action, node_id: None

    async def exchange(self, peer: str, asked: PollRequest) -> PollResponse:
        """What the peer gets for its reply. Raises BadMessage, NoSession."""
        node = self._sessions.node_of(peer)
        if node is None or not self._sessions.is_open(peer):
            raise NoSession(f"{peer} has no session")
        session = self._sessions.session_number(peer)
        if asked.reply is None:
            answer = await self._superlink.exchange_async(node, asked)
            self.on_request("exchange", node)
            return self._with_version(answer)
        # Before it is handed over: the run may be quicker than we are.
        question = self._superlink.request_id_of(asked.reply)
        settling = self._jobs.ack_future(question) or self._runs.ack_future(question)
        handed_in = PollRequest(reply=asked.reply, wants_work=False)
        await self._superlink.exchange_async(node, handed_in)
        failpoint("reply.taken")
        self.on_request("push-object", node)
        settled = await self._runs.acknowledged(settling)
        if not asked.wants_work:
            return PollResponse(acknowledged=settled)
        answer = await self._superlink.exchange_async(node, PollRequest())
        if answer.work is None and (self._runs.current is not None or self._jobs.is_working):
            await self._long_polls.wait(peer, LONG_POLL_S)
            if self._sessions.session_number(peer) != session:
                # It was started again meanwhile: what is there now is for who asks in that life.
                raise NoSession(f"{peer} has another session")
            answer = await self._superlink.exchange_async(node, PollRequest())
        return self._with_version(PollResponse(work=answer.work, acknowledged=settled))

    def _with_version(self, answer: PollResponse) -> PollResponse:
        """An answer with the version that its work is on, if that is new to all and small."""
        loop = self._runs.current
        if answer.work is None or loop is None or loop.run.state is not RunState.EVALUATING:
            return answer
        version = self._transfer.store.inline_bytes(loop.run.head)
        self._transfer.bytes_down += len(version)
        return msgspec.structs.replace(answer, version=version)


class LongPolls:
    """Peers that have handed in an answer and wait for the answer to that: they need no doorbell.

    For the event loop's thread.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def wait(self, peer: str, most_s: float) -> None:
        """Until there is work for this peer, or for that long."""
        woken = asyncio.get_running_loop().create_future()
        self.wake(peer)  # a request that its sender has given up
        self._waiting[peer] = woken
        try:
            await asyncio.wait({woken}, timeout=most_s)
        finally:
            if self._waiting.get(peer) is woken:
                del self._waiting[peer]

    def wake(self, peer: str) -> bool:
        """There is work for it. False if this peer does not wait."""
        woken = self._waiting.pop(peer, None)
        if woken is None or woken.done():
            return False
        woken.set_result(None)
        return True
