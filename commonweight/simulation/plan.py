"""The plan of a simulation for its workers: the peers and their owners' settings. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct
from msgspec.structs import replace

from agent.home import settings
from agent.home.settings_schema import AgentSettings
from protocols.enrollment import identity
from protocols.enrollment.identity import SigningKey
from protocols.local import settings_file
from protocols.local.homes import SIMULATION
from protocols.local.safe_paths import path_in

#: Of the coordinator's versions and uploads.
_SUFFIX = ".safetensors"
#: Simulated owners allow what a run asks for: they have no data of others to protect.
OPEN_OWNER: dict[str, Any] = {
    "tasks": ["*"],
    "consents": {"*": {"columns": ["*"]}},
    "data_min_rows": 0,
    "data_min_count": 1,
    "min_batch": 1,
    "min_examples": 1,
    "max_lr": 0.0,
    "threads": 1,
}


class Plan(Struct, frozen=True, kw_only=True):
    """`home`: an absolute path. `keys`: the Ed25519 key of each peer (32 bytes), which the ids and
    so the samples of rounds follow from. `owner`: settings of every owner; `{part}` in a text
    stands for the number of the peer. `source`: the file and class of the task; empty: an
    installed one. `is_shared`: its data are those of all peers, and each takes its part. `trusts`:
    owners trust each other, as secure runs need.
    """

    home: str
    fleet: str
    coordinator_public: bytes
    keys: tuple[bytes, ...]
    owner: dict[str, Any] = {}
    source: str = ""
    task: str = ""
    is_shared: bool = False
    trusts: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.home) / SIMULATION

    @property
    def uploads(self) -> Path:
        """Updates on their way from the workers to the spool."""
        return self.folder / "uploads"

    @property
    def cache(self) -> Path:
        """Files that tasks make from shared data."""
        return self.folder / "cache"

    def peer_folder(self, index: int) -> Path:
        """The outbox of a peer, with what it keeps between rounds. Made with its first update."""
        return self.folder / "peers" / f"{index:05}"

    def upload_path(self, peer: str, digest: str) -> Path:
        return path_in(self.uploads, f"{peer}-{digest}", _SUFFIX)

    def version_path(self, digest: str) -> Path:
        return path_in(Path(self.home) / "versions", digest, _SUFFIX)

    def key(self, index: int) -> SigningKey:
        return Ed25519PrivateKey.from_private_bytes(self.keys[index])

    def public(self, index: int) -> bytes:
        return identity.public_bytes(self.key(index))

    def owners(self) -> Callable[[int], AgentSettings]:
        """The settings of the owner of each peer, by index. Both raise UsageError."""
        files = {"task_files": {self.task: self.source}} if self.source else {}
        read = partial(_read_owner, {**files, **self.owner}, peers=len(self.keys))
        if any("{part}" in str(value) for value in self.owner.values()):
            return read
        first = read(0)
        return lambda index: replace(first, part=index)


def read_owner(owner: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of every owner, with texts as `policy set` reads them. Raises UsageError."""
    found = {}
    for given, value in owner.items():
        name = given.replace(".", "_")
        is_text = isinstance(value, str | Path)
        found[name] = settings.parse_value(name, str(value)) if is_text else value
    return found


def check_owner(owner: Mapping[str, Any], peers: int) -> None:
    """Raise UsageError unless these are settings of an owner."""
    _read_owner(owner, 0, peers=peers)


def _read_owner(owner: Mapping[str, Any], index: int, *, peers: int) -> AgentSettings:
    values = {**OPEN_OWNER, **owner, "parts": peers, "part": index}
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = value.replace("{part}", str(index))
    return settings_file.validate(
        values, AgentSettings, "names and values for --owner: commonweight-agent policy show"
    )


def make_keys(peers: int, seed: int) -> tuple[bytes, ...]:
    """Keys that follow from the seed, so that a simulation can be repeated. They are no secrets."""
    return tuple(
        hashlib.sha256(f"commonweight simulation {seed} {index}".encode()).digest()
        for index in range(peers)
    )
