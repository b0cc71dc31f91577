"""Keeps the agent polite: senses, asks the policy, and tells the worker what it decided."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from agent.daemon.state_machine import PolicyDecided
from agent.daemon.state_runner import StateRunner
from agent.home import settings
from agent.home.settings import AgentSettings
from agent.home.status_files import OwnerRequest
from agent.policy import rules
from agent.policy.rules import Decision, Pause, Run, Slow
from agent.policy.sensors import Sensors
from agent.transport.bandwidth import Bandwidth
from protocols.errors import CommonweightError

log = logging.getLogger("commonweight.agent")

#: A pause is to be felt within a second of its cause; an agent without work has time.
_WORKING_INTERVAL_S, _IDLE_INTERVAL_S = 0.2, 5.0


class PolicyLoop:
    """Holds the settings of the moment: those in the file, and the owner's for a while on top.

    `make_room(nbytes)` drops what can be spared in the agent's folder, and says how much.
    """

    def __init__(
        self,
        home: Path,
        chosen: AgentSettings,
        runner: StateRunner,
        sensors: Sensors,
        bandwidth: Bandwidth,
        make_room: Callable[[int], int],
    ) -> None:
        self._home, self._chosen, self._runner = home, chosen, runner
        self._sensors, self._bandwidth = sensors, bandwidth
        self._make_room = make_room
        self._overrides: dict[str, rules.Mode] = {}
        self._file_mtime_ns = self._settings_mtime_ns()
        self._reloaded = asyncio.Event()
        self._decision: Decision = Run()

    @property
    def chosen(self) -> AgentSettings:
        """The settings as they hold now."""
        return replace(self._chosen, **self._overrides) if self._overrides else self._chosen

    def rates(self) -> tuple[float, float]:
        """Mbit/s that may be sent and received; 0 is any."""
        return self._chosen.up_mbit, self._chosen.down_mbit

    def reload(self, request: OwnerRequest) -> bool:
        """Take up what the owner has changed since the last look; True if it was something."""
        now = time.time()
        modes: dict[str, rules.Mode] = {
            key: mode.value for key, mode in request.modes.items() if mode.until > now
        }
        changed = modes != self._overrides
        self._overrides = modes
        if self._file_mtime_ns != (changed_at := self._settings_mtime_ns()):
            self._file_mtime_ns, changed = changed_at, True
            try:
                self._chosen = settings.read(self._home)
                log.info("settings were changed, and hold from now on")
            except CommonweightError as err:
                log.error("settings as they were, since the new ones are wrong: %s", err.message)
        if changed:
            self._reloaded.set()
        return changed

    async def run(self) -> None:
        """Decide again and again, for ever."""
        while True:
            self._reloaded.clear()
            await self.decide()
            wait_s = _WORKING_INTERVAL_S if self._runner.state.work else _IDLE_INTERVAL_S
            try:
                async with asyncio.timeout(wait_s):
                    await self._reloaded.wait()
            except TimeoutError:
                continue

    async def decide(self) -> None:
        """Sense, decide, and tell the worker."""
        sensed = await asyncio.to_thread(self._sensors.read, *self._bandwidth.today())
        held = self._decision.rules if isinstance(self._decision, Pause) else frozenset()
        chosen = self.chosen
        if (over := rules.bytes_over_cap(chosen, sensed)) > 0:
            freed = await asyncio.to_thread(self._make_room, over)
            if freed:
                log.info("dropped %d bytes of old versions: disk_gb", freed)
                sensed = sensed._replace(home_bytes=(sensed.home_bytes or 0) - freed)
                self._sensors.invalidate_home_bytes()
        decision = rules.decide(chosen, sensed, held)
        ahead = rules.forecast(chosen, sensed, decision)
        # To the minute, as the schedule has it: what is told must not change with each look.
        minute = time.time() // 60 * 60
        event = PolicyDecided(
            reason=decision.reason if isinstance(decision, Pause) else "",
            share=decision.share if isinstance(decision, Slow) else 1.0,
            free_at=minute + ahead.free_in_s if ahead.free_in_s else 0.0,
            free_until=minute + ahead.free_for_s if ahead.free_for_s else 0.0,
        )
        if decision != self._decision:
            log.info("policy: %s", format_decision(decision))
        self._decision = decision
        self._runner.dispatch(event)

    def _settings_mtime_ns(self) -> int:
        try:
            return (self._home / settings.FILE).stat().st_mtime_ns
        except OSError:
            return 0


def format_decision(decision: Decision) -> str:
    """A decision for a person."""
    match decision:
        case Pause(reason=reason):
            return f"paused: {reason}"
        case Slow(share=share):
            return f"works {share:.0%} of the time"
        case Run():
            return "nothing stands against work"
