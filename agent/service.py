"""The agent at work: one process that keeps a link, a presence and a trainer, for months.

The thin shell around `worker`: it turns what happens into events, and does what the machine says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import psutil
from flwr.app import Error, Message
from msgspec.structs import replace

from agent import control, logs, shared_log, tasks, worker
from agent.client import Client, claim_text, refusal_text
from agent.control import Status, Wish
from agent.frames import Progress
from agent.kept import prove
from agent.link import BEAT_EVERY_S, Credentials, Link, NoRoom, SessionLost
from agent.presence import PresenceLink
from agent.settings import AgentSettings, Enrolment, write_enrolment
from agent.tasks import DataSettings
from agent.trainer_process import TrainerProcess
from agent.versions import Versions
from agent.wake import Clocks, slept_s
from agent.watchdog import WORTH_A_TRY, Watchdog
from agent.worker import (
    Announce,
    BrokerChanged,
    FinishAsked,
    Leave,
    LookForWork,
    PauseAsked,
    PauseLifted,
    PauseTrainer,
    ResumeTrainer,
    SendingBegan,
    SessionChanged,
    TrainerGaveUp,
    WorkBegan,
    WorkEnded,
    Worker,
)
from protocols import VERSION, identity
from protocols.backoff import delays
from protocols.errors import CommonweightError, DiskFull, TrainerFailed, Unreachable
from protocols.failpoints import failpoint, note
from protocols.messages import (
    Command,
    Doorbell,
    LogLine,
    LogsAsked,
    LogsTold,
    Notice,
    Presence,
    Telemetry,
)
from protocols.mqtt import MqttAddress
from protocols.room import free_bytes
from protocols.states import PauseReason

log = logging.getLogger("commonweight.agent")

T = TypeVar("T")

RENEW_BEFORE_S = 60 * 86400.0
_TICK_S = 0.5
#: After the trainer failed again and again: then the agent tries once more by itself.
TRAINER_REST_S = 600.0
_ASKED_FOR = frozenset({PauseReason.USER, PauseReason.OPERATOR, PauseReason.TRAINER})
_BEAT_AGAIN_S = 5.0
#: While the coordinator's disk is full: an upload is tried so often, each time after a rest.
_UPLOAD_TRIES, _UPLOAD_AGAIN_S = 12, 5.0
#: While ours is full: tried again with so much more room, or after that time.
_MORE_ROOM_BYTES, _TRY_AGAIN_S = 1024 * 1024, 20.0
_FAILED = 2  # Flower's code for an exception in a ClientApp; the reason is in its text


class Agent:
    """One enrolled machine at work. `serve` runs it until it is told to stop."""

    def __init__(self, home: Path, enrolment: Enrolment, chosen: AgentSettings) -> None:
        self._home, self._enrolment, self._settings = home, enrolment, chosen
        self._worker = Worker()
        self._credentials = Credentials.of(home, enrolment)
        self._cache, self._outbox = home / "cache", home / "outbox"
        for folder in (self._cache, self._outbox, home / "trainer"):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._trainer = TrainerProcess(
            home / "trainer",
            DataSettings(
                index=chosen.part,
                parts=chosen.parts,
                split=chosen.split,
                seed=chosen.data_seed,
                path=chosen.data,
                cache=str(home / "trainer"),
                device=chosen.device,
                compile=chosen.compile,
            ),
            threads=chosen.threads,
            on_progress=self._on_progress_thread,
            hang_s=chosen.hang_timeout_s,
            journal_every_s=chosen.checkpoint_interval_s,
        )
        self._watchdog = Watchdog(
            self._trainer,
            tries=chosen.trainer_tries,
            on_given_up=lambda kind: self._soon(self._rest_trainer, kind),
        )
        versions = Versions(self._cache, self._session)
        self._client = Client(
            peer=enrolment.peer,
            sign=self._credentials.sign_key.sign,
            coordinator_public=enrolment.coordinator_public,
            trainer=self._watchdog,
            outbox=self._outbox,
            fetch=versions.fetch,
            patch=versions.rebuild,
            send=self._send,
            allowed=chosen.allows,
            on_work=lambda work: self._from_thread(WorkBegan(work) if work else WorkEnded()),
            on_sending=lambda: self._from_thread(SendingBegan()),
            on_trained=self._trainer.forget,
            on_held=partial(prove, self._cache),
        )
        self._link: Link | None = None
        # Named threads of our own: one for the work, one for the heartbeat.
        self._working = ThreadPoolExecutor(1, "work")
        self._beating = ThreadPoolExecutor(1, "heartbeat")
        self._presence: PresenceLink | None = None
        self._doorbell = asyncio.Event()
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = psutil.Process()
        self._bytes = (0, 0)
        self._worked_at = 0.0
        self._waking: asyncio.Task[None] | None = None
        self._wish = Wish()
        self._tasks = tuple(task for task in tasks.names() if chosen.allows(task))
        self._status_is_old = True
        self._status = Status(
            pid=os.getpid(),
            at=time.time(),
            since=time.time(),
            peer=enrolment.peer,
            name=enrolment.name,
            version=VERSION,
            state="idle",
            coordinator=enrolment.addresses[0],
        )

    # --- life ---

    async def serve(self) -> None:
        """Work until `stop`, SIGINT or SIGTERM. Leaves no process behind."""
        self._loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
                self._loop.add_signal_handler(name, self.stop)
        self._presence = PresenceLink(
            self._enrolment.mqtt,
            self._enrolment.fleet,
            self._enrolment.peer,
            self._credentials.sign_key.sign,
            self._enrolment.coordinator_public,
            self._on_command,
            self._on_mqtt,
        )
        self._announce()
        running = [
            asyncio.create_task(work, name=name)
            for name, work in {
                "link": self._keep_link(),
                "heartbeat": self._keep_beating(),
                "presence": self._presence.run(),
                "wishes": self._keep_wishes(),
            }.items()
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({*running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()  # a part that ended did so with an error: raise it
        finally:
            self._stopping.set()
            stopping.cancel()
            # Unblocks the work thread if it waits for the trainer or the wire.
            await asyncio.to_thread(self._watchdog.close)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            if self._link is not None:
                await asyncio.to_thread(self._link.close)
            self._working.shutdown(wait=False, cancel_futures=True)
            self._beating.shutdown(wait=False, cancel_futures=True)
            self._status.state, self._status.reason = "stopped", ""
            self._write_status()

    def stop(self) -> None:
        self._stopping.set()

    # --- events in, instructions out ---

    def _happened(self, event: worker.Event) -> None:
        self._worker, instructions = worker.handle(self._worker, event)
        for instruction in instructions:
            match instruction:
                case Announce():
                    self._announce()
                case PauseTrainer():
                    self._trainer.pause()
                case ResumeTrainer():
                    self._trainer.resume()
                case LookForWork():
                    self._doorbell.set()
                case Leave():
                    self.stop()

    def _from_thread(self, event: worker.Event) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._happened, event)

    def _announce(self) -> None:
        """Say what the worker is, on MQTT and, within a tick, in the status file."""
        state, reason = worker.shown(self._worker)
        work = self._worker.work
        if self._presence is not None:
            self._presence.set_presence(
                Presence(
                    state=state,
                    reason=reason,
                    name=self._enrolment.name,
                    version=VERSION,
                    task=work.task if work else "",
                    run=work.run if work else "",
                    round=work.round if work else 0,
                    tasks=self._tasks,
                    policy=self._settings.announced(),
                    disk_free_bytes=_disk_free(self._home),
                )
            )
        self._status.state, self._status.reason = state.value, reason
        self._status.run = work.run if work else ""
        self._status.round = work.round if work else 0
        self._status_is_old = True

    def _write_status(self) -> None:
        self._status.at = time.time()
        self._status.session, self._status.mqtt = self._worker.session, self._worker.mqtt
        up, down = self._traffic()
        self._status.bytes_up, self._status.bytes_down = up, down
        try:
            control.write_status(self._home, self._status)
        except OSError as err:  # a full disk must not end the agent
            log.warning("cannot write the status file: %s", err)

    def _complain(self, text: str) -> None:
        """Tell the owner, the log and the monitor of a failure."""
        log.error("%s", text)
        self._status.last_error = text
        if self._presence is not None:
            self._presence.notice(Notice(level="error", text=text[:400]))

    # --- the link ---

    async def _keep_link(self) -> None:
        """Open a session, work, and open it again whenever it is lost; for ever."""
        waits = delays(Random(), 0.3, 15.0)
        while True:
            try:
                await self._in_thread(self._open_session)
                self._happened(SessionChanged(True))
                self._status_is_old = True
                self._write_status()
                log.info("connected to %s", self._credentials.address)
                waits = delays(Random(), 0.3, 15.0)
                await self._work_on()
            except CommonweightError as err:
                if self._worker.session:
                    log.warning("lost the coordinator: %s", err.message)
                else:
                    log.debug("no session: %s", err.message)
                self._status.last_error = err.message
            except Exception as err:  # an agent runs for months: no surprise may end it
                log.exception("unexpected trouble with the link")
                self._complain(f"unexpected trouble: {type(err).__name__}")
            self._happened(SessionChanged(False))
            self._status_is_old = True
            # A doorbell means that the coordinator is back: no need to wait to the end.
            self._doorbell.clear()
            await self._rung(next(waits))

    async def _rung(self, within_s: float) -> None:
        """Wait for a doorbell, but not longer than that."""
        # Not wait_for: before Python 3.12 it loses a cancel that comes together with the doorbell.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._doorbell.wait()

    def _open_session(self) -> None:
        if self._link is None:
            self._link = Link(self._credentials)
        self._link.open()
        self._learn_mqtt(self._link.mqtt())
        self._keep_certificate(self._link)

    def _keep_certificate(self, link: Link) -> None:
        """Renew the node certificate in the last two months of its year."""
        ca_pem = self._enrolment.ca_pem.encode()
        ends_at = identity.read_certificate(ca_pem, self._enrolment.certificate).not_after
        if ends_at - time.time() < RENEW_BEFORE_S:
            certificate = link.renew()
            identity.read_certificate(ca_pem, certificate)
            self._enrolment = replace(self._enrolment, certificate=certificate)
            write_enrolment(self._home, self._enrolment)

    def _learn_mqtt(self, address: MqttAddress) -> None:
        """The broker's password changes when a peer is removed: keep what holds now."""
        if address != self._enrolment.mqtt:
            self._enrolment = replace(self._enrolment, mqtt=address)
            write_enrolment(self._home, self._enrolment)
            if self._presence is not None:
                self._soon(self._presence.move, address)

    async def _work_on(self) -> None:
        """Pull and answer messages while the session lasts. Raises Unreachable, SessionLost."""
        assert self._link is not None
        link = self._link
        while True:
            self._doorbell.clear()
            if worker.can_take_work(self._worker):
                message = await self._in_thread(link.pull)
                while message is not None:
                    message = await self._in_thread(self._answer, message)
                    self._worked_at = time.monotonic()
            wait_s = worker.poll_s(self._worker, time.monotonic() - self._worked_at)
            await self._rung(wait_s)

    def _answer(self, message: Message) -> Message | None:
        """Do the work of a message and send the reply; the next message (in the work thread)."""
        assert self._link is not None
        failpoint("agent.message.taken")
        gave_up = False  # the pause that follows is not in force yet
        try:
            reply = self._handled(message)
        except (Unreachable, SessionLost):
            raise  # the answer is in the outbox; the question will be asked again
        except CommonweightError as err:
            if self._stopping.is_set():
                return None
            if not (isinstance(err, TrainerFailed) and err.kind == "cancelled"):
                self._soon(self._complain, f"the work failed: {err.message}")
            gave_up = isinstance(err, TrainerFailed) and err.kind in WORTH_A_TRY
            reply = Message(Error(_FAILED, refusal_text(err)), reply_to=message)
        self._status.rounds_done += 1
        following: Message | None = None
        failpoint("agent.claim.sending")
        if worker.is_willing(self._worker) and not gave_up:
            following = self._link.exchange(reply)
        else:
            self._link.push(reply)
        if self._link.settled and not reply.has_error():
            note("acknowledged", claim=claim_text(reply))
        failpoint("agent.claim.sent")
        return following

    def _rest_trainer(self, kind: str) -> None:
        """No more work for now: the trainer failed again and again."""
        self._happened(TrainerGaveUp(kind))
        assert self._loop is not None
        lifted = PauseLifted(frozenset({PauseReason.TRAINER}))
        self._loop.call_later(TRAINER_REST_S, self._happened, lifted)

    def _handled(self, message: Message) -> Message:
        """The client's reply; while the disk is full, paused, and then tried again."""
        while True:
            try:
                return self._client.handle(message)
            except DiskFull as err:
                if self._stopping.is_set():
                    raise
                self._soon(self._complain, f"no room on the disk: {err.message}")
            self._from_thread(PauseAsked(PauseReason.DISK))
            self._wait_for_room(free_bytes(self._home) + _MORE_ROOM_BYTES)
            self._from_thread(PauseLifted(frozenset({PauseReason.DISK})))

    def _wait_for_room(self, enough_bytes: int) -> None:
        self._rest(_TRY_AGAIN_S, lambda: free_bytes(self._home) >= enough_bytes)

    async def _keep_beating(self) -> None:
        """Heartbeats, also while the work thread is busy; a lost session is opened again."""
        while True:
            link = self._link
            due_s = link.beat_due_s if link is not None and self._worker.session else BEAT_EVERY_S
            if link is None or due_s > 0:
                await asyncio.sleep(due_s)
                continue
            if not await self._beat(link):
                await asyncio.sleep(_BEAT_AGAIN_S)

    async def _beat(self, link: Link) -> bool:
        """One heartbeat; False if it failed."""
        try:
            await self._in_thread(link.beat, pool=self._beating)
            return True
        except SessionLost:
            with contextlib.suppress(CommonweightError):
                await self._in_thread(link.open, pool=self._beating)
        except CommonweightError as err:
            log.debug("a heartbeat failed: %s", err.message)
        return False

    async def _wake(self, slept: float) -> None:
        """Connect anew at once: what was open before a sleep is dead, and nobody says so."""
        log.info("back after %.0f s of sleep: connecting anew", slept)
        if self._presence is not None:
            self._presence.reconnect()
        if self._link is not None:
            await self._in_thread(self._link.reconnect, pool=self._beating)
            if self._worker.session:
                await self._beat(self._link)
        self._doorbell.set()

    async def _in_thread(
        self, work: Callable[..., T], *arguments: Any, pool: ThreadPoolExecutor | None = None
    ) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool or self._working, work, *arguments)

    def _soon(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    # --- the lane ---

    def _session(self) -> Link:
        assert self._link is not None
        return self._link

    def _send(self, digest: str, path: Path) -> None:
        """Upload; waits a while for a coordinator whose disk is full (in the work thread)."""
        for _ in range(_UPLOAD_TRIES):
            try:
                return self._upload(digest, path)
            except NoRoom as err:
                self._status.last_error, self._status_is_old = err.message, True
                self._rest(_UPLOAD_AGAIN_S)
                if self._stopping.is_set():
                    raise
        raise NoRoom("the coordinator has had no room on its disk for too long")

    def _rest(self, most_s: float, ready: Callable[[], bool] = lambda: False) -> None:
        """Wait in the work thread for the time, until `ready` or the agent's end."""
        until = time.monotonic() + most_s
        while time.monotonic() < until and not self._stopping.is_set() and not ready():
            time.sleep(_TICK_S)

    def _upload(self, digest: str, path: Path) -> None:
        self._session().upload(digest, path)

    def _traffic(self) -> tuple[int, int]:
        return (self._link.bytes_up, self._link.bytes_down) if self._link else (0, 0)

    # --- MQTT ---

    def _on_mqtt(self, up: bool, why: str) -> None:
        if up != self._worker.mqtt:
            log.info("MQTT is %s", "up" if up else f"down: {why}")
        self._happened(BrokerChanged(up))
        self._status_is_old = True

    def _on_command(self, command: Doorbell | Command | LogsAsked) -> None:
        match command:
            case Doorbell():
                self._doorbell.set()
            case LogsAsked():
                # One at a time, in the heartbeat's thread: the work does not wait for it.
                self._beating.submit(self._tell_logs, command)
            case Command(action="pause", for_s=for_s):
                self._happened(PauseAsked(PauseReason.OPERATOR))
                if for_s:
                    assert self._loop is not None
                    lifted = PauseLifted(frozenset({PauseReason.OPERATOR}))
                    self._loop.call_later(for_s, self._happened, lifted)
            case Command(action="resume"):
                asked = frozenset({PauseReason.OPERATOR, PauseReason.TRAINER})
                self._happened(PauseLifted(asked))
            case Command(action="finish"):
                self._happened(FinishAsked())

    def _tell_logs(self, asked: LogsAsked) -> None:
        lines = shared_log.tail(self._home / logs.FILE) if self._settings.share_log else []
        told = shared_log.shared(lines, asked.most)
        if not self._settings.share_log:
            text = "the owner keeps this log private: policy set share_log true"
            told = [LogLine(at=time.time(), level="info", text=text)]
        with contextlib.suppress(CommonweightError):
            if self._link is not None:
                self._link.tell_logs(LogsTold(ask=asked.ask, lines=told))

    def _on_progress_thread(self, progress: Progress) -> None:
        self._soon(self._on_progress, progress)

    def _on_progress(self, progress: Progress) -> None:
        work = self._worker.work
        if self._presence is None or work is None:
            return
        up, down = self._traffic()
        self._presence.telemetry(
            Telemetry(
                run=work.run,
                round=work.round,
                phase=progress.phase,
                step=progress.step,
                steps=progress.steps,
                loss=progress.loss,
                diverged=progress.loss is None,
                samples_per_s=progress.examples_per_s,
                bytes_up=up,
                bytes_down=down,
                cpu_percent=psutil.cpu_percent(),
                memory_bytes=self._process.memory_info().rss + self._trainer.rss_bytes,
                battery_percent=_battery(),
            )
        )

    # --- the owner ---

    async def _keep_wishes(self) -> None:
        """Obey the wish file, end an idle trainer, keep the status fresh, notice a sleep."""
        ticks, clocks = 0, Clocks.now()
        while True:
            before, clocks = clocks, Clocks.now()
            if slept := slept_s(before, clocks, _TICK_S):
                self._waking = asyncio.create_task(self._wake(slept), name="wake")
            self._obey(control.read_wish(self._home))
            idle = self._trainer.running and self._worker.work is None
            if idle and self._trainer.idle_s > self._settings.idle_timeout_s:
                await asyncio.to_thread(self._trainer.stop)
            ticks += 1
            if self._status_is_old or ticks % 20 == 0:
                self._status_is_old = False
                self._write_status()
            await asyncio.sleep(_TICK_S)

    def _obey(self, wish: Wish) -> None:
        if wish.want == "pause" and wish.until and time.time() >= wish.until:
            wish = Wish()
            control.write_wish(self._home, wish)
        if wish == self._wish:
            return
        self._wish = wish
        if wish.want == "pause":
            self._happened(PauseAsked(PauseReason.USER))
        else:
            # The owner's word also lifts what the operator asked for.
            self._happened(PauseLifted(_ASKED_FOR))
        if wish.want == "finish":
            control.write_wish(self._home, Wish())
            self._happened(FinishAsked())


def _disk_free(home: Path) -> int:
    try:
        return shutil.disk_usage(home).free
    except OSError:
        return 0


def _battery() -> float | None:
    sensor = getattr(psutil, "sensors_battery", lambda: None)()
    return float(sensor.percent) if sensor else None


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "name": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
