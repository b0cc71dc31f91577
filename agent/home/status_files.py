"""How commands reach a running agent: two small files in its home, so that it opens no port.

`status.json` is what the agent last said of itself; `wish.json` is what its owner wants, and keeps
over restarts: a paused agent stays paused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from protocols.local.atomic_files import write_private
from protocols.local.disk_space import is_disk_full
from protocols.p2p.gossip import Head

STATUS_FILE, REQUEST_FILE = "status.json", "wish.json"


class Status(Struct, kw_only=True):
    """The agent's own words. `at` and `since` are Unix s.

    `head` is the newest version here; without the coordinator `heard` peers were heard of lately,
    and `alike` of them hold the same. `shares_at` is where this agent serves other peers.
    """

    pid: int
    at: float
    since: float
    peer: str
    name: str
    version: str
    state: str
    reason: str = ""
    coordinator: str = ""
    session: bool = False
    mqtt: bool = False
    run: str = ""
    round: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rounds_done: int = 0
    last_error: str = ""
    share: float = 1.0
    free_at: float = 0.0
    shares_at: str = ""
    head: Head | None = None
    heard: int = 0
    alike: int = 0


class RuleOverride(Struct, frozen=True, kw_only=True):
    """A policy rule's mode until then (Unix s), in place of the one in the settings."""

    value: Literal["always", "auto", "never"]
    until: float


class OwnerRequest(Struct, frozen=True, kw_only=True):
    """What the owner wants; `until` (Unix s) ends a pause, 0 means until resumed.

    `at` (Unix s) is when it was asked for: the same wish, asked for again, is another. `modes` are
    the policy's for a while, by rule.
    """

    want: Literal["run", "pause", "finish"] = "run"
    until: float = 0.0
    at: float = 0.0
    modes: dict[str, RuleOverride] = {}


def write_status(home: Path, status: Status) -> None:
    """Raises OSError. On a full disk over the last one, which has its place: it tells why."""
    told = msgspec.json.encode(status)
    try:
        write_private(home / STATUS_FILE, told, synced=False)
    except OSError as err:
        if not is_disk_full(err):
            raise
        with (home / STATUS_FILE).open("r+b") as file:
            file.write(told.ljust(os.fstat(file.fileno()).st_size))


def read_status(home: Path) -> Status | None:
    """What the agent last said, or None if it never ran."""
    try:
        return msgspec.json.decode((home / STATUS_FILE).read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError):
        return None


def write_request(home: Path, request: OwnerRequest) -> None:
    write_private(home / REQUEST_FILE, msgspec.json.encode(request))


def read_request(home: Path) -> OwnerRequest:
    """What the owner wants; without a file, to run."""
    try:
        return msgspec.json.decode((home / REQUEST_FILE).read_bytes(), type=OwnerRequest)
    except (OSError, msgspec.DecodeError):
        return OwnerRequest()
