"""The running agent: one process that keeps a session, a presence and a trainer, for months.

`state_machine` decides; the parts that are made here feed it events and carry out its instructions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from pathlib import Path

from agent.daemon import state_machine
from agent.daemon.context import AgentContext
from agent.daemon.ended_runs import EndedRuns
from agent.daemon.gossip_loop import GossipLoop
from agent.daemon.offer_inbox import OfferInbox
from agent.daemon.owner_commands import OwnerCommands
from agent.daemon.policy_loop import PolicyLoop
from agent.daemon.session_loop import SessionLoop
from agent.daemon.state_runner import StateRunner
from agent.daemon.status_reporter import StatusReporter
from agent.daemon.work_thread import WorkThread
from agent.home import log_redaction, logs, privacy_ledger
from agent.home.credentials import Credentials
from agent.home.enrollment_file import Enrollment
from agent.home.settings_schema import AgentSettings
from agent.policy import sensors
from agent.policy.sensors import Sensors
from agent.transport.bandwidth import Bandwidth
from agent.transport.charged_heads import ChargedHeads
from agent.transport.followed_log import FollowedLog, Witnesses
from agent.transport.mqtt_client import MqttClient
from agent.transport.mqtt_heads import HeadExchange
from agent.transport.p2p.gossip import GossipState
from agent.transport.p2p.sharing import Sharing
from agent.transport.route_watch import RouteWatch
from agent.transport.suspend_watch import Clocks, suspended_s
from agent.transport.version_proofs import VersionIndex
from protocols.errors import CommonweightError
from protocols.messages.envelope import Command, Doorbell, LogLine, LogRequest, LogResponse
from protocols.messages.states import PauseReason

log = logging.getLogger("commonweight.agent")

#: How often owner requests are read. An idle agent does it less often.
_TICK_S, _IDLE_TICK_S = 0.5, 1.0
_ROUTE_CHECK_EVERY_S = 2.0


class Agent:
    """One enrolled machine at work. `serve` runs until `stop`.

    A part knows only the parts made before it. What it needs from a later part is a hook that
    `_connect` sets.
    """

    def __init__(self, home: Path, enrollment: Enrollment, chosen: AgentSettings) -> None:
        self._home = home
        #: True if `serve` ended so that a new agent starts with the changed settings or key.
        self.must_restart = False
        self._reconnecting: asyncio.Task[None] | None = None
        self._pause_end: asyncio.TimerHandle | None = None
        credentials = Credentials.load(home, enrollment)
        public = enrollment.coordinator_public
        self._runner = StateRunner(self._execute)
        self._bandwidth = Bandwidth(home)
        ctx = AgentContext(home, enrollment, credentials, chosen, self._runner, self._bandwidth)
        # Links to the coordinator and to other peers.
        self._presence = MqttClient(
            enrollment.mqtt,
            enrollment.fleet,
            enrollment.peer,
            credentials.sign_key.sign,
            public,
            self._on_command,
            self._on_mqtt,
            HeadExchange(
                enrollment.fleet,
                enrollment.peer,
                lambda: self._log.to_publish(),
                lambda data: self._log.offer(data),
                lambda: self._witnesses().peers,
            ),
        )
        self._report = StatusReporter(home, enrollment, chosen, self._presence)
        self._sessions = SessionLoop(ctx, self._report, self._presence.move)
        link = self._sessions.link
        self._log = FollowedLog(
            home,
            enrollment,
            credentials,
            lambda start: link().log_page(start),
            self._sessions.certificate,
        )
        self._gossip = GossipState(
            home,
            enrollment,
            credentials,
            VersionIndex(ctx.cache, public, enrollment.fleet),
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
        # The work, and the policy that allows it.
        self._work = WorkThread(ctx, self._report, link, self._sharing, self._log.check_work)
        self._gossip_loop = GossipLoop(
            ctx, self._gossip, self._sharing, self._work.versions, link, self._log
        )
        machine = Sensors(home, self._work.pids, gpu=sensors.has_gpu(chosen.device))
        self._policy = PolicyLoop(ctx, machine, self._work.make_room)
        self._owner_commands = OwnerCommands(home, self._runner, self._policy)
        self._sessions.charged = ChargedHeads(
            privacy_ledger.ledger_file(home),
            enrollment.peer,
            credentials.sign_key,
            lambda text: self._runner.call_threadsafe(self._on_log_note, text),
        )
        self._sessions.on_offers = OfferInbox(home, enrollment, link).news
        self._connect()

    def _connect(self) -> None:
        self._sessions.when_key_changes(self._use_new_key)
        self._owner_commands.on_restart = self._restart
        self._sessions.followed = self._log
        self._sessions.restart_is_due = lambda: self._policy.must_restart
        self._sessions.ended_runs = EndedRuns(self._runner, self._work.trainers)
        self._gossip.own_seen, self._gossip.on_seen = self._log.last_seen, self._log.offer
        self._log.on_fork = lambda text: self._runner.call_threadsafe(self._on_fork, text)
        self._log.on_note = lambda text: self._runner.call_threadsafe(self._on_log_note, text)
        self._log.witnesses = self._witnesses
        self._report.traffic = self._sessions.traffic
        self._report.gossip_status = self._gossip.summary
        self._gossip.address = self._sharing.address
        self._bandwidth.rates = self._policy.rates
        self._sharing.may_pass_on = self._policy.may_pass_on

    # --- life cycle ---

    async def serve(self) -> None:
        """Work until `stop`, SIGINT or SIGTERM. Leaves no process behind."""
        self._runner.start()
        self._work.resume_sum()
        await self._check_log()
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
                asyncio.get_running_loop().add_signal_handler(name, self.stop)
        self._owner_commands.drop_finish()
        self._owner_commands.poll()
        await self._policy.decide()
        self._report.announce(self._runner.state)
        loops = {
            "session": self._sessions.run(self._work),
            "heartbeat": self._sessions.run_heartbeat(),
            "presence": self._presence.run(),
            "sharing": self._sharing.run(),
            "gossip": self._gossip_loop.run(),
            "policy": self._policy.run(),
            "ticks": self._tick(),
        }
        running = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]
        stopping = asyncio.create_task(self._runner.stopping.wait())
        try:
            done, _ = await asyncio.wait({*running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()  # a loop ends only with an error: raise it
        finally:
            self.stop()
            stopping.cancel()
            # Unblocks the work thread if it waits for the trainer or the network.
            await asyncio.to_thread(self._work.close)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._sessions.close()
            if self.must_restart:
                await self._sessions.wait_for_threads()
            self._sharing.pieces.close()
            self._log.close()
            self._bandwidth.save(at_once=True)
            self._report.write_stopped(self._runner.state)

    def stop(self) -> None:
        """End `serve`."""
        self._runner.stop()

    def _use_new_key(self) -> None:
        log.warning("the coordinator has a new key or CA, signed by this fleet's CA")
        self._restart()

    def _restart(self) -> None:
        """End `serve`, so that all parts start again with new settings or a new key."""
        self.must_restart = True
        self.stop()

    def _execute(self, instruction: state_machine.Instruction) -> None:
        match instruction:
            case state_machine.Announce():
                self._report.announce(self._runner.state)
            case state_machine.PauseTrainer():
                for trainer in self._work.trainers:
                    trainer.pause()
            case state_machine.ResumeTrainer():
                for trainer in self._work.trainers:
                    trainer.resume()
            case state_machine.SetPace(share):
                for trainer in self._work.trainers:
                    trainer.pace(share)
            case state_machine.PollForWork():
                self._sessions.wake()
            case state_machine.Shutdown():
                self.stop()

    # --- MQTT ---

    def _on_mqtt(self, up: bool, why: str) -> None:
        if up != self._runner.state.mqtt:
            log.info("MQTT is %s", "up" if up else f"down: {why}")
        self._runner.dispatch(state_machine.BrokerChanged(up))
        self._report.set_broker(why)

    def _on_command(self, command: Doorbell | Command | LogRequest) -> None:
        match command:
            case Doorbell():
                self._work.yield_to_runs()
                self._sessions.wake()
            case LogRequest():
                self._sessions.run_in_background(self._send_logs, command)
            case Command(action="pause", for_s=for_s):
                if self._pause_end is not None:  # the timer of an earlier pause
                    self._pause_end.cancel()
                until = time.time() + for_s if for_s else 0.0
                self._runner.dispatch(state_machine.PauseRequested(PauseReason.OPERATOR, until))
                if for_s:
                    lifted = state_machine.PauseLifted(frozenset({PauseReason.OPERATOR}))
                    self._pause_end = self._runner.dispatch_later(for_s, lifted)
            case Command(action="resume"):
                lifted = state_machine.PauseLifted(state_machine.LIFTED_BY_OPERATOR)
                self._runner.dispatch(lifted)
            case Command(action="finish"):
                self._runner.dispatch(state_machine.FinishRequested())

    def _send_logs(self, request: LogRequest) -> None:
        if self._policy.settings.share_log:
            lines = log_redaction.redact(
                log_redaction.tail(self._home / logs.FILE), request.max_lines
            )
        else:
            text = "the owner keeps this log private: policy set share_log true"
            lines = [LogLine(at=time.time(), level="info", text=text)]
        with contextlib.suppress(CommonweightError):
            self._sessions.link().send_logs(LogResponse(request_id=request.request_id, lines=lines))

    # --- periodic ---

    async def _tick(self) -> None:
        """Poll owner requests, stop an idle trainer, write the status, notice sleep and moves."""
        clocks, route, since_check_s, tick_s = Clocks.now(), RouteWatch(), 0.0, 0.0
        while True:
            before, clocks, since_check_s = clocks, Clocks.now(), since_check_s + tick_s
            why = ""
            if slept := suspended_s(before, clocks, tick_s):
                why = f"back after {slept:.0f} s of sleep"
            elif since_check_s >= _ROUTE_CHECK_EVERY_S:
                since_check_s = 0.0
                if route.has_changed(self._sessions.endpoints):
                    why = "this machine's network has changed"
            if why:
                self._reconnecting = asyncio.create_task(self._reconnect(why), name="reconnect")
            if self._owner_commands.poll():
                self._apply_settings(self._policy.settings)
                if self._work.owner_has_decided() and not self._policy.must_restart:
                    self._sessions.tell_decision()  # a new session says so too
            trainers, has_work = self._work.trainers, self._runner.state.work is not None
            if self._policy.must_restart and not has_work:
                log.info("restarting with the changed settings")
                self._restart()
            for trainer in trainers:
                if not has_work and trainer.idle_s > self._policy.settings.idle_timeout_s:
                    await asyncio.to_thread(trainer.stop)
            await self._check_log()
            self._report.write_if_stale(self._runner.state)
            self._bandwidth.save()
            is_busy = has_work or any(trainer.running for trainer in trainers)
            tick_s = _TICK_S if is_busy else _IDLE_TICK_S
            await asyncio.sleep(tick_s)

    # --- the log of versions ---

    def _witnesses(self) -> Witnesses:
        chosen = self._policy.settings
        return Witnesses(chosen.min_witnesses, chosen.witnesses)

    async def _check_log(self) -> None:
        """Compare heads that have come, and pause for a proof or for missing witnesses."""
        try:
            await self._compare_log()
        except CommonweightError as err:  # a full disk: work itself reports it
            log.info("the coordinator's log of versions: %s", err.message)

    async def _compare_log(self) -> None:
        if self._log.has_waiting:
            await asyncio.to_thread(self._log.process)
        if self._runner.state.pauses.keys() & {PauseReason.FORK} or self._log.is_forked:
            self._set_pause(PauseReason.FORK, await asyncio.to_thread(self._log.refresh))
        if self._witnesses().needed or PauseReason.WITNESS in self._runner.state.pauses:
            missing = await asyncio.to_thread(self._log.missing_witnesses)
            if missing and PauseReason.WITNESS not in self._runner.state.pauses:
                log.warning(
                    "no work until it is met: %s; min_witnesses is %d (%s)",
                    *(missing, self._witnesses().needed),
                    "commonweight-agent policy set min_witnesses 0, to work without them",
                )
            self._set_pause(PauseReason.WITNESS, bool(missing))

    def _set_pause(self, reason: PauseReason, active: bool) -> None:
        if active is not (reason in self._runner.state.pauses):
            self._runner.dispatch(
                state_machine.PauseRequested(reason)
                if active
                else state_machine.PauseLifted(frozenset({reason}))
            )

    def _on_fork(self, text: str) -> None:
        self._report.report_error(text)
        self._set_pause(PauseReason.FORK, True)

    def _on_log_note(self, text: str) -> None:
        log.warning("%s", text)
        self._report.notice(text)

    def _apply_settings(self, chosen: AgentSettings) -> None:
        """Apply the changed settings that no other part reads again."""
        logs.set_level(chosen.log_level)
        self._report.apply_settings(chosen, self._runner.state)

    async def _reconnect(self, why: str) -> None:
        log.info("%s: reconnecting", why)
        self._presence.reconnect()
        await self._sessions.reconnect()
