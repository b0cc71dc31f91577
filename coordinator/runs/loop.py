"""Drives one run: takes replies, sends requests, and does the step that `decisions.decide` returns.

The loop waits for one event: replies that arrived, peers that came or went, a stop. Events are in
the ledger before anything is sent because of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Set

from coordinator.runs import candidates, decisions, repairs, steps
from coordinator.runs.context import RunContext
from coordinator.runs.parts import RunParts
from coordinator.runs.replies import Replies
from coordinator.runs.rounds import Rounds
from coordinator.runs.secure.sums import SecureSums
from coordinator.runs.state import Run
from coordinator.runs.step_executor import StepExecutor
from coordinator.storage import run_events
from protocols.errors import (
    AWAITED,
    Awaited,
    CommonweightError,
    DiskFull,
    HomeError,
    StorageUnreachable,
)
from protocols.local.disk_space import is_disk_full
from protocols.local.timed_wait import wait_at_most
from protocols.messages.states import RunState

log = logging.getLogger("commonweight.run")

#: How long peers with unfinished work may take to reconnect after the coordinator's restart.
RECONNECT_GRACE_S = 20.0
_SHORTAGE_RETRY_S = 5.0
_ASK_AGAIN_S = 1.0
#: How often a secure sum looks at the uploads in progress.
_SUM_POLL_S = 2.0


class RunLoop:
    """One active run. Set `changed`, in the loop's thread, when something happens that concerns it.

    `protected_digests()`: versions and states that other runs keep. Raises CommonweightError if the
    run's strategy cannot be made.
    """

    def __init__(
        self, run: Run, ctx: RunContext, protected_digests: Callable[[], Set[str]]
    ) -> None:
        parts = RunParts.create(run, ctx)
        self._ctx = ctx
        self._recorder, self._timer = parts.recorder, parts.timer
        self.requests, self._parts = parts.requests, parts
        self._sums = SecureSums(parts)
        self._rounds = Rounds(parts, self._sums, protected_digests)
        self._steps = StepExecutor(parts, self._sums, self._rounds)
        self._replies = Replies(parts, self._sums, self._rounds)
        self.changed = asyncio.Event()
        # After a restart no peer has reconnected yet: they are not lost for that.
        has_work = run.pending or run.assignments or run.cohort
        self._grace_until = time.monotonic() + RECONNECT_GRACE_S if has_work else 0.0
        self._stop_reason = ""
        self._shortage_reported = False
        #: When peers were asked again after their owners' decisions (monotonic s).
        self._asked_again_at: dict[str, float] = {}

    # --- called from outside ---

    def stop(self, because: str) -> None:
        """End the run at its next step. Committed versions stay."""
        self._stop_reason = because
        self.changed.set()

    def session_opened(self, peer: str) -> None:
        """A peer has a new session, which lacks the messages that its last one received."""
        self._recorder.incompatible.discard(peer)
        self.requests.cancel_from(peer)
        self.changed.set()

    def owner_has_decided(self, peer: str) -> None:
        """The peer's owner has allowed or forbidden a task: ask again, not more than once a
        second."""
        if self.awaits(peer):
            asyncio.get_running_loop().call_later(
                max(0.0, self._asked_again_at.get(peer, 0.0) + _ASK_AGAIN_S - time.monotonic()),
                self._ask_again,
                peer,
            )

    def _ask_again(self, peer: str) -> None:
        self._asked_again_at[peer] = time.monotonic()
        self._recorder.incompatible.discard(peer)
        self.changed.set()

    def awaits(self, peer: str) -> Awaited | None:
        """The decision of its owner without which the peer refused work; None if there is none."""
        is_refused = peer in self._recorder.incompatible
        return AWAITED.get(self.run.refusal_kinds.get(peer, "")) if is_refused else None

    @property
    def run(self) -> Run:
        """The present state."""
        return self._recorder.run

    @property
    def on_disk(self) -> Set[str]:
        """Digests of its versions, including older ones that peers still train on."""
        return self._rounds.on_disk

    # --- the loop ---

    async def drive(self) -> Run:
        """Work until the run has ended. Raises the errors of the ledger and the disk."""
        try:
            with self._ctx.transfer.receiving(self.run.id, self._counted_uploads):
                return await self._drive()
        finally:
            if self.run.ended:  # else the coordinator stops, and the run continues with them
                self._ctx.store.uploads.end_run()
            self._recorder.announce_now()

    async def _drive(self) -> Run:
        await self._prepare()
        while not self.run.ended:
            self.changed.clear()
            try:
                await self._step()
            except (OSError, DiskFull) as err:
                if not is_disk_full(err):
                    raise
                await self._recorder.wait_for_space(err)  # nothing was recorded: do it again
            except StorageUnreachable as err:
                await self._recorder.wait_for_storage(err)
            except HomeError:  # the home is damaged, not the run: a restart continues it
                raise
            except CommonweightError as err:
                because = f"{err.message} ({err.hint})" if err.hint else err.message
                log.error("run %s failed: %s", self.run.id, because)
                failed = steps.EndRun(RunState.FAILED, because)
                await self._steps.execute(candidates.after(self.run, failed))
        self.requests.cancel_all()
        await self._replies.collect()
        self._rounds.prune()  # no peer trains on older versions any more
        text = f"run {self.run.id} {self.run.state}: {self.run.ended_briefly}"
        self._recorder.report("error" if self.run.state is RunState.FAILED else "info", text)
        return self.run

    def _counted_uploads(self, peer: str) -> set[str]:
        """Digests of this peer's accepted updates that no version contains yet."""
        if self.run.cohort is not None:
            return {self.run.cohort.masked.get(peer, "")} - {""}
        accepted = [one.update for one in self.run.buffer if one.peer == peer]
        accepted += [self.run.updates[peer]] if peer in self.run.updates else []
        return {update.digest for update in accepted}

    async def _prepare(self) -> None:
        await repairs.repair(self._recorder, self._ctx.store, self._sums)
        if self.run.head and not (self.run.ended or self.run.recalling):
            self._parts.model.set_version(self.run.head)
        self._recorder.announce()
        begins = f"continues in round {self.run.round}" if self.run.round else "started"
        self._recorder.report("info", f"run {self.run.id} {begins}")

    async def _step(self) -> None:
        """Do what there is to do now. If the disk is full, all of it can be repeated."""
        fills_buffer = self.run.buffered or self.run.folds_late
        if not (fills_buffer and self.run.state is RunState.AGGREGATING):
            await self._replies.collect()  # else the replies belong to the next buffer
        if self.run.cohort is not None:
            await self._sums.ask()
        else:
            await self._send()
        if self._stop_reason:
            stopped = run_events.RunEnded(RunState.STOPPED, self._stop_reason)
            await self._recorder.record(stopped)
            return
        step = decisions.decide(self.run, self._observe())
        if isinstance(step, steps.Wait):
            await self._wait(step)
        else:
            await self._steps.execute(step)

    async def _send(self) -> None:
        """Send the open request to the peers that have not got it yet."""
        await self._record_losses()
        if self.run.assignments:
            deadline_s = self.run.spec.deadline_s  # later, the request or its reply may be lost
            self.requests.cancel(lambda r: r.kind == "train" and r.seconds > deadline_s)
            await self.requests.send_assignments(self.run)
        await self.requests.send_pending(self.run)

    def _observe(self) -> decisions.Observation:
        online = self._ctx.eligible()
        eligible = online - self._recorder.incompatible
        if self.run.folds_late:  # peers that still work for an older round get nothing else
            free = eligible - self.requests.late_bases(self.run).keys()
            eligible = free if len(free) >= self.run.spec.quorum else eligible
        unfit, absent = online & self._recorder.incompatible, self._ctx.enrolled() - online
        has_grace = time.monotonic() < self._grace_until
        sum_ = self._sums.progress(waits_for_absent=has_grace)
        return decisions.Observation(eligible, self._parts.deadline_passed, unfit, absent, sum_)

    async def _wait(self, step: steps.Wait) -> None:
        what = step.text(self._ctx.name_of)
        shortage = self._ctx.transfer.limits.shortage
        if shortage:
            if not self._shortage_reported:
                self._recorder.report("error", f"no {shortage}: updates wait at the peers")
            what = f"{shortage}, then {what}"
        self._shortage_reported = bool(shortage)
        self._recorder.set_waiting_for(what)
        timeouts = [self._grace_until - time.monotonic()]
        if self.run.state is not RunState.WAITING or self.run.peers:
            timeouts.append(decisions.phase_deadline_s(self.run) - self._timer.phase_s)
        if self.run.assignments:
            timeouts.append(self.run.spec.deadline_s)
        if self.run.cohort is not None:
            timeouts.append(_SUM_POLL_S)
        if shortage:
            timeouts.append(_SHORTAGE_RETRY_S)
        timeout = min((wait_s for wait_s in timeouts if wait_s > 0), default=None)
        await wait_at_most(self.changed, timeout)  # then decide again

    async def _record_losses(self) -> None:
        if time.monotonic() < self._grace_until:
            return
        at_work = {peer for peer, work in self.run.assignments.items() if not work.lost}
        lost = sorted((at_work | set(self.run.pending)) - self._ctx.eligible())
        for peer in lost:
            self.session_opened(peer)  # cancel its requests
            name = self._ctx.name_of(peer)
            self._recorder.report("warning", f"{name} {steps.LEFT}", peer)
        losses = [run_events.PeerLost(peer, "went away") for peer in lost]
        await self._recorder.record(*losses)
