"""Who holds a version, or is fetching it, and whom to send to whom. Pure.

The first of a network to ask, its seed, is sent to the coordinator; whoever asks later, to those of
its own network that asked before, the least loaded first. A holder passes on what it has while the
rest is still coming, so a version crosses the coordinator's line about once for each network. As
everybody is only sent to those who asked before, nobody waits for somebody who waits for him.

The seed may be the one with the slow line. Until somebody has the version whole, a network is given
another seed after 5 s, then after 10 s more, 20 s…: soon a quick one is among them, and few are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from protocols.p2p.swarm import MAX_SOURCES, DownloadPlanRequest, host_of, in_networks

#: A holder that asked so long ago may be anywhere by now.
MAX_AGE_S = 3600.0
#: Sources remembered for one version, and versions.
MAX_KNOWN_SOURCES, MAX_VERSIONS = 4096, 4
#: Until a network is given its second seed; each next one takes twice as long.
FIRST_SEED_WAIT_S = 5.0
_OLD_SHARE = 0.7  # of a holder's rate, when a new one is measured


class _Source(NamedTuple):
    at: float
    order: int
    address: str
    networks: tuple[str, ...]
    outside: str  # the address that the coordinator sees: one router, one household
    open: bool
    whole: bool


class FetchPlan(NamedTuple):
    """`holders` are (peer, address), the best first; `seed`: fetch from the coordinator as well."""

    sources: list[tuple[str, str]]
    seed: bool


class PieceSources:
    """What agents have said of the versions they fetch; kept in memory, as it is only a help.

    `is_here(peer)` says whether a peer could answer now.
    """

    def __init__(self, is_online: Callable[[str], bool] = lambda peer: True) -> None:
        self._is_online = is_online
        self._by_version: dict[str, dict[str, _Source]] = {}
        self._load: dict[tuple[str, str], int] = {}
        self._rates: dict[str, float] = {}
        self._asked = 0
        #: By version and networks: how many seeds, and when the last one was made.
        self._seeds: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
        #: By holder: who has complained of it.
        self._complaints: dict[str, set[str]] = {}

    def plan_fetch(
        self, digest: str, peer: str, asked: DownloadPlanRequest, outside: str, now: float
    ) -> FetchPlan:
        """Where this peer may fetch the version from.

        Remembers, if it can be reached itself, that it will hold it soon.
        """
        standings = self._by_version.setdefault(digest, {})
        while len(self._by_version) > MAX_VERSIONS:
            self.remove_version(next(iter(self._by_version)))
        mine = standings.get(peer)
        self._asked += 1
        order = mine.order if mine else self._asked
        if mine and mine.whole:  # it has lost it: others may wait for it, it waits for none of them
            order = -1
        found = [
            (self._load.get((digest, other), 0), -self._rates.get(other, 0.0), there.order, other)
            for other, there in standings.items()
            if other != peer
            and other not in asked.faulty
            and (there.whole or there.order < order)
            and now - there.at < MAX_AGE_S
            and is_near(there.address, there.outside, asked, outside, is_open=there.open)
            and self._is_online(other)
            and len(self._complaints.get(other, ())) < 2
        ]
        chosen = [other for *_, other in sorted(found)[:MAX_SOURCES]]
        for other in chosen:
            self._load[digest, other] = self._load.get((digest, other), 0) + 1
        if asked.address and len(standings) < MAX_KNOWN_SOURCES:
            standings[peer] = _Source(
                now,
                order,
                asked.address,
                asked.networks,
                outside,
                asked.serves_other_networks,
                False,
            )
        whole = any(standings[other].whole for other in chosen)
        seed = not chosen or (not whole and self._needs_seed(digest, asked.networks, now))
        if seed:
            seeds, _ = self._seeds.get((digest, asked.networks), (0, now))
            self._seeds[digest, asked.networks] = seeds + 1, now
        return FetchPlan([(other, standings[other].address) for other in chosen], seed)

    def _needs_seed(self, digest: str, networks: tuple[str, ...], now: float) -> bool:
        seeds, at = self._seeds.get((digest, networks), (0, now))
        return now - at >= FIRST_SEED_WAIT_S * 2.0 ** (seeds - 1)

    def record_complete(
        self, digest: str, peer: str, rates: Mapping[str, float], faulty: tuple[str, ...]
    ) -> list[str]:
        """The peer has the whole version. Returns holders that it calls faulty for the first time.

        One complaint may be a lie or bad luck; of two peers', a holder is asked no more.
        """
        standings = self._by_version.get(digest, {})
        if peer in standings:
            standings[peer] = standings[peer]._replace(whole=True)
        for other, rate in rates.items():
            if other in standings and rate > 0:
                old = self._rates.get(other, rate)
                self._rates[other] = _OLD_SHARE * old + (1 - _OLD_SHARE) * rate
        told = [other for other in dict.fromkeys(faulty) if other in standings and other != peer]
        new = [other for other in told if other not in self._complaints]
        for other in told:
            self._complaints.setdefault(other, set()).add(peer)
        return new

    def remove_version(self, digest: str) -> None:
        """The version is dropped."""
        for other in self._by_version.pop(digest, {}):
            self._load.pop((digest, other), None)
        for key in [key for key in self._seeds if key[0] == digest]:
            del self._seeds[key]

    def remove_peer(self, peer: str) -> None:
        """The peer was removed: nobody is sent to it any more."""
        for standings in self._by_version.values():
            standings.pop(peer, None)

    def clear_complaints(self, peer: str) -> None:
        """The peer has opened a new session: what was held against it is over."""
        self._complaints.pop(peer, None)


def is_near(
    address: str, there_outside: str, asked: DownloadPlanRequest, outside: str, *, is_open: bool
) -> bool:
    """May a peer that serves at `address` help the one that asks? `outside` is what we see."""
    if is_open:
        return True
    if not in_networks(host_of(address), asked.networks):
        return False
    # Two homes may use the same private numbers: behind one router both look alike to us; and
    # without a router in between we see the very addresses of that network.
    return there_outside == outside or all(
        in_networks(seen, asked.networks) for seen in (there_outside, outside)
    )
