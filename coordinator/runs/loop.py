"""Drives one run: carries out what `decisions.decide` says and records the results.

The loop waits for one event: replies that arrived, peers that came or went, a stop. Events are in
the ledger before anything is sent because of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Set

from flwr.app import Message

from coordinator.runs import (
    candidates,
    decisions,
    model_choice,
    repairs,
    retention,
    schema_agreement,
    steps,
)
from coordinator.runs.context import RunContext
from coordinator.runs.in_flight import Request
from coordinator.runs.parts import RunParts
from coordinator.runs.reply_events import validate_reply
from coordinator.runs.rounds import Rounds
from coordinator.runs.secure.sums import SecureSums
from coordinator.runs.state import TOO_STALE, Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent
from protocols.errors import (
    UNDECIDED_CODES,
    CommonweightError,
    DiskFull,
    HomeError,
    StorageUnreachable,
    UpdateRefused,
)
from protocols.local.disk_space import is_disk_full
from protocols.local.timed_wait import wait_at_most
from protocols.messages.states import RunState
from protocols.privacy.secagg.messages import STEPS

log = logging.getLogger("commonweight.run")

#: How long peers with unfinished work may take to reconnect after the coordinator's restart.
RECONNECT_GRACE_S = 20.0
_SHORTAGE_RETRY_S = 5.0
_ASK_AGAIN_S = 1.0
#: How often a secure sum looks at the uploads in progress.
_SUM_POLL_S = 2.0
#: Reasons to refuse an answer that came too late or twice. Its owner need not act on them.
_OWNERS_NEED_NOT_KNOW = frozenset({"late", "replay", "not asked", TOO_STALE})


class RunLoop:
    """One active run. Set `changed`, in the loop's thread, when something happens that concerns it.

    `protected_digests()`: versions and states that other runs keep. Raises CommonweightError if the
    run's strategy cannot be made.
    """

    def __init__(
        self, run: Run, ctx: RunContext, protected_digests: Callable[[], Set[str]] = frozenset
    ) -> None:
        parts = RunParts.create(run, ctx)
        self._ctx = ctx
        self._recorder, self._timer = parts.recorder, parts.timer
        self.requests, self._parts = parts.requests, parts
        self._sums = SecureSums(parts)
        self._rounds = Rounds(parts, self._sums, protected_digests)
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
        if self.awaits_consent(peer):
            asyncio.get_running_loop().call_later(
                max(0.0, self._asked_again_at.get(peer, 0.0) + _ASK_AGAIN_S - time.monotonic()),
                self._ask_again,
                peer,
            )

    def _ask_again(self, peer: str) -> None:
        self._asked_again_at[peer] = time.monotonic()
        self._recorder.incompatible.discard(peer)
        self.changed.set()

    def awaits_consent(self, peer: str) -> bool:
        """True if the peer refused work because its owner has not allowed the task yet."""
        is_refused = peer in self._recorder.incompatible
        return is_refused and self.run.refusal_kinds.get(peer) in UNDECIDED_CODES

    @property
    def run(self) -> Run:
        """The present state."""
        return self._recorder.run

    @property
    def on_disk(self) -> Set[str]:
        """Digests of its versions, including older ones that peers still train on."""
        return self._rounds.on_disk

    @property
    def waiting_for(self) -> str:
        return self._recorder.waiting_for

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
                await self._execute(
                    candidates.after(self.run, steps.EndRun(RunState.FAILED, because))
                )
        self.requests.cancel_all()
        await self._collect()
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

    async def _end(self, state: RunState, because: str) -> None:
        await self._recorder.record(run_events.RunEnded(state, because))

    async def _step(self) -> None:
        """Do what there is to do now. If the disk is full, all of it can be repeated."""
        fills_buffer = self.run.buffered or self.run.folds_late
        if not (fills_buffer and self.run.state is RunState.AGGREGATING):
            await self._collect()  # else the replies belong to the next buffer
        if self.run.cohort is not None:
            await self._sums.ask()
        else:
            await self._send()
        if self._stop_reason:
            await self._end(RunState.STOPPED, self._stop_reason)
            return
        await self._execute(decisions.decide(self.run, self._observe()))

    async def _send(self) -> None:
        """Send the open request to the peers that have not got it yet."""
        await self._record_losses()
        if self.run.assignments:
            deadline_s = self.run.spec.deadline_s  # later, the request or its reply may be lost
            self.requests.cancel(lambda r: r.kind == "train" and r.seconds > deadline_s)
            await self.requests.send_assignments(self.run)
        await self.requests.send_pending(self.run)

    def _observe(self) -> decisions.Observation:
        deadline_passed = self._timer.phase_s >= decisions.phase_deadline_s(self.run)
        online = self._ctx.eligible()
        eligible = online - self._recorder.incompatible
        if self.run.folds_late:  # peers that still work for an older round get nothing else
            free = eligible - self.requests.late_bases(self.run).keys()
            eligible = free if len(free) >= self.run.spec.quorum else eligible
        unfit, absent = online & self._recorder.incompatible, self._ctx.enrolled() - online
        has_grace = time.monotonic() < self._grace_until
        sum_ = self._sums.progress(waits_for_absent=has_grace)
        return decisions.Observation(eligible, deadline_passed, unfit, absent, sum_)

    async def _execute(self, step: steps.Step) -> None:
        record = self._recorder.record
        match step:
            case steps.Wait():
                await self._wait(step)
            case steps.AgreeSchema():
                await self._agree()
            case steps.ChooseModel():
                await record(model_choice.choose(self.run))
                self._parts.follow(self.run)
            case steps.BeginModel():
                await self._begin_model(step)
            case steps.FetchVersion(version):
                self._timer.open_phase()
                await record(run_events.VersionSought(version))
            case steps.KeepOwn():
                own = run_events.Holding(self.run.round, self.run.head)
                self._parts.model.set_version(own.digest)
                state = retention.state_of(self.run, own, self._ctx.store)
                await record(run_events.VersionRecalled(own, "backup", state))
            case steps.AskPeers(peers, opens_phase):
                self._open_phase_if(opens_phase)
                run = self.run
                self.requests.cancel(lambda r: r.peer in peers and r.is_of(run))
                await record(run_events.PeersAsked(peers))
            case steps.AssignWork(given):
                self._open_phase_if(False)
                await record(*given)
            case steps.OpenRound():
                await self._rounds.open(step)
            case steps.CloseTraining(contributors):
                await record(run_events.TrainingClosed(self.run.round, contributors))
            case steps.FixCohort():
                await self._sums.fix_cohort()
            case steps.FixSharers():
                await self._sums.fix_sharers()
            case steps.FixSurvivors():
                await self._sums.fix_survivors()
            case steps.LoseCohort(because):
                await self._sums.lose(because)
            case steps.Aggregate(contributors):
                await self._rounds.aggregate(contributors)
            case steps.OpenEvaluation(eligible):
                chosen = decisions.select_peers(self.run, self.run.round, eligible)
                asked = await self.requests.configure(self.run, chosen)
                self._timer.open_phase()
                await record(run_events.EvaluationOpened(self.run.round, asked))
            case steps.CloseRound():
                await self._rounds.close()
            case steps.EndRun(state, because):
                await self._end(state, because)

    async def _begin_model(self, step: steps.BeginModel) -> None:
        """Begin the run's next model. What was asked and sent for the one before is obsolete."""
        self.requests.cancel_all()
        self.requests.clear_work()
        await self._recorder.record(candidates.event(self.run, step))
        self._ctx.store.uploads.clear()
        self._recorder.incompatible.clear()  # peers decide again for another model
        self._parts.follow(self.run)
        self._timer.open_phase()

    def _open_phase_if(self, opens_phase: bool) -> None:
        """Restart the deadline if it has passed, but not whenever a peer reconnects.

        A peer that comes and goes would delay the round for ever.
        """
        if opens_phase or self._observe().deadline_passed:
            self._timer.open_phase()

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

    async def _collect(self) -> None:
        """Validate the replies that have arrived and record the result of each."""
        replies = await self.requests.take_replies()
        with self._ctx.transfer.limits.keeping({request.peer for _, request, _ in replies}):
            # Concurrently: checking a large update takes as long as receiving it.
            results = [self._validate(request, reply) for _, request, reply in replies]
            events = await asyncio.gather(*results)
            await self._recorder.record(*(event for event in events if event is not None))
        self._ctx.store.mark_recorded(self.run.head)  # first weights, or a version from a peer
        if self.run.buffered:
            self._rounds.drop_unused_uploads({request.peer for _, request, _ in replies})
        self.requests.acknowledge([mid for mid, _, _ in replies], True)

    async def _validate(self, request: Request, reply: Message) -> RunEvent | None:
        try:
            if request.kind in STEPS:
                return await self._sums.take(request, reply)
            return await validate_reply(self.run, self._ctx, self._parts.model, request, reply)
        except UpdateRefused as err:
            if model_choice.is_missing(self.run, request.kind, err.reason):
                return run_events.ScoresMissing(request.peer, err.reason, err.message[:400])
            if not (reply.has_error() or err.reason in _OWNERS_NEED_NOT_KNOW):
                self._tell_owner(request.peer, err.message)
            return run_events.UpdateRefused(
                request.round,
                request.peer,
                err.reason,
                err.message[:400],
                request.kind,
                request.seconds,
            )

    async def _agree(self) -> None:
        agreement = schema_agreement.agree(self.run, self._parts.model.schema)
        await self._recorder.record(*agreement.events)
        for event in agreement.events:
            if isinstance(event, run_events.UpdateRefused):
                self._tell_owner(event.peer, event.detail)
        for peer, text in agreement.notes:
            if peer:
                self._tell_owner(peer, text)
            name = f"{self._ctx.name_of(peer)}: " if peer else ""
            self._recorder.report("warning", f"{name}{text}", peer)

    def _tell_owner(self, peer: str, text: str) -> None:
        self._ctx.tell_owner(peer, f"run {self.run.id}: {text}")
