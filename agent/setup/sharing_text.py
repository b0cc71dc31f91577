"""A text about the port that an agent opens for other peers, and how to close it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from agent.home.settings_schema import AgentSettings
from agent.transport.p2p.sharing import PORT


def describe(chosen: AgentSettings, home: Path) -> str:
    """A line for the owner; empty if no port is opened."""
    if chosen.share == "off":
        return ""
    port = "a free port that is chosen at the first start"
    fix = " (to choose it: commonweight-agent policy set share.port PORT)"
    with contextlib.suppress(OSError, ValueError):
        port = f"port {int((home / PORT).read_text())}, which may change"
    if chosen.share_port:
        port, fix = f"port {chosen.share_port}", ""
    where = "in this private network" if chosen.share == "lan" else "in every network"
    return (
        f"shares averaged versions with other peers {where} at {port}{fix}; to turn sharing off: "
        "commonweight-agent policy set share off"
    )
