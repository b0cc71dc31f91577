"""What the owner's monitor shows: the agent's files in its home, and this machine's sensors."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from msgspec.structs import replace

from agent.home import (
    audit_log,
    offer_log,
    own_results,
    privacy_ledger,
    refusal_log,
    settings,
    status_files,
)
from agent.home.audit_log import AuditEntry
from agent.home.consent_requests import Request
from agent.home.own_results import OwnResult
from agent.home.privacy_ledger import Limit, PrivacyLedger
from agent.home.settings_schema import AgentSettings
from agent.home.status_files import OwnerRequest, Status
from agent.policy import rules, sensors
from agent.policy.rules import Decision, SensorReadings
from agent.setup import consents
from agent.transport.bandwidth import Bandwidth

MAX_CPU_SAMPLES, MAX_ENTRIES = 240, 200
#: A running agent writes its status every 10 s.
MAX_STATUS_AGE_S = 40.0


class Machine(NamedTuple):
    """One look at the machine, at `now` (Unix s). `cpu` is in percent of all cores, newest last.

    `decision` is what the policy says to `sensed` here and now; the agent's own word is in
    `status`. `num_left` and `bytes_left` sum up the whole ledger, `entries` are its last ones.
    `spent_epsilon` is what all answers with noise cost together, None without any. `own`: what the
    newest run with a comparison brought.
    """

    now: float
    is_running: bool
    status: Status | None
    request: OwnerRequest
    chosen: AgentSettings
    sensed: SensorReadings
    decision: Decision
    cpu: tuple[float, ...]
    entries: tuple[AuditEntry, ...]
    num_left: int
    bytes_left: int
    spent_epsilon: float | None
    limit: Limit
    consents: tuple[Request, ...]
    own: OwnResult | None = None


class MachineReader:
    """Reads the home and the sensors. Call `read` about once a second."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._sensors = sensors.Sensors(home)
        self._cpu: deque[float] = deque(maxlen=MAX_CPU_SAMPLES)
        self._spent: tuple[tuple[float, ...], float | None] = ((), None)  # by times and δ
        self._ledger: tuple[tuple[float, ...], list[AuditEntry]] = ((), [])
        psutil.cpu_percent()  # the first call has no interval to measure

    def read(self) -> Machine:
        """Look at the machine now. Raises UsageError for wrong settings."""
        home, now = self._home, time.time()
        status = status_files.read_status(home)
        request = status_files.read_request(home)
        modes = {name: mode.value for name, mode in request.modes.items() if mode.until > now}
        chosen = replace(settings.read(home), **modes)
        sensed = self._sensors.read(*Bandwidth(home).today())
        self._cpu.append(psutil.cpu_percent())
        entries = self._entries()
        left = [entry for entry in entries if entry.what not in audit_log.NOTHING_LEFT]
        limit = Limit.of(chosen)
        return Machine(
            now=now,
            is_running=_is_running(status, now),
            status=status,
            request=request,
            chosen=chosen,
            sensed=sensed,
            decision=rules.decide(chosen, sensed),
            cpu=tuple(self._cpu),
            entries=tuple(entries[-MAX_ENTRIES:]),
            num_left=len(left),
            bytes_left=sum(entry.nbytes for entry in left),
            spent_epsilon=self._spent_epsilon(limit.delta),
            limit=limit,
            consents=tuple(consents.requests(home, chosen)),
            own=own_results.newest(home),
        )

    def _spent_epsilon(self, delta: float) -> float | None:
        """The ε of all answers with noise; computed again once the ledger or δ has changed."""
        file = privacy_ledger.ledger_file(self._home)
        times = _times(file.parent.glob(f"{file.name}*"))
        known = *times, delta
        if times and known != self._spent[0]:
            with closing(PrivacyLedger(file)) as ledger:
                charges = ledger.charges()
            noisy = any(not charge.is_exact for charge in charges)
            spent = privacy_ledger.spent_epsilon(charges, delta) if noisy else None
            self._spent = known, spent
        return self._spent[1]

    def _entries(self) -> list[AuditEntry]:
        """The ledger of answers and refusals; read again once its files have changed."""
        times = _times(sorted(self._home.glob("*.jsonl")))
        if times != self._ledger[0]:
            found = [
                *audit_log.read(self._home),
                *refusal_log.read(self._home),
                *offer_log.read(self._home),
            ]
            self._ledger = times, sorted(found, key=lambda entry: entry.at)
        return self._ledger[1]


def _times(paths: Iterable[Path]) -> tuple[float, ...]:
    """When these files were changed; without those that are gone, such as SQLite's journal."""
    times = []
    for path in paths:
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return tuple(times)


def _is_running(status: Status | None, now: float) -> bool:
    """True if the agent that wrote `status` still runs. The lock is not tried, because an agent
    that starts at that moment would not get it."""
    if status is None or status.state == "stopped" or now - status.at > MAX_STATUS_AGE_S:
        return False
    return psutil.pid_exists(status.pid)
