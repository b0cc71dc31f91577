"""The fleet as one of its peers knows it, for a time without the coordinator. Read only.

Whoever watches is given a pass, and told whom to ask, each time that the coordinator answers; both
lie in the home. A peer is asked over TLS pinned to its node key, and lets in who shows the pass and
signs with its key. What it tells are words that each peer has signed of itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import ssl
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from coordinator.fleet.auth import OPERATOR
from coordinator.fleet.state import Event, Fleet, Peer
from coordinator.remote import access
from coordinator.remote.source import ReadOnly
from protocols.enrollment import identity, signed_requests
from protocols.enrollment.identity import SigningKey
from protocols.errors import (
    BadMessage,
    CommonweightError,
    NotRunning,
    Refused,
    UnknownName,
    Unreachable,
)
from protocols.local.atomic_files import write_private
from protocols.messages.envelope import Envelope
from protocols.network.error_text import describe_error
from protocols.p2p import gossip
from protocols.p2p.gossip import (
    GOSSIP_PATH,
    MAX_BATCH_BYTES,
    GossipBatch,
    GossipStore,
    NeighborsResponse,
    VerifiedEntry,
)

NEIGHBOURS_FILE = "neighbours.json"
_TIMEOUT_S = 10.0


def save_neighbours(home: Path, given: NeighborsResponse) -> None:
    """Keep whom to ask while the coordinator is away. Raises OSError."""
    write_private(home / NEIGHBOURS_FILE, msgspec.json.encode(given))


def _load_neighbours(home: Path) -> NeighborsResponse:
    try:
        return msgspec.json.decode((home / NEIGHBOURS_FILE).read_bytes(), type=NeighborsResponse)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as err:
        raise NotRunning(
            "no peers are known here to ask",
            "they are told while the coordinator is up: commonweight monitor --once",
        ) from err


class _Partner(NamedTuple):
    """Whom to ask; `keys` are the node keys that may answer there."""

    name: str
    address: str
    keys: frozenset[bytes]


def _partner(given: NeighborsResponse, word: str) -> _Partner:
    """The peer that `word` means: its name, its id, or host:port. Raises UnknownName."""
    for one in given.neighbors:
        if word in (one.name, one.peer, one.address):
            return _Partner(one.name, one.address, frozenset({one.node_public}))
    host, _, port = word.rpartition(":")
    if host and port.isdecimal():  # it has moved: any of the fleet may answer there
        return _Partner(word, word, frozenset(one.node_public for one in given.neighbors))
    known = ", ".join(sorted(one.name for one in given.neighbors)) or "none"
    raise UnknownName(
        f"no peer {word!r} can be asked",
        f"those that share with others can: {known}; or give HOST:PORT, which "
        "commonweight-agent status tells on that machine",
    )


class PeerSource(ReadOnly):
    """`watch.Source` over one peer's words. Nothing can be changed through it.

    Raises UnknownName, NotRunning (no peers are known here).
    """

    def __init__(self, home: Path, word: str) -> None:
        given = _load_neighbours(home)
        self._partner, self._pass = _partner(given, word), given.access_token
        self._holder, self._key, self._ca_pem = _own_key(home)
        self._fleet = identity.ca_fingerprint(self._ca_pem).hex()[:16]
        self.heading = f"as {self._partner.name} knows it"

    async def snapshot(self) -> Fleet:
        """Raises Unreachable, Refused."""
        told = await asyncio.to_thread(self._ask)
        words, now = GossipStore(self._ca_pem, self._fleet), time.time()
        words.add(told.entries, now)
        return fleet_from_gossip(self._fleet, self.heading, words.newest_first(), now)

    async def messages(self) -> AsyncIterator[Envelope]:
        nothing: tuple[Envelope, ...] = ()
        for envelope in nothing:
            yield envelope
        raise Unreachable("a peer tells no live messages", "they come from the coordinator")

    def refusal(self) -> CommonweightError:
        return Refused("a peer only tells what it knows", "act when the coordinator is up again")

    def _ask(self) -> GossipBatch:
        body = msgspec.msgpack.encode(GossipBatch())
        digest = hashlib.sha256(body).hexdigest()
        headers = signed_requests.sign_headers(
            self._holder, self._key.sign, "POST", GOSSIP_PATH, digest
        )
        headers[gossip.ACCESS_TOKEN_HEADER] = b64encode(self._pass).decode()
        heard = self._answer(body, headers)
        try:
            return msgspec.msgpack.decode(heard, type=GossipBatch)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise BadMessage(f"{self._partner.name} tells what is not understood: {err}") from err

    def _answer(self, body: bytes, headers: dict[str, str]) -> bytes:
        name, address = self._partner.name, self._partner.address
        try:
            with contextlib.closing(_connection(address)) as connection:
                connection.connect()
                shown = connection.sock.getpeercert(binary_form=True) or b""
                if not any(
                    identity.certificate_matches_key(shown, key) for key in self._partner.keys
                ):
                    raise Refused(f"somebody else than {name} answers at {address}")
                connection.request("POST", GOSSIP_PATH, body=body, headers=headers)
                answer = connection.getresponse()
                if answer.status != 200:
                    raise Refused(
                        f"{name} refused ({answer.status})",
                        "the pass may have ended: watch once while the coordinator is up",
                    )
                return answer.read(MAX_BATCH_BYTES)
        # A host and port that somebody typed may be neither: UnicodeError, OverflowError.
        except (OSError, UnicodeError, OverflowError, http.client.HTTPException) as err:
            raise Unreachable(
                f"{name} does not answer at {address}: {describe_error(err)}"
            ) from err


def _connection(address: str) -> http.client.HTTPSConnection:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The key decides, not a name that a CA vouches for; it is looked at before we say a word.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    return http.client.HTTPSConnection(
        host.strip("[]"), int(port), timeout=_TIMEOUT_S, context=context
    )


def _own_key(home: Path) -> tuple[str, SigningKey, bytes]:
    """Who we are to the fleet, our key and its CA. Raises HomeError."""
    if (home / access.ACCESS_FILE).exists():
        door = access.connection_info(home)
        return door.sender, door.key, door.ca_pem.encode()
    key = identity.load_signing_key(home / "operator.key")
    return OPERATOR, key, (home / "ca.pem").read_bytes()


def fleet_from_gossip(fleet: str, name: str, heard: Sequence[VerifiedEntry], now: float) -> Fleet:
    """The fleet that these words add up to. Pure. `round` is the version that a peer holds."""
    found = Fleet(fleet=fleet, name=name, at=now)
    for word, speaker, _ in heard:
        said, head = word.presence, word.head
        found.peers[word.peer] = Peer(
            peer=word.peer,
            name=speaker.name,
            public_key=speaker.sign_public,
            state=said.state,
            reason=said.reason,
            version=said.version,
            task=said.task,
            run=head.run if head else said.run,
            round=head.version if head else said.round,
            tasks=said.tasks,
            policy=said.policy,
            disk_free_bytes=said.disk_free_bytes,
            free_at=said.free_at,
            free_until=said.free_until,
            seen_at=min(word.at, now),
        )
        if head:
            text = f"{speaker.name} holds version {head.version} of {head.run} ({head.digest[:12]})"
            at = min(word.at, now)
            found.events.append(Event(at=at, level="info", text=text, subject=word.peer))
    found.num_events = len(found.events)
    return found
