"""Applies the owner's policy: reads the sensors, decides, and reports the decision to the state."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgspec.structs import replace

from agent.daemon.context import AgentContext
from agent.daemon.state_machine import PolicyDecided
from agent.home.live_settings import LiveSettings
from agent.home.settings_schema import RESTART_KEYS, AgentSettings
from agent.home.status_files import OwnerRequest
from agent.policy import rules
from agent.policy.rules import Decision, Pause, Run, Slow
from agent.policy.sensors import Sensors
from protocols.local.timed_wait import wait_at_most

log = logging.getLogger("commonweight.agent")

#: While it works, the agent pauses within a second of the cause. Without work it decides rarely.
_WORKING_INTERVAL_S, _IDLE_INTERVAL_S = 0.2, 5.0


class PolicyLoop:
    """Holds the current settings: those in the file, with the owner's temporary modes on top.

    `make_room(nbytes)` deletes what the agent does not need and returns the bytes freed.
    """

    def __init__(
        self, ctx: AgentContext, sensors: Sensors, make_room: Callable[[int], int]
    ) -> None:
        self._ctx, self._sensors, self._make_room = ctx, sensors, make_room
        self._owner = LiveSettings(ctx.home)
        self._settings = self._owner()
        self._at_start = _start_settings(self._settings)
        #: The settings that were compared with these last, and whether they differ.
        self._compared, self._differs = self._settings, False
        self._overrides: dict[str, rules.Mode] = {}
        self._reloaded = asyncio.Event()
        self._decision: Decision = Run()

    @property
    def settings(self) -> AgentSettings:
        """The settings in force."""
        return replace(self._settings, **self._overrides) if self._overrides else self._settings

    def rates(self) -> tuple[float, float]:
        """The limits for sending and receiving, in Mbit/s; 0 is no limit."""
        return self._settings.up_mbit, self._settings.down_mbit

    def may_pass_on(self, nbytes: int) -> bool:
        """Count these bytes for another peer; False if the megabytes of this day are used up."""
        chosen, bandwidth = self.settings, self._ctx.bandwidth
        is_bound = "always" not in (chosen.traffic, chosen.work)
        if is_bound and rules.used_up(chosen, bandwidth.today()[0], 0):
            return False
        bandwidth.passed_on(nbytes)
        return True

    @property
    def must_restart(self) -> bool:
        """A setting in the file that all parts read at their start has changed."""
        if (chosen := self._owner()) is not self._compared:
            self._compared, self._differs = chosen, _start_settings(chosen) != self._at_start
        return self._differs

    def reload(self, request: OwnerRequest) -> bool:
        """Take over what the owner has changed since the last call. True if something changed."""
        now = time.time()
        overrides: dict[str, rules.Mode] = {
            key: mode.value for key, mode in request.modes.items() if mode.until > now
        }
        changed = overrides != self._overrides
        self._overrides = overrides
        if (chosen := self._owner()) is not self._settings:
            self._settings, changed = chosen, True
            when = "after the current work" if self.must_restart else "now"
            log.info("the changed settings apply %s", when)
        if changed:
            self._reloaded.set()
        return changed

    async def run(self) -> None:
        """Decide at an interval, and after each change of the settings, until cancelled."""
        while True:
            self._reloaded.clear()
            await self.decide()
            state = self._ctx.runner.state
            working = state.shown_work is not None or bool(state.comparing)
            within_s = _WORKING_INTERVAL_S if working else _IDLE_INTERVAL_S
            await wait_at_most(self._reloaded, within_s)

    async def decide(self) -> None:
        """Read the sensors, decide, and dispatch the decision."""
        readings = await asyncio.to_thread(self._sensors.read, *self._ctx.bandwidth.today())
        active = self._decision.rules if isinstance(self._decision, Pause) else frozenset()
        current = self.settings
        if (over := rules.bytes_over_cap(current, readings)) > 0:
            freed = await asyncio.to_thread(self._make_room, over)
            if freed:
                log.info("deleted %d bytes of old versions for disk_gb", freed)
                readings = readings._replace(home_bytes=(readings.home_bytes or 0) - freed)
                self._sensors.invalidate_home_bytes()
        decision = rules.decide(current, readings, active)
        free_in_s, free_for_s = rules.forecast(current, readings, decision)
        # Rounded to the minute, as in the schedule: else each decision would change the presence.
        minute = time.time() // 60 * 60
        event = PolicyDecided(
            reason=decision.reason if isinstance(decision, Pause) else "",
            share=decision.share if isinstance(decision, Slow) else 1.0,
            free_at=minute + free_in_s if free_in_s else 0.0,
            free_until=minute + free_for_s if free_for_s else 0.0,
            rules=tuple(sorted(decision.rules)) if isinstance(decision, Pause) else (),
        )
        if decision != self._decision:
            log.info("policy: %s", format_decision(decision))
        self._decision = decision
        self._ctx.runner.dispatch(event)


def format_decision(decision: Decision) -> str:
    """A decision for a person."""
    match decision:
        case Pause(reason=reason):
            return f"paused: {reason}"
        case Slow(share=share):
            return f"works {share:.0%} of the time"
        case Run():
            return "may work"


def _start_settings(chosen: AgentSettings) -> list[object]:
    """The values of the settings that all parts read at their start."""
    return [getattr(chosen, name) for name in sorted(RESTART_KEYS)]
