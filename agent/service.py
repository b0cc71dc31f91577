"""The agent at work: one process that keeps a link, a presence and a trainer, for months.

The thin shell around `worker`: its parts turn what happens into events, and what the machine says
is done here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from pathlib import Path

from agent import control, logs, shared_log, worker
from agent.control import Wish
from agent.link import Credentials
from agent.loop import WorkerLoop
from agent.presence import PresenceLink
from agent.report import Report
from agent.sessions import Sessions
from agent.settings import AgentSettings, Enrolment
from agent.sharing import Sharing
from agent.wake import Clocks, slept_s
from agent.work_thread import WorkThread
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
)
from protocols.errors import CommonweightError
from protocols.messages import Command, Doorbell, LogLine, LogsAsked, LogsTold
from protocols.states import PauseReason

log = logging.getLogger("commonweight.agent")

_TICK_S = 0.5
_ASKED_FOR = frozenset({PauseReason.USER, PauseReason.OPERATOR, PauseReason.TRAINER})


class Agent:
    """One enrolled machine at work. `serve` runs it until it is told to stop."""

    def __init__(self, home: Path, enrolment: Enrolment, chosen: AgentSettings) -> None:
        self._home, self._settings = home, chosen
        self._wish = Wish()
        self._waking: asyncio.Task[None] | None = None
        credentials = Credentials.of(home, enrolment)
        self._loop = WorkerLoop(self._obey)
        self._presence = PresenceLink(
            enrolment.mqtt,
            enrolment.fleet,
            enrolment.peer,
            credentials.sign_key.sign,
            enrolment.coordinator_public,
            self._on_command,
            self._on_mqtt,
        )
        self._report = Report(
            home,
            enrolment,
            chosen,
            self._presence,
            traffic=lambda: self._sessions.traffic(),
            trainer_bytes=lambda: self._work.trainer.rss_bytes,
        )
        self._sessions = Sessions(
            home, enrolment, credentials, self._loop, self._report, self._presence.move
        )
        self._sharing = Sharing(
            chosen.share,
            home,
            credentials,
            enrolment.coordinator_public,
            port=chosen.share_port,
            mbit_s=chosen.share_mbit_s,
        )
        self._work = WorkThread(
            home,
            enrolment,
            credentials,
            chosen,
            self._loop,
            self._report,
            link=lambda: self._sessions.link,
            sharing=self._sharing,
        )

    # --- life ---

    async def serve(self) -> None:
        """Work until `stop`, SIGINT or SIGTERM. Leaves no process behind."""
        self._loop.begin()
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
                asyncio.get_running_loop().add_signal_handler(name, self.stop)
        self._report.announce(self._loop.worker)
        running = [
            asyncio.create_task(work, name=name)
            for name, work in {
                "link": self._sessions.keep(self._work.answer),
                "heartbeat": self._sessions.keep_beating(),
                "presence": self._presence.run(),
                "sharing": self._sharing.run(),
                "wishes": self._keep_wishes(),
            }.items()
        ]
        stopping = asyncio.create_task(self._loop.stopping.wait())
        try:
            done, _ = await asyncio.wait({*running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()  # a part that ended did so with an error: raise it
        finally:
            self.stop()
            stopping.cancel()
            # Unblocks the work thread if it waits for the trainer or the wire.
            await asyncio.to_thread(self._work.close)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._sessions.close()
            self._report.stopped(self._loop.worker)

    def stop(self) -> None:
        self._loop.stop()

    def _obey(self, instruction: worker.Instruction) -> None:
        match instruction:
            case Announce():
                self._report.announce(self._loop.worker)
            case PauseTrainer():
                self._work.trainer.pause()
            case ResumeTrainer():
                self._work.trainer.resume()
            case LookForWork():
                self._sessions.ring()
            case Leave():
                self.stop()

    # --- MQTT ---

    def _on_mqtt(self, up: bool, why: str) -> None:
        if up != self._loop.worker.mqtt:
            log.info("MQTT is %s", "up" if up else f"down: {why}")
        self._loop.happened(BrokerChanged(up))
        self._report.changed()

    def _on_command(self, command: Doorbell | Command | LogsAsked) -> None:
        match command:
            case Doorbell():
                self._sessions.ring()
            case LogsAsked():
                self._sessions.aside(self._tell_logs, command)
            case Command(action="pause", for_s=for_s):
                self._loop.happened(PauseAsked(PauseReason.OPERATOR))
                if for_s:
                    lifted = PauseLifted(frozenset({PauseReason.OPERATOR}))
                    self._loop.happens_in(for_s, lifted)
            case Command(action="resume"):
                asked = frozenset({PauseReason.OPERATOR, PauseReason.TRAINER})
                self._loop.happened(PauseLifted(asked))
            case Command(action="finish"):
                self._loop.happened(FinishAsked())

    def _tell_logs(self, asked: LogsAsked) -> None:
        lines = shared_log.tail(self._home / logs.FILE) if self._settings.share_log else []
        told = shared_log.shared(lines, asked.most)
        if not self._settings.share_log:
            text = "the owner keeps this log private: policy set share_log true"
            told = [LogLine(at=time.time(), level="info", text=text)]
        with contextlib.suppress(CommonweightError):
            self._sessions.link.tell_logs(LogsTold(ask=asked.ask, lines=told))

    # --- the owner ---

    async def _keep_wishes(self) -> None:
        """Obey the wish file, end an idle trainer, keep the status fresh, notice a sleep."""
        clocks = Clocks.now()
        while True:
            before, clocks = clocks, Clocks.now()
            if slept := slept_s(before, clocks, _TICK_S):
                self._waking = asyncio.create_task(self._wake(slept), name="wake")
            self._heed(control.read_wish(self._home))
            trainer = self._work.trainer
            idle = trainer.running and self._loop.worker.work is None
            if idle and trainer.idle_s > self._settings.idle_timeout_s:
                await asyncio.to_thread(trainer.stop)
            self._report.keep_fresh(self._loop.worker)
            await asyncio.sleep(_TICK_S)

    def _heed(self, wish: Wish) -> None:
        if wish.want == "pause" and wish.until and time.time() >= wish.until:
            wish = Wish()
            control.write_wish(self._home, wish)
        if wish == self._wish:
            return
        self._wish = wish
        if wish.want == "pause":
            self._loop.happened(PauseAsked(PauseReason.USER))
        else:
            # The owner's word also lifts what the operator asked for.
            self._loop.happened(PauseLifted(_ASKED_FOR))
        if wish.want == "finish":
            control.write_wish(self._home, Wish())
            self._loop.happened(FinishAsked())

    async def _wake(self, slept: float) -> None:
        log.info("back after %.0f s of sleep: connecting anew", slept)
        self._presence.reconnect()
        await self._sessions.reconnect()
