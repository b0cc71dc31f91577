"""Where peers serve each other, and which of them can reach which. Pure, in memory.

Each agent reports its address again when it opens a session.
"""

from __future__ import annotations

from typing import NamedTuple

from protocols.network import addresses
from protocols.p2p.gossip import MAX_NEIGHBORS
from protocols.p2p.swarm import DownloadPlanRequest, in_networks

#: Peers listed for an operator.
MAX_LISTED = 4096


class Location(NamedTuple):
    """What a peer reported about itself, and its address as the coordinator sees it."""

    reported: DownloadPlanRequest
    outside: str

    def can_reach(self, other: Location) -> bool:
        """True if a peer here can probably connect to one that serves at `other`."""
        if other.reported.serves_other_networks:
            return True
        networks = self.reported.networks
        if not in_networks(addresses.parse(other.reported.address).host, networks):
            return False
        # Two homes may use the same private addresses. Peers behind one router have the same
        # outside address; peers without a router in between have one of that very network.
        return other.outside == self.outside or all(
            in_networks(outside, networks) for outside in (other.outside, self.outside)
        )


class PeerDirectory:
    """The peers that serve others."""

    def __init__(self) -> None:
        self._locations: dict[str, Location] = {}

    def update(self, peer: str, reported: DownloadPlanRequest, outside: str) -> None:
        """Note where the peer serves. Without an address, it does not."""
        self.remove(peer)
        if reported.address:
            self._locations[peer] = Location(reported, outside)

    def nearby(
        self, peer: str, reported: DownloadPlanRequest, outside: str
    ) -> list[tuple[str, str]]:
        """(peer, address) of some peers that this one can reach, the last to report first."""
        here = Location(reported, outside)
        return [
            (other, there.reported.address)
            for other, there in reversed(self._locations.items())
            if other != peer and here.can_reach(there)
        ][:MAX_NEIGHBORS]

    def all(self) -> list[tuple[str, str]]:
        """(peer, address) of the last peers that reported."""
        return [(peer, at.reported.address) for peer, at in self._locations.items()][-MAX_LISTED:]

    def remove(self, peer: str) -> None:
        self._locations.pop(peer, None)
