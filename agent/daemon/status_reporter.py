"""What the agent says of itself: presence and telemetry over MQTT, the status file at home."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from agent.daemon import state_machine
from agent.daemon.state_machine import Worker
from agent.home import status_files
from agent.home.settings import AgentSettings, Enrolment
from agent.home.status_files import Status
from agent.tasks import registry
from agent.trainer.ipc import Progress
from agent.transport.mqtt_client import PresenceLink
from agent.transport.p2p.gossip import Known
from protocols import VERSION
from protocols.messages.envelope import Notice, Presence, Telemetry
from protocols.messages.states import PeerState

log = logging.getLogger("commonweight.agent")

_AT_LEAST_EVERY_S = 10.0


class Report:
    """Reports one agent's state: over MQTT, in the status file, in the log.

    `traffic()` gives bytes up and down, `known()` what it knows of versions and peers.
    All but `answered` and `trouble` are for the event loop's thread.
    """

    def __init__(
        self,
        home: Path,
        enrolment: Enrolment,
        chosen: AgentSettings,
        presence: PresenceLink,
    ) -> None:
        self._home, self._settings, self._presence = home, chosen, presence
        self.traffic: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.known: Callable[[], Known] = lambda: Known(None, 0, 0, "")
        here = {*registry.names(), *chosen.task_files}
        self._tasks = tuple(task for task in sorted(here) if chosen.allows(task))
        self._process = psutil.Process()
        self._said = Presence(state=PeerState.IDLE)
        self._is_old = True
        self._written_at = -math.inf
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

    def presence(self) -> Presence:
        """What was last said of the state."""
        return self._said

    def take_up(self, chosen: AgentSettings, now: Worker) -> None:
        """Say what of the settings others may know, after they were changed."""
        self._settings = chosen
        self.announce(now)

    def announce(self, now: Worker) -> None:
        """Say what the worker is: on MQTT at once, in the status file within a tick."""
        state, reason = state_machine.shown(now)
        free_at, free_until = state_machine.free(now)
        work = now.work
        self._said = Presence(
            state=state,
            reason=reason,
            name=self._status.name,
            version=VERSION,
            task=work.task if work else "",
            run=work.run if work else "",
            round=work.round if work else 0,
            tasks=self._tasks,
            policy=self._settings.announced(),
            disk_free_bytes=_disk_free(self._home),
            free_at=free_at,
            free_until=free_until,
        )
        self._presence.set_presence(self._said)
        self._status.state, self._status.reason = state.value, reason
        self._status.share, self._status.free_at = now.share, free_at
        self._status.run = work.run if work else ""
        self._status.round = work.round if work else 0
        self._is_old = True

    def progress(self, now: Worker, progress: Progress, trainer_bytes: int) -> None:
        """Say how far the work in hand is."""
        if now.work is None:
            return
        up, down = self.traffic()
        self._presence.telemetry(
            Telemetry(
                run=now.work.run,
                round=now.work.round,
                phase=progress.phase if progress.phase in ("train", "evaluate") else "",
                step=progress.step,
                steps=progress.steps,
                loss=progress.loss,
                diverged=progress.loss is None,
                samples_per_s=progress.examples_per_s,
                bytes_up=up,
                bytes_down=down,
                cpu_percent=psutil.cpu_percent(),
                memory_bytes=self._process.memory_info().rss + trainer_bytes,
                battery_percent=_battery(),
            )
        )

    def complain(self, text: str) -> None:
        """Tell the owner, the log and the monitor of a failure."""
        log.error("%s", text)
        self._status.last_error = text
        self._presence.notice(Notice(level="error", text=text[:400]))

    def trouble(self, text: str) -> None:
        """Note what is wrong for the owner alone; it may pass by itself."""
        self._status.last_error = text
        self._is_old = True

    def answered(self) -> None:
        """One more piece of work was answered."""
        self._status.rounds_done += 1

    def changed(self) -> None:
        """Something that the status file tells is not as it was."""
        self._is_old = True

    def keep_fresh(self, now: Worker) -> None:
        """Write the status file if it is old."""
        if self._is_old or time.monotonic() - self._written_at >= _AT_LEAST_EVERY_S:
            self.write(now)

    def stopped(self, now: Worker) -> None:
        """The last word in the status file."""
        self._status.state, self._status.reason = "stopped", ""
        self.write(now)

    def write(self, now: Worker) -> None:
        """Write the status file."""
        self._is_old, self._written_at = False, time.monotonic()
        self._status.at = time.time()
        self._status.session, self._status.mqtt = now.session, now.mqtt
        self._status.bytes_up, self._status.bytes_down = self.traffic()
        known = self.known()
        self._status.head, self._status.shares_at = known.head, known.shares_at
        self._status.heard, self._status.alike = known.heard, known.alike
        try:
            status_files.write_status(self._home, self._status)
        except OSError as err:  # a full disk must not end the agent
            log.warning("cannot write the status file: %s", err)


def _disk_free(home: Path) -> int:
    try:
        return shutil.disk_usage(home).free
    except OSError:
        return 0


def _battery() -> float | None:
    sensor = getattr(psutil, "sensors_battery", lambda: None)()
    return float(sensor.percent) if sensor else None
