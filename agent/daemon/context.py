"""What the parts of a running agent share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from agent.daemon.state_runner import StateRunner
from agent.home.credentials import Credentials
from agent.home.enrollment_file import Enrollment
from agent.home.settings_schema import AgentSettings
from agent.transport.bandwidth import Bandwidth


class AgentContext(NamedTuple):
    """One agent: its folder, its identity, its state and its traffic counters.

    `settings` are those of the start. A part that follows later changes reads them itself.
    """

    home: Path
    enrollment: Enrollment
    credentials: Credentials
    settings: AgentSettings
    runner: StateRunner
    bandwidth: Bandwidth

    @property
    def cache(self) -> Path:
        """The folder of the versions and their proofs."""
        return self.home / "cache"

    @property
    def coordinator_public(self) -> bytes:
        """The coordinator's Ed25519 key (raw, 32 bytes)."""
        return self.enrollment.coordinator_public
