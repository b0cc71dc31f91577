"""What this agent knows of its fleet without the coordinator: words of peers, and whom it may ask.

For the event loop's thread. What the coordinator has given for such a time lies in the home: an
agent that starts while it is away knows whom to ask too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from agent.home.credentials import Credentials
from agent.home.settings import Enrollment
from agent.transport.version_proofs import Heads
from protocols.enrollment import identity
from protocols.errors import BadMessage
from protocols.local.atomic_files import write_private
from protocols.messages.envelope import Presence
from protocols.p2p import gossip
from protocols.p2p.gossip import (
    AccessToken,
    GossipBatch,
    GossipEntry,
    GossipStore,
    Head,
    Neighbor,
    NeighborsResponse,
    VerifiedEntry,
)

log = logging.getLogger("commonweight.share")

FILE = "neighbours.json"
#: A peer that was heard of within this time is there.
_HERE_S = 300.0


class Known(NamedTuple):
    """For the owner: the newest version here, and how many peers were heard of lately.

    `alike` of them hold the same version. `shares_at` is where this agent serves other peers.
    """

    head: Head | None
    heard: int
    alike: int
    shares_at: str


class Gossip:
    """`certificate()` is this agent's own, `presence()` what it says of itself.

    `address()` is where it serves, or empty.
    """

    def __init__(
        self,
        home: Path,
        enrollment: Enrollment,
        credentials: Credentials,
        heads: Heads,
        certificate: Callable[[], bytes],
        presence: Callable[[], Presence],
    ) -> None:
        self._file = home / FILE
        self._certificate, self._credentials = certificate, credentials
        self._coordinator_public = enrollment.coordinator_public
        self.heads = heads
        self._presence = presence
        self.address: Callable[[], str] = lambda: ""
        self._words = GossipStore(credentials.ca_pem, enrollment.fleet)
        self.given = self._read()

    def _read(self) -> NeighborsResponse | None:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=NeighborsResponse)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def learn(self, given: NeighborsResponse) -> None:
        """The coordinator has given this for a time without it; still to be kept."""
        self.given = given
        self._words.remove(given.removed)

    def keep(self, given: NeighborsResponse) -> None:
        """Keep what was given for the next start (from any thread). Raises OSError."""
        write_private(self._file, msgspec.json.encode(given))

    def told(self) -> GossipBatch:
        """What others are told: our own word, made now, and what we have heard."""
        word = GossipEntry(
            peer=self._credentials.peer,
            at=time.time(),
            presence=self._presence(),
            head=self.heads.newest(),
            address=self.address(),
        )
        own = gossip.sign_entry(word, self._certificate(), self._credentials.sign_key.sign)
        return self._words.batch(own)

    def take(self, told: GossipBatch) -> None:
        """Keep what is new and right of what somebody has told."""
        unheard = (self._credentials.peer, *(self.given.removed if self.given else ()))
        self._words.add(told.entries, time.time(), unheard)

    def heard(self) -> list[VerifiedEntry]:
        """Every peer's newest word."""
        return self._words.newest_first()

    def partners(self) -> list[Neighbor]:
        """Peers that can be asked: those that the coordinator has named, and who says where."""
        removed = frozenset(self.given.removed if self.given else ())
        found = {one.peer: one for one in (self.given.neighbors if self.given else ())}
        for word, speaker, _ in self.heard():
            if word.address:
                found[word.peer] = Neighbor(
                    peer=word.peer,
                    name=speaker.name,
                    address=word.address,
                    node_public=speaker.node_public,
                )
        return [one for peer, one in found.items() if peer not in removed]

    def admit(self, sealed: bytes) -> AccessToken:
        """The pass of somebody who asks us. Raises BadMessage if it does not count."""
        given = gossip.verify_access_token(
            sealed,
            partial(identity.verify, self._coordinator_public),
            time.time(),
        )
        if self.given is not None and given.holder in self.given.removed:
            raise BadMessage(f"{given.holder} was removed from the fleet")
        return given

    def known(self) -> Known:
        """What `status` tells."""
        head, now = self.heads.newest(), time.time()
        lately = [word for word, _, _ in self.heard() if now - word.at < _HERE_S]
        alike = sum(word.head == head for word in lately)
        return Known(head, len(lately), alike, self.address())
