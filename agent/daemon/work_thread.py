"""The work of the agent: a message in, its answer out, whatever the disk and the trainer do.

Blocking, in the work thread; what others must know of it goes to the event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flwr.app import Error, Message

from agent.analytics import job_handler
from agent.clientapp.app import Client, claim_text, refusal_text
from agent.clientapp.inference_jobs import Inferring, find_version
from agent.clientapp.interfaces import Observer, PeerIdentity, Queries
from agent.clientapp.jobs import Handler, Jobs
from agent.clientapp.recovery import Recall
from agent.daemon import state_machine
from agent.daemon.state_machine import (
    PauseLifted,
    PauseRequested,
    SendingStarted,
    TrainerGaveUp,
    WorkEnded,
    WorkStarted,
)
from agent.daemon.state_runner import StateRunner
from agent.daemon.status_reporter import StatusReporter
from agent.home import audit_log, settings
from agent.home.credentials import Credentials
from agent.home.settings import AgentSettings, Enrollment, data_settings
from agent.trainer.ipc import Progress
from agent.trainer.process import TrainerProcess
from agent.trainer.retry import WORTH_A_TRY_IN_JOBS, Watchdog
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.p2p.sharing import Sharing
from agent.transport.version_proofs import VersionIndex, save_proof
from agent.transport.version_store import VersionStore
from agent.transport.weight_transfer import CoordinatorDiskFull, SessionLost
from protocols.errors import CommonweightError, DiskFull, TrainerFailed, Unreachable
from protocols.failpoints import failpoint, note
from protocols.local.disk_space import free_bytes
from protocols.messages.jobs import ANSWER_PATH, INPUT_PATH, Analyze, Private, Scatter, UnitQuestion
from protocols.messages.states import PauseReason
from protocols.messages.work import UpdateClaim, Work

#: After the trainer failed again and again: then the agent tries once more by itself.
TRAINER_COOLDOWN_S = 600.0
_POLL_EVERY_S = 0.5
#: While the coordinator's disk is full: an upload is tried so often, each time after a rest.
_MAX_UPLOAD_TRIES, _UPLOAD_RETRY_S = 12, 5.0
#: While ours is full: tried again with so much more room, or after that time.
_MORE_ROOM_BYTES, _DISK_RETRY_S = 1024 * 1024, 20.0
_CLIENT_APP_ERROR = 2  # Flower's code for an exception in a ClientApp; the reason is in its text


class _Weights(NamedTuple):
    """The client's transport: versions from the cache or the network, updates to the link."""

    versions: VersionStore
    upload: Callable[[str, Path], None]

    def fetch(self, work: Work) -> Path:
        if work.patch_bytes:
            self.versions.rebuild(work)
        return self.versions.fetch(work.base, work.nbytes)

    def send(self, digest: str, path: Path) -> None:
        self.upload(digest, path)


class _Events(Observer):
    """Tells the state machine what the client does, and keeps proofs and the owner's ledger."""

    def __init__(self, home: Path, loop: StateRunner, trainer: TrainerProcess) -> None:
        self._home, self._loop, self._trainer = home, loop, trainer

    def on_work(self, work: Work | None) -> None:
        self._loop.dispatch_threadsafe(WorkStarted(work) if work else WorkEnded())

    def on_version(self, work: Work, payload: bytes, signature: bytes) -> None:
        save_proof(self._home / "cache", work, payload, signature)

    def on_leaving(self, claim: UpdateClaim, task: str, description: bytes) -> None:
        audit_log.write_update(self._home, claim, task, description)

    def on_sending(self) -> None:
        self._loop.dispatch_threadsafe(SendingStarted())

    def on_trained(self) -> None:
        self._trainer.forget()


class WorkThread:
    """Holds the trainer, the outbox and the versions. `link()` gives the session of the moment."""

    def __init__(
        self,
        home: Path,
        enrollment: Enrollment,
        credentials: Credentials,
        chosen: AgentSettings,
        runner: StateRunner,
        report: StatusReporter,
        link: Callable[[], CoordinatorClient],
        sharing: Sharing | None = None,
        received: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self._home, self._runner, self._report, self._link = home, runner, report, link
        cache, outbox = home / "cache", home / "outbox"
        for folder in (cache, outbox, home / "trainer", home / "jobs" / "models"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.trainer = TrainerProcess(
            home / "trainer",
            data_settings(chosen, home / "trainer"),
            threads=chosen.threads,
            nice=chosen.nice,
            fleet=chosen.fleet,
            on_progress=lambda progress: runner.call_threadsafe(self._on_progress, progress),
            hang_s=chosen.hang_timeout_s,
            journal_every_s=chosen.checkpoint_interval_s,
            sources=chosen.task_files,
        )
        self._watchdog = Watchdog(
            self.trainer,
            tries=chosen.trainer_tries,
            on_given_up=self._on_given_up,
        )
        #: The trainer's rest that follows is not in force yet.
        self._gave_up = False
        self._cooldown_end: asyncio.TimerHandle | None = None
        self._heads = VersionIndex(cache, enrollment.coordinator_public)
        self.versions = VersionStore(cache, link, sharing, received)
        me = PeerIdentity(enrollment.peer, credentials.sign_key.sign, enrollment.coordinator_public)
        events = _Events(home, runner, self.trainer)
        jobs = Jobs(
            me,
            outbox / "answers",
            send=self._upload_answer,
            handlers=self._handlers(),
            on_work=events.on_work,
            on_leaving=partial(audit_log.write_answer, home),
        )
        self._client = Client(
            me,
            self._watchdog,
            _Weights(self.versions, self._upload_update),
            outbox,
            allowed=chosen.allows,
            observer=events,
            queries=Queries(Recall(me, cache, self._upload_update).answer, jobs.answer),
        )

    def _handlers(self) -> dict[type[UnitQuestion], Handler]:
        """What this agent can do for jobs, by the type of the question."""
        pinned = self._pinned = VersionStore(self._home / "jobs" / "models", self._link)
        # What others ask may fail as it likes: no reason to take no work for a while.
        patient = Watchdog(self.trainer, tries=2, worth=WORTH_A_TRY_IN_JOBS)
        inferring = Inferring(
            patient,
            lambda: settings.read(self._home),
            lambda model: find_version(self._home / "cache", model, pinned.fetch),
            lambda digest, nbytes, target: self._link().download(
                digest, nbytes, target, INPUT_PATH
            ),
            self._home / "jobs",
            self._home / "predictions",
        )
        return {
            Scatter: inferring.scatter,
            Private: inferring.private,
            Analyze: job_handler.handler(lambda: settings.read(self._home), self._home),
        }

    def pids(self) -> list[int]:
        """The processes of this agent."""
        trainer = self.trainer.pid
        return [os.getpid()] if trainer is None else [os.getpid(), trainer]

    def make_room(self, nbytes: int) -> int:
        """Drop versions that nothing needs, up to so many bytes; how many became free.

        Kept are the newest, for answers and for peers, and all while there is work.
        """
        if self._runner.state.work is not None:
            return 0
        newest = self._heads.newest()
        freed = self._pinned.shrink(nbytes, ())
        return freed + self.versions.shrink(nbytes - freed, {newest.digest} if newest else ())

    def close(self) -> None:
        """End the trainer for good: a wait for it, or for its next try, ends too."""
        self._watchdog.close()

    def answer(self, message: Message) -> Message | None:
        """Do the work of a message and send the reply; the next message. Raises Unreachable."""
        failpoint("agent.message.taken")
        self._gave_up = False
        try:
            reply = self._handle(message)
        except (Unreachable, SessionLost):
            raise  # the answer is in the outbox; the question will be asked again
        except CommonweightError as err:
            if self._runner.stopping.is_set():
                return None
            if not (isinstance(err, TrainerFailed) and err.kind == "cancelled"):
                self._runner.call_threadsafe(
                    self._report.report_error, f"the work failed: {err.message}"
                )
            reply = Message(Error(_CLIENT_APP_ERROR, refusal_text(err)), reply_to=message)
        self._report.count_answer()
        following: Message | None = None
        failpoint("agent.claim.sending")
        link = self._link()
        if state_machine.is_willing(self._runner.state) and not self._gave_up:
            following = link.exchange(reply)
        else:
            link.push(reply)
        if link.settled and (claim := claim_text(reply)):
            note("acknowledged", claim=claim)
        failpoint("agent.claim.sent")
        return following

    def _handle(self, message: Message) -> Message:
        """The client's reply; while the disk is full, paused, and then tried again."""
        while True:
            try:
                return self._client.handle(message)
            except DiskFull as err:
                if self._runner.stopping.is_set():
                    raise
                self._runner.call_threadsafe(
                    self._report.report_error, f"no room on the disk: {err.message}"
                )
            self._runner.dispatch_threadsafe(PauseRequested(PauseReason.DISK))
            self._wait_for_room(free_bytes(self._home) + _MORE_ROOM_BYTES)
            self._runner.dispatch_threadsafe(PauseLifted(frozenset({PauseReason.DISK})))

    def _wait_for_room(self, enough_bytes: int) -> None:
        self._sleep(_DISK_RETRY_S, lambda: free_bytes(self._home) >= enough_bytes)

    def _upload_update(self, digest: str, path: Path) -> None:
        """Hand in an update."""
        self._retry_while_full(lambda: self._link().upload_update(digest, path))

    def _upload_answer(self, digest: str, path: Path) -> None:
        """Hand in a job's answer."""
        self._retry_while_full(lambda: self._link().upload(digest, path, ANSWER_PATH))

    def _retry_while_full(self, send: Callable[[], None]) -> None:
        """Send; waits a while for a coordinator whose disk is full."""
        for _ in range(_MAX_UPLOAD_TRIES):
            try:
                return send()
            except CoordinatorDiskFull as err:
                self._report.set_last_error(err.message)
                self._sleep(_UPLOAD_RETRY_S)
                if self._runner.stopping.is_set():
                    raise
        raise CoordinatorDiskFull("the coordinator has had no room on its disk for too long")

    def _sleep(self, most_s: float, ready: Callable[[], bool] = lambda: False) -> None:
        """Wait for the time, until `ready` or the agent's end."""
        until = time.monotonic() + most_s
        while time.monotonic() < until and not self._runner.stopping.is_set() and not ready():
            time.sleep(_POLL_EVERY_S)

    def _on_given_up(self, kind: str) -> None:
        self._gave_up = True
        self._runner.call_threadsafe(self._start_cooldown, kind)

    # --- on the event loop ---

    def _start_cooldown(self, kind: str) -> None:
        """No more work for now: the trainer failed again and again."""
        self._runner.dispatch(TrainerGaveUp(kind, time.time() + TRAINER_COOLDOWN_S))
        if (
            self._cooldown_end is not None
        ):  # the owner has ended that rest: its end is not this one's
            self._cooldown_end.cancel()
        lifted = PauseLifted(frozenset({PauseReason.TRAINER}))
        self._cooldown_end = self._runner.dispatch_later(TRAINER_COOLDOWN_S, lifted)

    def _on_progress(self, progress: Progress) -> None:
        self._report.progress(self._runner.state, progress, self.trainer.rss_bytes)
