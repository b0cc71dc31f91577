"""The state of the fleet by gossip while the coordinator is away.

Used on the event loop's thread. The coordinator names peers to contact in advance. The agent stores
these names in its home, so it can use them after a restart, too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from agent.home import fleet_trust
from agent.home.credentials import Credentials
from agent.home.enrollment_file import Enrollment
from agent.transport.version_proofs import VersionIndex
from protocols.enrollment import identity, signed_requests
from protocols.errors import BadMessage
from protocols.local.atomic_files import read_json, write_private
from protocols.messages.envelope import Presence
from protocols.network.addresses import parse
from protocols.p2p import gossip
from protocols.p2p.gossip import AccessToken, GossipBatch, Head, Neighbor, NeighborsResponse

log = logging.getLogger("commonweight.share")

FILE = "neighbours.json"
#: A peer with an entry younger than this counts as present.
_RECENT_S = 300.0


class GossipSummary(NamedTuple):
    """Summary for the owner: the newest version here, and the number of recently seen peers.

    `alike` of them hold the same version. `shares_at` is this agent's address for other peers.
    """

    head: Head | None
    heard: int
    alike: int
    shares_at: str


class GossipState:
    """Collects gossip entries of peers and makes this agent's own.

    `certificate()` and `presence()` are this agent's own. `address()` is its address for other
    peers, or empty.
    """

    def __init__(
        self,
        home: Path,
        enrollment: Enrollment,
        credentials: Credentials,
        heads: VersionIndex,
        certificate: Callable[[], bytes],
        presence: Callable[[], Presence],
    ) -> None:
        self._file = home / FILE
        self._certificate, self._credentials = certificate, credentials
        self._coordinator_public = enrollment.coordinator_public
        self.heads = heads
        self._presence = presence
        self.address: Callable[[], str] = lambda: ""
        #: This agent's statement about the coordinator's log and its proof of a fork, if any; and
        #: what gets those of others.
        self.own_seen: Callable[[], tuple[bytes, bytes]] = lambda: (b"", b"")
        self.on_seen: Callable[[bytes, bytes], None] = lambda seen, proof: None
        self._store = gossip.GossipStore(fleet_trust.trusted_cas(enrollment), enrollment.fleet)
        #: By peer: the IP address from which it last connected.
        self._seen_at: dict[str, str] = {}
        self.assigned = read_json(self._file, NeighborsResponse)

    def learn(self, assigned: NeighborsResponse) -> None:
        """Uses a new list of peers from the coordinator. `save` stores it."""
        self.assigned = assigned
        self._store.remove(assigned.removed)

    def save(self, assigned: NeighborsResponse) -> None:
        """Stores the list for the next start. Callable from any thread. Raises OSError."""
        write_private(self._file, msgspec.json.encode(assigned))

    @property
    def _removed(self) -> tuple[str, ...]:
        return self.assigned.removed if self.assigned else ()

    def outgoing(self) -> GossipBatch:
        """Returns this agent's entry, made now, and the entries of other peers."""
        entry = gossip.GossipEntry(
            peer=self._credentials.peer,
            at=time.time(),
            presence=self._presence(),
            head=self.heads.newest(),
            address=self.address(),
            signs=signed_requests.FORMAT,
            **dict(zip(("seen", "proof"), self.own_seen(), strict=True)),
        )
        own = gossip.sign_entry(entry, self._certificate(), self._credentials.sign_key.sign)
        return self._store.batch(own)

    def receive(self, batch: GossipBatch, sender: str = "", host: str = "") -> None:
        """Stores the entries of a batch that are new and valid.

        `sender`, `host`: the peer that connected to us to send them, and its IP address.
        """
        if sender:
            self._seen_at.pop(sender, None)
            self._seen_at[sender] = host
            if len(self._seen_at) > gossip.MAX_ENTRIES:
                del self._seen_at[next(iter(self._seen_at))]
        excluded = (self._credentials.peer, *self._removed)
        for stored in self._store.add(batch.entries, time.time(), excluded):
            if stored.entry.seen or stored.entry.proof:
                self.on_seen(stored.entry.seen, stored.entry.proof)

    def entries(self) -> list[gossip.VerifiedEntry]:
        """Returns the newest entry of every peer."""
        return self._store.newest_first()

    def contacts(self) -> list[Neighbor]:
        """Returns peers to contact: those that the coordinator named or that connected to us.

        An entry may name a new port, and no other host than the one where the peer was seen.
        """
        contacts = {one.peer: one for one in (self.assigned.neighbors if self.assigned else ())}
        hosts = {one.peer: {parse(one.address).host} for one in contacts.values()}
        for peer, host in self._seen_at.items():
            hosts.setdefault(peer, set()).add(host)
        for entry, sender, _ in self.entries():
            if entry.address and parse(entry.address).host in hosts.get(entry.peer, ()):
                contacts[entry.peer] = Neighbor(
                    peer=entry.peer,
                    name=sender.name,
                    address=entry.address,
                    node_public=sender.node_public,
                    signs=entry.signs,
                )
        return [one for peer, one in contacts.items() if peer not in self._removed]

    def verify_token(self, data: bytes) -> AccessToken:
        """Reads an access token. Raises BadMessage if it is invalid or its holder was removed."""
        verify = partial(identity.verify, self._coordinator_public)
        token = gossip.verify_access_token(data, verify, time.time())
        if token.holder in self._removed:
            raise BadMessage(f"{token.holder} was removed from the fleet")
        return token

    def summary(self) -> GossipSummary:
        """Returns what `status` shows."""
        head, now = self.heads.newest(), time.time()
        recent = [entry for entry, _, _ in self.entries() if now - entry.at < _RECENT_S]
        alike = sum(entry.head == head for entry in recent)
        return GossipSummary(head, len(recent), alike, self.address())
