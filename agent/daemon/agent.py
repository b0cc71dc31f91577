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

from agent.daemon import state_machine
from agent.daemon.gossip_loop import GossipLoop
from agent.daemon.owner_commands import OwnerCommands
from agent.daemon.policy_loop import PolicyLoop
from agent.daemon.session_loop import SessionLoop
from agent.daemon.state_machine import (
    Announce,
    BrokerChanged,
    FinishRequested,
    PauseLifted,
    PauseRequested,
    PauseTrainer,
    PollForWork,
    ResumeTrainer,
    SetPace,
    Shutdown,
)
from agent.daemon.state_runner import StateRunner
from agent.daemon.status_reporter import StatusReporter
from agent.daemon.work_thread import WorkThread
from agent.home import log_redaction, logs
from agent.home.credentials import Credentials
from agent.home.settings import AgentSettings, Enrollment
from agent.policy import sensors
from agent.policy.sensors import Sensors
from agent.transport.bandwidth import Bandwidth
from agent.transport.mqtt_client import MqttClient
from agent.transport.p2p.gossip import GossipState
from agent.transport.p2p.sharing import Sharing
from agent.transport.route_watch import RouteWatch
from agent.transport.suspend_watch import Clocks, suspended_s
from agent.transport.version_proofs import VersionIndex
from protocols.errors import CommonweightError
from protocols.messages.envelope import Command, Doorbell, LogLine, LogRequest, LogResponse
from protocols.messages.states import PauseReason

log = logging.getLogger("commonweight.agent")

#: An owner's word is heeded within half a second; an agent that does nothing has more time.
_TICK_S, _IDLE_TICK_S = 0.5, 1.0
_ROUTE_CHECK_EVERY_S = 2.0


class Agent:
    """One enrolled machine at work. `serve` runs it until it is told to stop.

    Parts know only those that were made before them. What an earlier one asks of a later one is a
    hook, set in `_connect`.
    """

    def __init__(self, home: Path, enrollment: Enrollment, chosen: AgentSettings) -> None:
        self._home = home
        self._reconnecting: asyncio.Task[None] | None = None
        self._pause_end: asyncio.TimerHandle | None = None
        credentials = Credentials.load(home, enrollment)
        public = enrollment.coordinator_public
        # What happens here, and who is told.
        self._runner = StateRunner(self._execute)
        self._presence = MqttClient(
            enrollment.mqtt,
            enrollment.fleet,
            enrollment.peer,
            credentials.sign_key.sign,
            public,
            self._on_command,
            self._on_mqtt,
        )
        self._report = StatusReporter(home, enrollment, chosen, self._presence)
        # The coordinator, and other peers.
        self._bandwidth = Bandwidth(home)
        self._sessions = SessionLoop(
            home,
            enrollment,
            credentials,
            self._runner,
            self._report,
            self._bandwidth,
            self._presence.move,
        )
        self._gossip = GossipState(
            home,
            enrollment,
            credentials,
            VersionIndex(home / "cache", public),
            self._sessions.certificate,
            self._report.presence,
        )
        self._sharing = Sharing(
            chosen.share,
            home,
            credentials,
            public,
            port=chosen.share_port,
            mbit_s=chosen.share_mbit_s,
            gossip_state=self._gossip,
        )
        # The work.
        self._work = WorkThread(
            home,
            enrollment,
            credentials,
            chosen,
            self._runner,
            self._report,
            self._sessions.link,
            self._sharing,
            self._bandwidth.received,
        )
        self._gossip_loop = GossipLoop(
            home / "cache",
            credentials,
            public,
            self._runner,
            self._gossip,
            self._sharing,
            self._work.versions,
            self._bandwidth,
            self._sessions.link,
        )
        # When it may be done.
        feeling = Sensors(home, self._work.pids, gpu=sensors.has_gpu(chosen.device))
        self._policy = PolicyLoop(
            home, chosen, self._runner, feeling, self._bandwidth, self._work.make_room
        )
        self._owner_commands = OwnerCommands(home, self._runner, self._policy)
        self._connect()

    def _connect(self) -> None:
        self._report.traffic = self._sessions.traffic
        self._report.gossip_status = self._gossip.summary
        self._gossip.address = self._sharing.address
        self._bandwidth.rates = self._policy.rates

    # --- life ---

    async def serve(self) -> None:
        """Work until `stop`, SIGINT or SIGTERM. Leaves no process behind."""
        self._runner.start()
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
                asyncio.get_running_loop().add_signal_handler(name, self.stop)
        self._owner_commands.poll()
        await self._policy.decide()
        self._report.announce(self._runner.state)
        running = [
            asyncio.create_task(work, name=name)
            for name, work in {
                "link": self._sessions.run(self._work.answer),
                "heartbeat": self._sessions.run_heartbeat(),
                "presence": self._presence.run(),
                "sharing": self._sharing.run(),
                "spread": self._gossip_loop.run(),
                "policy": self._policy.run(),
                "ticks": self._tick(),
            }.items()
        ]
        stopping = asyncio.create_task(self._runner.stopping.wait())
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
            self._bandwidth.save(at_once=True)
            self._report.write_stopped(self._runner.state)

    def stop(self) -> None:
        self._runner.stop()

    def _execute(self, instruction: state_machine.Instruction) -> None:
        match instruction:
            case Announce():
                self._report.announce(self._runner.state)
            case PauseTrainer():
                self._work.trainer.pause()
            case ResumeTrainer():
                self._work.trainer.resume()
            case SetPace(share):
                self._work.trainer.pace(share)
            case PollForWork():
                self._sessions.wake()
            case Shutdown():
                self.stop()

    # --- MQTT ---

    def _on_mqtt(self, up: bool, why: str) -> None:
        if up != self._runner.state.mqtt:
            log.info("MQTT is %s", "up" if up else f"down: {why}")
        self._runner.dispatch(BrokerChanged(up))
        self._report.mark_stale()

    def _on_command(self, command: Doorbell | Command | LogRequest) -> None:
        match command:
            case Doorbell():
                self._sessions.wake()
            case LogRequest():
                self._sessions.run_in_background(self._send_logs, command)
            case Command(action="pause", for_s=for_s):
                if self._pause_end is not None:  # the end of an earlier pause is not this one's
                    self._pause_end.cancel()
                until = time.time() + for_s if for_s else 0.0
                self._runner.dispatch(PauseRequested(PauseReason.OPERATOR, until))
                if for_s:
                    lifted = PauseLifted(frozenset({PauseReason.OPERATOR}))
                    self._pause_end = self._runner.dispatch_later(for_s, lifted)
            case Command(action="resume"):
                asked = frozenset({PauseReason.OPERATOR, PauseReason.TRAINER})
                self._runner.dispatch(PauseLifted(asked))
            case Command(action="finish"):
                self._runner.dispatch(FinishRequested())

    def _send_logs(self, asked: LogRequest) -> None:
        may = self._policy.chosen.share_log
        lines = log_redaction.tail(self._home / logs.FILE) if may else []
        told = log_redaction.redact(lines, asked.max_lines)
        if not may:
            text = "the owner keeps this log private: policy set share_log true"
            told = [LogLine(at=time.time(), level="info", text=text)]
        with contextlib.suppress(CommonweightError):
            self._sessions.link().tell_logs(LogResponse(request_id=asked.request_id, lines=told))

    # --- now and then ---

    async def _tick(self) -> None:
        """Obey the owner, end an idle trainer, keep the status fresh, notice sleep and moves."""
        clocks, route, looked_s, tick_s = Clocks.now(), RouteWatch(), 0.0, 0.0
        while True:
            before, clocks, looked_s = clocks, Clocks.now(), looked_s + tick_s
            if slept := suspended_s(before, clocks, tick_s):
                why = f"back after {slept:.0f} s of sleep"
                self._reconnecting = asyncio.create_task(self._reconnect(why), name="wake")
            elif looked_s >= _ROUTE_CHECK_EVERY_S:
                looked_s = 0.0
                if route.has_changed(self._sessions.endpoints):
                    why = "this machine's network has changed"
                    self._reconnecting = asyncio.create_task(self._reconnect(why), name="wake")
            if self._owner_commands.poll():
                self._apply_settings(self._policy.chosen)
            trainer = self._work.trainer
            idle = trainer.running and self._runner.state.work is None
            if idle and trainer.idle_s > self._policy.chosen.idle_timeout_s:
                await asyncio.to_thread(trainer.stop)
            self._report.write_if_stale(self._runner.state)
            self._bandwidth.save()
            resting = not trainer.running and self._runner.state.work is None
            tick_s = _IDLE_TICK_S if resting else _TICK_S
            await asyncio.sleep(tick_s)

    def _apply_settings(self, chosen: AgentSettings) -> None:
        """What of changed settings is not asked for each time."""
        logs.set_level(chosen.log_level)
        self._report.apply_settings(chosen, self._runner.state)

    async def _reconnect(self, why: str) -> None:
        log.info("%s: connecting anew", why)
        self._presence.reconnect()
        await self._sessions.reconnect()
