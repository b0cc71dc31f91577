"""Answers messages in the work thread: handle one, send the reply, return the next.

Everything here blocks, except what is marked as running on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from flwr.app import Error, Message
from msgspec.structs import replace

from agent.clientapp.app import claim_text
from agent.clientapp.consent import ConsentNeeded
from agent.clientapp.interfaces import CheckLog
from agent.daemon import client_factory, state_machine
from agent.daemon.client_factory import Network, Trainers
from agent.daemon.context import AgentContext
from agent.daemon.state_machine import PauseLifted, PauseRequested, TrainerGaveUp
from agent.daemon.status_reporter import StatusReporter
from agent.home import consent_requests
from agent.home.consent_requests import Request
from agent.home.live_settings import LiveSettings
from agent.home.logs import owner_log
from agent.home.refusal_log import RefusalLog
from agent.policy.consent import Standing
from agent.tasks.work import Measure
from agent.trainer.ipc import Progress
from agent.trainer.retry import RetryingTrainer
from agent.trainer.supervisor import TrainerSupervisor
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.p2p.sharing import Sharing
from agent.transport.version_proofs import VersionIndex
from agent.transport.version_store import VersionStore
from agent.transport.weight_transfer import CoordinatorDiskFull, SessionLost
from protocols.errors import (
    AwaitingTrust,
    BadMessage,
    CommonweightError,
    DiskFull,
    HomeLocked,
    NotAllowed,
    SecureRefused,
    TrainerFailed,
    Unreachable,
    UploadRefused,
    UploadUnneeded,
)
from protocols.local.disk_space import free_bytes
from protocols.local.failpoints import failpoint, note
from protocols.messages import refusals
from protocols.messages.jobs import ANSWER_PATH
from protocols.messages.refusals import AGENT_FAILED
from protocols.messages.states import PauseReason
from protocols.network.backoff import delays

log = logging.getLogger("commonweight.agent")

#: The pause after the trainer has failed repeatedly.
TRAINER_COOLDOWN_S = 600.0
_POLL_EVERY_S = 0.5
#: Tries of an upload while the coordinator's disk is full, with a wait after each. The waits grow,
#: and the coordinator expects a try within 20 s.
_MAX_UPLOAD_TRIES, _MIN_UPLOAD_RETRY_S, _MAX_UPLOAD_RETRY_S = 12, 2.0, 15.0
#: The pause after a refused upload. The pauses grow.
_MIN_REFUSAL_WAIT_S, _MAX_REFUSAL_WAIT_S = 1.0, 20.0
#: On a full disk of this machine: work is tried again with this much more room, or after the wait.
_MORE_ROOM_BYTES, _DISK_RETRY_S = 1024 * 1024, 20.0


class WorkThread:
    """Owns the trainers, the versions and the ClientApp. `link()` returns the current session."""

    def __init__(
        self,
        ctx: AgentContext,
        report: StatusReporter,
        link: Callable[[], CoordinatorClient],
        sharing: Sharing,
        check_log: CheckLog,
    ) -> None:
        self._home, self._runner, self._report, self._link = ctx.home, ctx.runner, report, link
        #: The coordinator has refused the update of the present work; the work has an update.
        self._is_refused = self._has_update = False
        self._cooldown_end: asyncio.TimerHandle | None = None
        #: The trainer has given up, and the pause that follows may not be in force yet.
        self._gave_up = False
        #: The last refusal of an update that was reported, and the waits after further ones.
        self._reported_refusal, self._refusal_waits = "", _refusal_waits()
        job_folder = ctx.home / "jobs" / "models"
        for folder in (ctx.cache, ctx.home / "outbox", ctx.home / "trainer", job_folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._heads = VersionIndex(ctx.cache, ctx.coordinator_public, ctx.enrollment.fleet)
        self.versions = VersionStore(ctx.cache, link, sharing, ctx.bandwidth.received)
        self._network = Network(
            link,
            self.versions,
            VersionStore(job_folder, link),
            self._upload_update,
            self._upload_answer,
            check_log,
        )
        self._owner, self._refusals = LiveSettings(ctx.home), RefusalLog(ctx.home)
        #: Tasks that the coordinator asked for and that wait for the owner's consent.
        self._asked: dict[str, Standing] = {}
        #: The coordinator asked for work of a secure run, and the owner trusts too few peers.
        self._needs_trust = False

        def on_progress(progress: Progress) -> None:
            ctx.runner.call_threadsafe(self._on_progress, progress)

        self.trainer = client_factory.make_trainer(ctx, self._owner, on_progress)
        retrying = RetryingTrainer(
            self.trainer, tries=ctx.settings.trainer_tries, on_given_up=self._on_given_up
        )
        apps = client_factory.make_app_trainer(ctx, self._owner, on_progress)
        #: One of them works at a time.
        self.trainers: tuple[TrainerSupervisor, ...] = (self.trainer, apps)
        self._retrying_trainer, self._app_trainer = retrying, apps
        self._own = client_factory.make_comparisons(ctx, self.trainer, self._owner, link)
        self._client = client_factory.make_client(
            ctx, Trainers(self.trainer, retrying, apps), self._owner, self._network, self._own
        )

    def pids(self) -> list[int]:
        """The processes of this agent."""
        trainers = (trainer.pid for trainer in self.trainers)
        return [os.getpid(), *(pid for pid in trainers if pid is not None)]

    def make_room(self, nbytes: int) -> int:
        """Delete up to `nbytes` of versions that nothing needs; return how many bytes that freed.

        The newest version stays, for answers and for other peers. During work all stay.
        """
        if self._runner.state.work is not None:
            return 0
        newest = self._heads.newest()
        freed = self._network.job_models.shrink(nbytes, ())
        return freed + self.versions.shrink(nbytes - freed, {newest.digest} if newest else ())

    def yield_to_runs(self) -> None:
        """Cancel the running part of a comparison. It is done again when there is no work."""
        self.trainer.cancel(Measure)

    def resume_sum(self) -> None:
        """After a start: answer the steps of a secure sum that has this peer's card."""
        self._client.secure.resume()

    def close(self) -> None:
        """Stop the trainers for good. This also ends a wait for them or for the next try."""
        self._retrying_trainer.close()
        self._app_trainer.close()
        self._client.training.close()

    def pull(self, *, steps_only: bool) -> Message | None:
        """The next message, or None. Deletes what is left of a secure sum that is over.

        Raises Unreachable, SessionLost.
        """
        link, open_sum = self._link(), self._client.secure.open_sum()
        message = link.pull(steps_only=steps_only, open_sum=open_sum)
        if open_sum is not None and link.sum_is_over:
            self._client.end_sum()
        # Training ahead has the trainer, and a comparison would wait for its end.
        is_free = open_sum is None and not steps_only and self._runner.state.ahead is None
        while message is None and is_free and self._takes_more_work() and self._own.advance():
            message = link.pull()
        return message

    def next_poll_s(self, idle_s: float) -> float:
        """How long to wait for a doorbell before the next `pull`."""
        polls_s = state_machine.poll_interval_s(self._runner.state, idle_s)
        return min(polls_s, max(1.0, self._own.due_s)) if self._takes_more_work() else polls_s

    def answer(self, message: Message) -> Message | None:
        """Handle a message, send the reply, and return the next message, if there is one.

        Raises Unreachable or SessionLost: the finished reply stays in the outbox, and the
        coordinator asks again.
        """
        failpoint("agent.message.taken")
        self._gave_up, self._is_refused, self._has_update = False, False, False
        reply = self._handle(message)
        if reply is None:
            return None
        self._report.count_answer()
        following: Message | None = None
        failpoint("agent.claim.sending")
        link = self._link()
        try:
            if self._takes_more_work():
                following = link.exchange(reply)
            elif state_machine.can_answer_steps(self._runner.state):
                following = link.exchange(reply, steps_only=True)
            else:
                link.push(reply)
        except (UploadRefused, UploadUnneeded) as err:  # a small update travels with its reply
            link.push(self._failure(message, err))
        else:
            if link.acknowledged and (claim := claim_text(reply)):
                note("acknowledged", claim=claim)
        failpoint("agent.claim.sent")
        if self._is_refused:
            self._sleep(next(self._refusal_waits))
        elif self._has_update:
            self._reported_refusal, self._refusal_waits = "", _refusal_waits()
        return following

    def _takes_more_work(self) -> bool:
        is_willing = state_machine.is_willing(self._runner.state)
        return is_willing and not self._gave_up and not self._is_refused

    def _handle(self, message: Message) -> Message | None:
        """The reply: a result, or the error that says why there is none. None: the agent stops."""
        try:
            return self._handle_with_room(message)
        except (Unreachable, SessionLost):
            raise
        except CommonweightError as err:
            if self._runner.stopping.is_set():
                return None
            return self._failure(message, err)

    def _failure(self, message: Message, err: CommonweightError) -> Message:
        """The reply to work that has failed. Tells the owner; a refusal that repeats, once."""
        refusal = refusals.refusal_of(err)  # has no path and no data; the operator reads it
        text = f"{err.message}; {err.hint}" if err.hint else err.message
        is_new = True
        match err:
            case ConsentNeeded():
                self._asked[err.request.task] = err.standing
                self._ask_owner(err.request)
                is_new = False
            case NotAllowed() | SecureRefused() | TrainerFailed(kind=NotAllowed.code):
                self._needs_trust |= isinstance(err, AwaitingTrust)
                is_new = self._refusals.note(message.metadata.group_id, "", text)
            case UploadUnneeded():
                log.info("%s", text)
                is_new = False
            case UploadRefused() | BadMessage():  # the next ones are probably no better: slow down
                is_new = text != self._reported_refusal
                self._is_refused, self._reported_refusal = True, text
            case TrainerFailed(kind="cancelled"):
                is_new = False
        if is_new:
            log.error("the work failed: %s", refusal.text)
            if not (err.message in refusal.text and err.hint in refusal.text):
                owner_log.error("%s", text)
            self._report.set_last_error(text)
        return Message(Error(AGENT_FAILED, refusal.encode()), reply_to=message)

    def _ask_owner(self, request: Request) -> None:
        """Tell the owner once which run waits for their consent, and what gives it."""
        known = consent_requests.read(self._home).get(request.task)
        if known is not None and replace(known, run=request.run, at=request.at) == request:
            request = replace(request, at=known.at)
        if known == request:
            return
        try:
            consent_requests.add(self._home, request)
        except (OSError, HomeLocked) as err:
            why = err.strerror if isinstance(err, OSError) else err.message
            log.warning("cannot write %s: %s", consent_requests.FILE, why)
        if self._refusals.note(request.run, request.task, request.line):
            log.warning("%s", request.line)
        self._runner.call_threadsafe(self._report.mark_stale)

    def owner_has_decided(self) -> bool:
        """True if the owner has decided something about a task that the coordinator asked for, or
        trusts the peers that a secure run needs."""
        chosen = self._owner()
        asked = list(self._asked.items())  # a copy, because the work thread may add one
        decided = [task for task, before in asked if chosen.standing_of(task) != before]
        for task in decided:
            self._asked.pop(task, None)
        trusts = self._needs_trust and not chosen.missing_trust
        self._needs_trust = self._needs_trust and not trusts
        return bool(decided) or trusts

    def _handle_with_room(self, message: Message) -> Message:
        """The client's reply. While this machine's disk is full: pause, and try again."""
        while True:
            try:
                return self._client.handle(message)
            except DiskFull as err:
                if self._runner.stopping.is_set():
                    raise
                text = f"no room on the disk: {err.message}"
                self._runner.call_threadsafe(self._report.report_error, text)
            self._runner.dispatch_threadsafe(PauseRequested(PauseReason.DISK))
            self._wait_for_room(free_bytes(self._home) + _MORE_ROOM_BYTES)
            self._runner.dispatch_threadsafe(PauseLifted(frozenset({PauseReason.DISK})))

    def _wait_for_room(self, enough_bytes: int) -> None:
        self._sleep(_DISK_RETRY_S, lambda: free_bytes(self._home) >= enough_bytes)

    def _upload_update(self, digest: str, path: Path) -> None:
        self._has_update = True
        self._retry_while_full(lambda: self._link().upload_update(digest, path))

    def _upload_answer(self, digest: str, path: Path) -> None:
        self._retry_while_full(lambda: self._link().upload(digest, path, ANSWER_PATH))

    def _retry_while_full(self, send: Callable[[], None]) -> None:
        """Send; retry for a while if the coordinator's disk is full. Raises CoordinatorDiskFull."""
        waits = delays(Random(), _MIN_UPLOAD_RETRY_S, _MAX_UPLOAD_RETRY_S)
        for _ in range(_MAX_UPLOAD_TRIES):
            try:
                return send()
            except CoordinatorDiskFull as err:
                self._report.set_last_error(err.message)
                self._sleep(next(waits))
                if self._runner.stopping.is_set():
                    raise
        raise CoordinatorDiskFull("the coordinator has had no room on its disk for too long")

    def _sleep(self, max_s: float, ready: Callable[[], bool] = lambda: False) -> None:
        """Wait until `ready()`, the end of the agent, or the end of `max_s`."""
        until = time.monotonic() + max_s
        while time.monotonic() < until and not self._runner.stopping.is_set() and not ready():
            time.sleep(_POLL_EVERY_S)

    def _on_given_up(self, kind: str) -> None:
        self._gave_up = True
        self._runner.call_threadsafe(self._start_cooldown, kind)

    # --- on the event loop ---

    def _start_cooldown(self, kind: str) -> None:
        """Pause: the trainer has failed repeatedly."""
        self._runner.dispatch(TrainerGaveUp(kind, time.time() + TRAINER_COOLDOWN_S))
        if self._cooldown_end is not None:  # the owner may have ended an earlier cooldown
            self._cooldown_end.cancel()
        lifted = PauseLifted(frozenset({PauseReason.TRAINER}))
        self._cooldown_end = self._runner.dispatch_later(TRAINER_COOLDOWN_S, lifted)

    def _on_progress(self, progress: Progress) -> None:
        self._report.progress(self._runner.state, progress, self.trainer.rss_bytes)


def _refusal_waits() -> Iterator[float]:
    return delays(Random(), _MIN_REFUSAL_WAIT_S, _MAX_REFUSAL_WAIT_S)
