"""Keeps the rounds of a Flower app in the ledger: what it sends opens and closes them."""

from __future__ import annotations

from collections.abc import Set

from coordinator.runs.apps import round_events
from coordinator.runs.apps.conversation import Conversation
from coordinator.runs.apps.frames import Content, Outgoing
from coordinator.runs.apps.round_events import Costs, Phase
from coordinator.runs.context import RunContext
from coordinator.runs.messages import round_body
from coordinator.runs.recorder import RunRecorder
from coordinator.runs.retention import Retention
from coordinator.runs.timing import PhaseTimer
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent
from protocols.messages import app_work


class AppRounds:
    """The rounds of one run. They are recorded before the messages of a phase are sent."""

    def __init__(
        self,
        ctx: RunContext,
        recorder: RunRecorder,
        timer: PhaseTimer,
        retention: Retention,
        talk: Conversation,
    ) -> None:
        self._ctx, self._recorder, self._timer = ctx, recorder, timer
        self._retention, self._talk = retention, talk
        self._phase: Phase | None = None
        self._bytes = (0, 0)

    async def open(
        self, message: Outgoing, content: Content, peers: tuple[str, ...], in_use: Set[str]
    ) -> None:
        """Record the phase of this message, the first of those that go to `peers`. `in_use`: the
        versions that they need."""
        if message.message_type in round_events.PREPARING:
            return
        mark = app_work.round_mark(app_work.decode_records(content.told), message.group)
        if not mark and self._talk.open and self._phase is not None:
            mark = self._phase.mark
        phase = Phase.of(message.message_type, mark)
        events = round_events.opened(
            self._recorder.run, self._phase, phase, content.digest, peers, self._costs()
        )
        self._phase = phase
        if any(isinstance(event, run_events.RoundOpened) for event in events):
            self._bytes = self._ctx.transfer.bytes_up, self._ctx.transfer.bytes_down
            self._timer.open_round()
        await self._record(events, in_use)

    async def close(self) -> None:
        """Close the open round: the ServerApp has ended."""
        await self._record(round_events.closed(self._recorder.run, "", self._costs()))

    async def _record(self, events: list[RunEvent], in_use: Set[str] = frozenset()) -> None:
        """Record, publish the rounds that were closed, and delete versions that are not needed."""
        before = len(self._recorder.run.history)
        await self._recorder.record(*events)
        run = self._recorder.run
        for closed in run.history[before:]:
            self._ctx.publish(round_body(run.id, closed))
        self._retention.prune(run, in_use | {sent.work.base for sent in self._talk.open.values()})

    def _costs(self) -> Costs:
        transfer = self._ctx.transfer
        return Costs(
            self._timer.round_s,
            transfer.bytes_up - self._bytes[0],
            transfer.bytes_down - self._bytes[1],
            self._timer.phase_seconds(),
        )
