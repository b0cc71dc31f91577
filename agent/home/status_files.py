"""The two files through which commands and a running agent communicate, without a port.

`status.json` is the agent's last status. `wish.json` is the owner's request; it survives restarts,
so that a paused agent stays paused.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from protocols.local.atomic_files import read_json, write_private
from protocols.local.disk_space import is_disk_full
from protocols.p2p.gossip import Head

STATUS_FILE, REQUEST_FILE = "status.json", "wish.json"
Want = Literal["run", "pause", "finish"]


class Status(Struct, kw_only=True):
    """The agent's status. `at` and `since` are Unix s.

    `head` is the newest version here. While the coordinator is away, `heard` is the number of peers
    that sent gossip lately, and `alike` of them hold the same version. `shares_at` is the address
    for other peers. `paused_by`: the rules of the policy that pause it. `error_until`: when the
    last error ended, as the agent was connected again (Unix s); 0 if it may last. `choice`: the
    model that the run `choice_run` has chosen, and why; of the last run that this machine worked
    in. `mqtt_why`: what is wrong with the link to the MQTT broker, or empty.
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
    error_until: float = 0.0
    share: float = 1.0
    free_at: float = 0.0
    shares_at: str = ""
    head: Head | None = None
    heard: int = 0
    alike: int = 0
    paused_by: tuple[str, ...] = ()
    choice_run: str = ""
    choice: str = ""
    mqtt_why: str = ""

    @property
    def error_text(self) -> str:
        """The last error, as its owner reads it: an earlier one with the time of its end."""
        if not self.last_error or not self.error_until:
            return self.last_error
        until = time.strftime("%a %H:%M", time.localtime(self.error_until))
        return f"{self.last_error} (until {until}; connected since)"


class RuleOverride(Struct, frozen=True, kw_only=True):
    """A temporary mode of a policy rule, until `until` (Unix s)."""

    value: Literal["always", "auto", "never"]
    until: float


class OwnerRequest(Struct, frozen=True, kw_only=True):
    """What the owner asks for. `until` (Unix s) ends a pause; 0 means until resumed.

    `at` (Unix s) is the time of the request: it tells a repeated request from an old one. `modes`
    are temporary modes by rule. `restart_at` (Unix s): when a restart was asked for last; 0: never.
    """

    want: Want = "run"
    until: float = 0.0
    at: float = 0.0
    modes: dict[str, RuleOverride] = {}
    restart_at: float = 0.0

    def asking(self, want: Want, at: float = 0.0, until: float = 0.0) -> OwnerRequest:
        """The request to run, pause or finish instead; modes and a restart stay."""
        return replace(self, want=want, at=at, until=until)


def write_status(home: Path, status: Status) -> None:
    """Write the status. Raises OSError.

    On a full disk it overwrites the old file in place, so that the owner sees the reason.
    """
    data = msgspec.json.encode(status)
    try:
        write_private(home / STATUS_FILE, data, synced=False)
    except OSError as err:
        if not is_disk_full(err):
            raise
        with (home / STATUS_FILE).open("r+b") as file:
            file.write(data.ljust(os.fstat(file.fileno()).st_size))


def read_status(home: Path) -> Status | None:
    """The last status, or None if the agent never ran."""
    return read_json(home / STATUS_FILE, Status)


def write_request(home: Path, request: OwnerRequest) -> None:
    """Replace the owner's request. Raises OSError."""
    write_private(home / REQUEST_FILE, msgspec.json.encode(request))


def ask(home: Path, want: Want, at: float, until: float = 0.0) -> None:
    """Write that the owner asks for this at the time `at` (Unix s). Raises OSError."""
    write_request(home, read_request(home).asking(want, at, until))


def read_request(home: Path) -> OwnerRequest:
    """The owner's request. Without a file: to run."""
    return read_json(home / REQUEST_FILE, OwnerRequest) or OwnerRequest()
