"""Takes the replies of peers that have arrived: validates each and records its result."""

from __future__ import annotations

import asyncio

from flwr.app import Message

from coordinator.runs import model_choice
from coordinator.runs.in_flight import Request
from coordinator.runs.parts import RunParts
from coordinator.runs.reply_events import validate_reply
from coordinator.runs.rounds import Rounds
from coordinator.runs.secure.sums import SecureSums
from coordinator.runs.state import TOO_STALE, Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent
from protocols.errors import UpdateRefused
from protocols.privacy.secagg.messages import STEPS

#: Reasons to refuse an answer that came too late or twice. Its owner need not act on them.
_OWNERS_NEED_NOT_KNOW = frozenset({"late", "replay", "not asked", TOO_STALE})


class Replies:
    """The replies to the requests of one run. The owner of a peer reads why one is refused."""

    def __init__(self, parts: RunParts, sums: SecureSums, rounds: Rounds) -> None:
        self._parts, self._ctx, self._sums, self._rounds = parts, parts.ctx, sums, rounds
        self._recorder, self._requests = parts.recorder, parts.requests

    @property
    def _run(self) -> Run:
        return self._recorder.run

    async def collect(self) -> None:
        """Validate the replies that have arrived and record the result of each."""
        replies = await self._requests.take_replies()
        with self._ctx.transfer.limits.keeping({request.peer for _, request, _ in replies}):
            # Concurrently: checking a large update takes as long as receiving it.
            results = [self._validate(request, reply) for _, request, reply in replies]
            events = await asyncio.gather(*results)
            await self._recorder.record(*(event for event in events if event is not None))
        self._ctx.store.mark_recorded(self._run.head)  # first weights, or a version from a peer
        if self._run.buffered:
            self._rounds.drop_unused_uploads({request.peer for _, request, _ in replies})
        self._requests.acknowledge([mid for mid, _, _ in replies], True)

    async def _validate(self, request: Request, reply: Message) -> RunEvent | None:
        try:
            if request.kind in STEPS:
                return await self._sums.take(request, reply)
            return await validate_reply(self._run, self._ctx, self._parts.model, request, reply)
        except UpdateRefused as err:
            if model_choice.is_missing(self._run, request.kind, err.reason):
                return run_events.ScoresMissing(request.peer, err.reason, err.message[:400])
            if not (reply.has_error() or err.reason in _OWNERS_NEED_NOT_KNOW):
                self._parts.tell_owner(request.peer, err.message)
            return run_events.UpdateRefused(
                request.round,
                request.peer,
                err.reason,
                err.message[:400],
                request.kind,
                request.seconds,
            )
