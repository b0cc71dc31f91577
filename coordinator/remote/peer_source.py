"""The fleet in the view of one of its peers, while the coordinator is away. Read only.

While the coordinator answers, it gives each monitor an access token and the addresses of peers;
both are saved in the home. A peer is asked over TLS that is pinned to its node key. It answers if
the request has the token and our signature. Its answer consists of entries that peers have signed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from coordinator.fleet.state import Event, Fleet, Peer
from coordinator.remote import access
from coordinator.remote.source import ReadOnly
from protocols.enrollment import certificates, signed_requests
from protocols.errors import (
    BadMessage,
    CommonweightError,
    NotRunning,
    Refused,
    UnknownName,
    Unreachable,
)
from protocols.local.atomic_files import write_private
from protocols.messages.decoding import MALFORMED
from protocols.messages.envelope import Envelope
from protocols.network.addresses import parse
from protocols.network.error_text import describe_error
from protocols.p2p import gossip
from protocols.p2p.gossip import GossipStore, Neighbor, NeighborsResponse
from protocols.p2p.peer_addresses import is_loopback, refusal

NEIGHBORS_FILE = "neighbours.json"
_TIMEOUT_S = 10.0


def save_neighbors(home: Path, neighbors: NeighborsResponse) -> None:
    """Save the peers to ask while the coordinator is away. Raises OSError."""
    write_private(home / NEIGHBORS_FILE, msgspec.json.encode(neighbors))


def _load_neighbors(home: Path) -> NeighborsResponse:
    try:
        return msgspec.json.decode((home / NEIGHBORS_FILE).read_bytes(), type=NeighborsResponse)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as err:
        raise NotRunning(
            "this machine knows no peers to ask",
            "run commonweight monitor --once while the coordinator is up",
        ) from err


class _Partner(NamedTuple):
    """The peer to ask; `candidates` are the peers that may answer there."""

    name: str
    address: str
    candidates: tuple[Neighbor, ...]


def _find_partner(known: NeighborsResponse, text: str, *, allow_loopback: bool) -> _Partner:
    """The peer with this name or id, or at this host:port. Raises UnknownName, Refused."""
    for one in known.neighbors:
        if text in (one.name, one.peer, one.address):
            if reason := refusal(one.address, allow_loopback=allow_loopback):
                raise Refused(f"{one.name} is not asked at {one.address}: {reason}")
            return _Partner(one.name, one.address, (one,))
    host, _, port = text.rpartition(":")
    if host and port.isdecimal():  # an unknown address: any peer of the fleet may answer there
        return _Partner(text, text, known.neighbors)
    names = ", ".join(sorted(one.name for one in known.neighbors)) or "none"
    raise UnknownName(
        f"no peer {text!r} can be asked",
        f"peers that share with others: {names}; or give HOST:PORT, which commonweight-agent "
        "status shows on that machine",
    )


class PeerSource(ReadOnly):
    """A `Source` over the view of one peer.

    Raises UnknownName, NotRunning (no peers are known here).
    """

    def __init__(self, home: Path, peer: str) -> None:
        neighbors = _load_neighbors(home)
        self._own = access.connection_info(home, is_up=False)
        # Without addresses, the coordinator is on this machine.
        is_local = all(is_loopback(parse(one).host) for one in self._own.access.addresses)
        self._partner = _find_partner(neighbors, peer, allow_loopback=is_local)
        self._token = neighbors.access_token
        self._fleet = self._own.access.fleet
        self.heading = f"as {self._partner.name} knows it"

    async def snapshot(self) -> Fleet:
        """Raises Unreachable, Refused."""
        batch = await asyncio.to_thread(self._request)
        store, now = GossipStore(access.trusted_cas(self._own.access), self._fleet), time.time()
        store.add(batch.entries, now)
        return fleet_from_gossip(self._fleet, self.heading, store.newest_first(), now)

    async def messages(self) -> AsyncIterator[Envelope]:
        raise Unreachable("a peer sends no live messages", "they come from the coordinator")
        yield  # makes this an iterator

    def refusal(self) -> CommonweightError:
        return Refused("a peer takes no commands", "repeat it when the coordinator is up again")

    def _request(self) -> gossip.GossipBatch:
        body = msgspec.msgpack.encode(gossip.GossipBatch())
        try:
            return msgspec.msgpack.decode(self._post(body), type=gossip.GossipBatch)
        except MALFORMED as err:
            raise BadMessage(f"{self._partner.name} sent a bad answer: {err}") from err

    def _headers(self, peer: Neighbor, body: bytes) -> dict[str, str]:
        """The headers of a request to this peer."""
        signed = signed_requests.sign_headers(
            self._own.access.operator,
            self._own.key.sign,
            "POST",
            gossip.GOSSIP_PATH,
            hashlib.sha256(body).hexdigest(),
            peer.peer if peer.signs > 1 else "",
        )
        return signed | {gossip.ACCESS_TOKEN_HEADER: b64encode(self._token).decode()}

    def _post(self, body: bytes) -> bytes:
        name, address, candidates = self._partner
        try:
            with contextlib.closing(_connection(address)) as connection:
                connection.connect()
                shown = connection.sock.getpeercert(binary_form=True) or b""
                matches = partial(certificates.certificate_matches_key, shown)
                peer = next((one for one in candidates if matches(one.node_public)), None)
                if peer is None:
                    raise Refused(f"another machine than {name} answers at {address}")
                headers = self._headers(peer, body)
                connection.request("POST", gossip.GOSSIP_PATH, body=body, headers=headers)
                response = connection.getresponse()
                if response.status != 200:
                    raise Refused(
                        f"{name} refused ({response.status})",
                        "the access token may have expired: run commonweight monitor --once "
                        "while the coordinator is up",
                    )
                return response.read(gossip.MAX_BATCH_BYTES)
        # A typed address may be invalid: UnicodeError, OverflowError.
        except (OSError, UnicodeError, OverflowError, http.client.HTTPException) as err:
            reason = describe_error(err)
            raise Unreachable(f"{name} does not answer at {address}: {reason}") from err


def _connection(address: str) -> http.client.HTTPSConnection:
    context = certificates.pinned_context()
    host, _, port = address.rpartition(":")
    return http.client.HTTPSConnection(
        host.strip("[]"), int(port), timeout=_TIMEOUT_S, context=context
    )


#: Fields of a peer that it publishes itself.
_PRESENCE_FIELDS = (
    *("state", "reason", "version", "task", "run", "round", "tasks", "policy"),
    *("disk_free_bytes", "free_at", "free_until"),
)


def fleet_from_gossip(
    fleet: str, name: str, entries: Sequence[gossip.VerifiedEntry], now: float
) -> Fleet:
    """The fleet that these entries describe. `round` is the version that a peer has. Pure."""
    found = Fleet(fleet=fleet, name=name, at=now)
    for entry, speaker, _ in entries:
        fields: dict[str, Any] = {key: getattr(entry.presence, key) for key in _PRESENCE_FIELDS}
        at, head = min(entry.at, now), entry.head
        if head:
            fields |= {"run": head.run, "round": head.version}
            text = f"{speaker.name} has version {head.version} of {head.run} ({head.digest[:12]})"
            found.events.append(Event(at=at, level="info", text=text, subject=entry.peer))
        found.peers[entry.peer] = Peer(
            peer=entry.peer,
            name=speaker.name,
            public_key=speaker.sign_public,
            seen_at=at,
            **fields,
        )
    found.num_events = len(found.events)
    return found
