"""Where peers serve each other, and which of them can reach which. Pure, in memory.

Each agent reports its address again when it opens a session.
"""

from __future__ import annotations

from typing import NamedTuple

from protocols.network import addresses
from protocols.p2p import peer_addresses
from protocols.p2p.gossip import MAX_NEIGHBORS
from protocols.p2p.swarm import DownloadPlanRequest, in_networks

#: Peers listed for an operator.
MAX_LISTED = 4096


class Location(NamedTuple):
    """What a peer reported about itself, and its address as the coordinator sees it."""

    reported: DownloadPlanRequest
    outside: str

    def address_for(self, outside: str) -> str:
        """Where a peer that is seen at `outside` may ask this one; empty if nowhere.

        The reported address is passed on if the peer was seen there, or if it is private and both
        are behind the same router. Others get the address that the peer was seen at.
        """
        if not self.reported.address:
            return ""
        host, port, _ = addresses.parse(self.reported.address)
        address = self.reported.address
        if host != self.outside:
            if outside != self.outside:
                if not self.reported.serves_other_networks:
                    return ""
                address = addresses.netloc(self.outside, port)
            elif not peer_addresses.is_private(host) or peer_addresses.is_loopback(host):
                return ""
        both_local = all(map(peer_addresses.is_loopback, (self.outside, outside)))
        return "" if peer_addresses.refusal(address, allow_loopback=both_local) else address

    @property
    def refusal(self) -> str:
        """Why the reported address is not passed on; empty if it is, or if there is none."""
        if not self.reported.address or self.address_for(self.outside):
            return ""
        is_local = peer_addresses.is_loopback(self.outside)
        reason = peer_addresses.refusal(self.reported.address, allow_loopback=is_local)
        return reason or f"the peer is seen at {self.outside}"

    def can_reach(self, other: Location) -> bool:
        """True if a peer here can probably connect to one that serves at `other`."""
        if not other.address_for(self.outside):
            return False
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
        location = Location(reported, outside)
        if location.address_for(outside):
            self._locations[peer] = location

    def nearby(
        self, peer: str, reported: DownloadPlanRequest, outside: str
    ) -> list[tuple[str, str]]:
        """(peer, address) of some peers that this one can reach, the last to report first."""
        here = Location(reported, outside)
        return [
            (other, there.address_for(outside))
            for other, there in reversed(self._locations.items())
            if other != peer and here.can_reach(there)
        ][:MAX_NEIGHBORS]

    def all(self) -> list[tuple[str, str]]:
        """(peer, address) of the last peers that reported."""
        found = [(peer, at.address_for(at.outside)) for peer, at in self._locations.items()]
        return found[-MAX_LISTED:]

    def remove(self, peer: str) -> None:
        self._locations.pop(peer, None)
