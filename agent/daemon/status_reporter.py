"""Reports the agent's state: presence and telemetry over MQTT, and the status file in its home."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import psutil

from agent.clientapp import secure_rules
from agent.daemon import state_machine
from agent.daemon.state_machine import AgentState
from agent.home import status_files
from agent.home.enrollment_file import Enrollment
from agent.home.settings_schema import AgentSettings
from agent.home.status_files import Status
from agent.policy import sensors
from agent.policy.consent import ASKED_FIRST
from agent.tasks import registry
from agent.trainer.ipc import Progress
from agent.transport.mqtt_client import MqttClient
from agent.transport.p2p.gossip import GossipSummary
from protocols import VERSION
from protocols.local import flower_apps
from protocols.messages.envelope import Notice, Presence, Telemetry, strip_controls
from protocols.messages.states import PeerState
from protocols.messages.work import Work

log = logging.getLogger("commonweight.agent")

_MAX_AGE_S = 10.0
#: How old the free space in a presence may be.
_DISK_EVERY_S = 5.0
#: In a presence.
_MAX_TASKS = 64
#: Lines of the coordinator that are logged once.
_MAX_REMEMBERED = 64


class StatusReporter:
    """Reports the state of one agent.

    `traffic()` returns bytes sent and received, `gossip_status()` the known versions and peers.
    Call all methods on the event loop, except `count_answer` and `set_last_error`.
    """

    def __init__(
        self, home: Path, enrollment: Enrollment, chosen: AgentSettings, mqtt: MqttClient
    ) -> None:
        self._home, self._settings, self._mqtt = home, chosen, mqtt
        self.traffic: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.gossip_status: Callable[[], GossipSummary] = lambda: GossipSummary(None, 0, 0, "")
        self._installed = registry.names()
        self._note_settings()
        self._disk_free_bytes, self._disk_due = 0, 0.0
        self._process = psutil.Process()
        self._last_presence = Presence(state=PeerState.IDLE)
        self._told: deque[str] = deque(maxlen=_MAX_REMEMBERED)
        self._is_stale, self._is_session_error = True, False
        self._written_at = -math.inf
        self._status = Status(
            pid=os.getpid(),
            at=time.time(),
            since=time.time(),
            peer=enrollment.peer,
            name=enrollment.name,
            version=VERSION,
            state="idle",
            coordinator=enrollment.addresses[0],
        )
        if (before := status_files.read_status(home)) is not None:
            self._status.choice_run, self._status.choice = before.choice_run, before.choice

    def presence(self) -> Presence:
        """The presence that was announced last."""
        return self._last_presence

    def apply_settings(self, chosen: AgentSettings, agent: AgentState) -> None:
        """Announce changed settings."""
        self._settings = chosen
        self._note_settings()
        self.announce(agent)

    def announce(self, agent: AgentState) -> None:
        """Publish the state over MQTT now, and to the status file within a tick."""
        state, reason = state_machine.display_state(agent)
        free_at, free_until = state_machine.availability(agent)
        work = agent.shown_work
        run, round_ = (work.run, work.round) if work else ("", 0)
        self._last_presence = Presence(
            state=state,
            reason=reason,
            name=self._status.name,
            version=VERSION,
            task=work.task if work else "",
            run=run,
            round=round_,
            tasks=self._tasks,
            askable=self._askable,
            policy=self._public_values,
            paused_by=agent.policy.rules,
            disk_free_bytes=self._measure_disk(),
            free_at=free_at,
            free_until=free_until,
        )
        self._mqtt.set_presence(self._last_presence)
        status = self._status
        status.state, status.reason, status.run, status.round = state.value, reason, run, round_
        status.share, status.free_at = agent.policy.share, free_at
        status.paused_by = agent.policy.rules
        self._note_choice(agent.work)
        self._is_stale = True

    def _note_choice(self, work: Work | None) -> None:
        """Note which model the run of this work has chosen. The log has it once."""
        status = self._status
        if work is None or (work.run == status.choice_run and work.choice in ("", status.choice)):
            return
        if work.kind == "evaluate" and not work.choice:
            return  # it may be a question, which belongs to no run
        status.choice_run, status.choice = work.run, work.choice
        if work.choice:
            log.info("the model of run %s: %s", work.run, work.choice)

    def _measure_disk(self) -> int:
        """Bytes that are free on the disk of the home; 0 if unknown."""
        if (now := time.monotonic()) >= self._disk_due:
            self._disk_due = now + _DISK_EVERY_S
            try:
                self._disk_free_bytes = shutil.disk_usage(self._home).free
            except OSError:
                self._disk_free_bytes = 0
        return self._disk_free_bytes

    def _note_settings(self) -> None:
        """Note which tasks may run, for which the owner would be asked, and what is announced."""
        chosen = self._settings
        self._public_values = chosen.public_values()
        offered = (task for task, said in chosen.consents.items() if said.review)
        known = sorted({*self._installed, *chosen.task_files, *offered})
        standings = {task: chosen.standing_of(task) for task in known}
        allowed = [task for task, standing in standings.items() if standing == "allowed"]
        apps = {flower_apps.PREFIX + name for name in chosen.apps}
        allowed += sorted(apps - {*chosen.forbidden_tasks})
        asked = [task for task, standing in standings.items() if standing in ASKED_FIRST]
        self._tasks, self._askable = tuple(allowed[:_MAX_TASKS]), tuple(asked[:_MAX_TASKS])

    def progress(self, agent: AgentState, progress: Progress, trainer_bytes: int) -> None:
        """Publish how far the current work is."""
        if (work := agent.shown_work) is None:
            return
        up, down = self.traffic()
        is_secure = secure_rules.is_secure(work)  # then losses leave in the sum alone
        self._mqtt.telemetry(
            Telemetry(
                run=work.run,
                round=work.round,
                phase=progress.phase if progress.phase in ("train", "evaluate") else "",
                step=progress.step,
                steps=progress.steps,
                loss=None if is_secure else coarse_loss(progress),
                # An evaluation reports no loss on the way.
                diverged=not is_secure and progress.loss is None and progress.phase == "train",
                samples_per_s=progress.examples_per_s,
                bytes_up=up,
                bytes_down=down,
                cpu_percent=psutil.cpu_percent(),
                memory_bytes=self._process.memory_info().rss + trainer_bytes,
                battery_percent=sensors.battery(sensors.sysfs())[1],
            )
        )

    def report_error(self, text: str) -> None:
        """Report a failure to the owner, the log and the monitor."""
        log.error("%s", text)
        self._note_error(text)
        self._mqtt.notice(Notice(level="error", text=text[:400]))

    def notice(self, text: str) -> None:
        """Report something to the operators that is not a failure."""
        self._mqtt.notice(Notice(level="warning", text=text[:400]))

    def set_last_error(self, text: str) -> None:
        """Report to the owner alone a failure that may pass without action."""
        self._note_error(text)
        self._is_stale = True

    def set_session_error(self, text: str) -> None:
        """The same for a failure that ends when the agent is connected again."""
        self.set_last_error(text)
        self._is_session_error = True

    def session_opened(self) -> None:
        """Clear the report of a lost connection."""
        if self._is_session_error and not self._status.error_until:
            self._status.error_until = time.time()
            self._is_stale = True

    def _note_error(self, text: str) -> None:
        self._status.last_error, self._status.error_until = text, 0.0
        self._is_session_error = False

    def coordinator_says(self, text: str) -> None:
        """Tell the owner why the coordinator does not use this machine, once."""
        text = f"the coordinator says: {strip_controls(text)}"
        if text not in self._told:
            self._told.append(text)
            log.warning("%s", text)
        self.set_last_error(text)

    def set_broker(self, why: str) -> None:
        """Tell the owner what is wrong with the link to the broker, if anything."""
        self._status.mqtt_why = strip_controls(why)
        self._is_stale = True

    def count_answer(self) -> None:
        """Count one more answer."""
        self._status.rounds_done += 1

    def mark_stale(self) -> None:
        """Write the status file at the next tick."""
        self._is_stale = True

    def write_if_stale(self, agent: AgentState) -> None:
        """Write the status file if it is out of date."""
        if self._is_stale or time.monotonic() - self._written_at >= _MAX_AGE_S:
            self.write(agent)

    def write_stopped(self, agent: AgentState) -> None:
        """Write the status file for the last time."""
        self._status.state, self._status.reason = "stopped", ""
        self.write(agent)

    def write(self, agent: AgentState) -> None:
        """Write the status file."""
        self._is_stale, self._written_at = False, time.monotonic()
        status, known = self._status, self.gossip_status()
        status.at = time.time()
        status.session, status.mqtt = agent.session, agent.mqtt
        status.bytes_up, status.bytes_down = self.traffic()
        status.head, status.shares_at = known.head, known.shares_at
        status.heard, status.alike = known.heard, known.alike
        try:
            status_files.write_status(self._home, status)
        except OSError as err:  # a full disk must not end the agent
            log.warning("cannot write the status file: %s", err)


def coarse_loss(progress: Progress) -> float | None:
    """The loss that may leave during training: two digits of a batch's mean.

    Exact losses of two batches at the same weights, one with one row more, would reveal the loss of
    that row. The record of disclosed rows covers whole answers only. An evaluation reports no such
    loss.
    """
    if progress.loss is None or progress.phase != "train":
        return None
    return float(f"{progress.loss:.2g}")
