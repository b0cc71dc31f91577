"""The fleet as it should be after the operations so far. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

NAMES = ("ada", "bob", "cyd")


@dataclass
class Peer:
    """A machine. `standing`: `gone` if it never joined, has left or was removed."""

    standing: Literal["enrolled", "awaiting", "gone"] = "enrolled"
    is_running: bool = True
    owner_paused: bool = False
    operator_paused: bool = False
    is_old: bool = False
    #: How often it has joined: each time with a new key.
    joined: int = 1

    @property
    def is_available(self) -> bool:
        """True if a run can give it work."""
        paused = self.owner_paused or self.operator_paused
        return self.standing == "enrolled" and self.is_running and not paused


@dataclass
class Run:
    """A run without an end of its own, unless `rounds` are few. `id` is known on a real fleet."""

    mode: str
    strategy: str
    codec: str
    quorum: int
    state: Literal["active", "stopped", "finished", "deleted"] = "active"
    id: str = ""


@dataclass
class Backup:
    """What a backup holds. `file` is known on a real fleet."""

    keys: dict[str, tuple[str, int]]
    runs: list[tuple[Run, str]]
    needs_approval: bool
    file: Path | None = None


@dataclass
class Model:
    """The whole fleet. `runs` are in the order of their starts."""

    peers: dict[str, Peer] = field(default_factory=lambda: {name: Peer() for name in NAMES})
    runs: list[Run] = field(default_factory=list)
    has_broker: bool = True
    needs_approval: bool = False
    backup: Backup | None = None

    @property
    def keys(self) -> dict[str, tuple[str, int]]:
        """The standing of each machine, and which of its keys it is about."""
        return {name: (peer.standing, peer.joined) for name, peer in self.peers.items()}

    @property
    def available(self) -> list[str]:
        return [name for name, peer in self.peers.items() if peer.is_available]

    @property
    def enrolled(self) -> list[str]:
        return [name for name, peer in self.peers.items() if peer.standing == "enrolled"]

    @property
    def active(self) -> list[Run]:
        """The runs that have not ended; the first one is at work, the others wait."""
        return self.runs_in("active")

    def runs_in(self, *states: str) -> list[Run]:
        return [run for run in self.runs if run.state in states]

    def peers_where(self, **wanted: object) -> list[str]:
        """The names of the peers with these values."""
        return [
            name
            for name, peer in self.peers.items()
            if all(getattr(peer, key) == value for key, value in wanted.items())
        ]
