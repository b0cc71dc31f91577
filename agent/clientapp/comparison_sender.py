"""Sends a comparison to the coordinator, if the owner allows it and no row can be learned."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from agent.home import audit_log
from agent.home.own_results import OwnResult, OwnRun
from agent.home.settings_schema import AgentSettings
from agent.transport.weight_transfer import SessionLost
from protocols.errors import Refused
from protocols.messages import comparisons
from protocols.messages.comparisons import Comparison
from protocols.messages.envelope import Settings

log = logging.getLogger("commonweight.agent")

#: Of a task, its settings and the digest of a version: whether its evaluation has left this machine
#: in its run.
WasTold = Callable[[str, Settings, str], bool]


class ComparisonSender:
    """Metrics leave only of versions whose evaluation has left in the run: so none leaves of a
    model that was made to learn about a row. `send_to(comparison)` raises Unreachable, Refused."""

    def __init__(
        self,
        home: Path,
        settings: Callable[[], AgentSettings],
        send_to: Callable[[Comparison], None],
        was_told: WasTold,
    ) -> None:
        self._home, self._settings = home, settings
        self._send_to, self._was_told = send_to, was_told

    def may_send(self, run: OwnRun, result: OwnResult) -> bool:
        """True if the coordinator knows the metrics of this machine in this run anyway, and the
        owner lets it know these. No answer of the coordinator counts here."""
        chosen = self._settings()
        return (
            chosen.compare == "on"
            and not run.is_local
            and not chosen.privacy_max_epsilon
            and not chosen.secure_min
            and self._was_told(run.task, run.settings_of(result.round, result.model), result.digest)
        )

    def send(self, run: OwnRun, result: OwnResult) -> bool:
        """Send a result, without a blend. True if the coordinator has it; False if it may not be
        sent, or was refused. It is in the audit log before it leaves.

        Raises Unreachable, SessionLost.
        """
        told = result.comparison
        if told is None:
            told = comparisons.without_numbers(result.run, result.missing or "failed")
        told = comparisons.without_blend(told)
        if not self.may_send(run, result):
            return False
        audit_log.write_comparison(self._home, told, result.task, result.round)
        try:
            self._send_to(told)
        except SessionLost:
            raise
        except Refused as err:
            log.info("run %s: %s", result.run, err.message)
            return False
        return True
