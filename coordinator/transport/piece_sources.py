"""From which peers to fetch the pieces of a version. Pure, in memory.

The first peer of a network that asks, its seed, fetches from the coordinator. Later ones fetch from
peers of their own network that asked before, the least loaded first. A source passes on the pieces
that it has while the rest arrives, so a version crosses the coordinator's line about once for each
network. Peers fetch only from earlier requesters, so waits cannot form a cycle.

The seed may have a slow line. Until a source has the whole version, a network gets another seed
after 5 s, then after 10 s more, then 20 s, and so on: few seeds, and soon a fast one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from coordinator.transport.peer_directory import Location
from protocols.p2p.swarm import MAX_SOURCES, DownloadPlanRequest

#: A source that asked longer ago may have moved.
MAX_AGE_S = 3600.0
#: Sources remembered for one version, and versions.
MAX_KNOWN_SOURCES, MAX_VERSIONS = 4096, 4
#: Time until a network gets its second seed. Each further one takes twice as long.
FIRST_SEED_WAIT_S = 5.0
#: Complaints of this many peers exclude a source. A single one may be false.
_MAX_COMPLAINTS = 2
#: Weight of the old rate of a source when a new one is measured.
_OLD_RATE_WEIGHT = 0.7


class _Source(NamedTuple):
    at: float
    order: int
    location: Location
    complete: bool = False


class FetchPlan(NamedTuple):
    """`sources` are (peer, address), the best first. `seed`: fetch from the coordinator as well."""

    sources: list[tuple[str, str]]
    seed: bool


class PieceSources:
    """What agents reported about the versions that they fetch. `is_online(peer)` filters them."""

    def __init__(self, is_online: Callable[[str], bool] = lambda peer: True) -> None:
        self._is_online = is_online
        self._by_version: dict[str, dict[str, _Source]] = {}
        self._load: dict[tuple[str, str], int] = {}
        self._rates: dict[str, float] = {}
        self._num_requests = 0
        #: By version and networks: the number of seeds, and the time of the last one.
        self._seeds: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
        #: By source: the peers that complained about it.
        self._complaints: dict[str, set[str]] = {}

    def plan_fetch(
        self, digest: str, peer: str, request: DownloadPlanRequest, outside: str, now: float
    ) -> FetchPlan:
        """Plan where this peer fetches the version. It becomes a source if others can reach it."""
        sources = self._by_version.setdefault(digest, {})
        while len(self._by_version) > MAX_VERSIONS:
            self.remove_version(next(iter(self._by_version)))
        here, own = Location(request, outside), sources.get(peer)
        self._num_requests += 1
        order = own.order if own else self._num_requests
        if (
            own and own.complete
        ):  # it lost the version: others may wait for it, so it waits for none
            order = -1
        candidates = [
            (self._load.get((digest, other), 0), -self._rates.get(other, 0.0), source.order, other)
            for other, source in sources.items()
            if other != peer
            and other not in request.faulty
            and (source.complete or source.order < order)
            and now - source.at < MAX_AGE_S
            and here.can_reach(source.location)
            and self._is_online(other)
            and len(self._complaints.get(other, ())) < _MAX_COMPLAINTS
        ]
        chosen = [other for *_, other in sorted(candidates)[:MAX_SOURCES]]
        for other in chosen:
            self._load[digest, other] = self._load.get((digest, other), 0) + 1
        if here.address_for(outside) and len(sources) < MAX_KNOWN_SOURCES:
            sources[peer] = _Source(now, order, here)
        complete = any(sources[other].complete for other in chosen)
        seeds, since = self._seeds.get((digest, request.networks), (0, now))
        is_due = now - since >= FIRST_SEED_WAIT_S * 2.0 ** (seeds - 1)
        seed = not chosen or (not complete and is_due)
        if seed:
            self._seeds[digest, request.networks] = seeds + 1, now
        return FetchPlan(
            [(other, sources[other].location.address_for(outside)) for other in chosen], seed
        )

    def record_complete(
        self, digest: str, peer: str, rates: Mapping[str, float], faulty: tuple[str, ...]
    ) -> list[str]:
        """Note that the peer has the whole version, and what it reports about its sources.

        `rates` are bytes/s. Returns the sources that get their first complaint.
        """
        sources = self._by_version.get(digest, {})
        if peer in sources:
            sources[peer] = sources[peer]._replace(complete=True)
        for other, rate in rates.items():
            if other in sources and rate > 0:
                old = self._rates.get(other, rate)
                self._rates[other] = _OLD_RATE_WEIGHT * old + (1 - _OLD_RATE_WEIGHT) * rate
        faulty = tuple(
            other for other in dict.fromkeys(faulty) if other in sources and other != peer
        )
        new = [other for other in faulty if other not in self._complaints]
        for other in faulty:
            self._complaints.setdefault(other, set()).add(peer)
        return new

    def remove_version(self, digest: str) -> None:
        for other in self._by_version.pop(digest, {}):
            self._load.pop((digest, other), None)
        self._seeds = {key: seeds for key, seeds in self._seeds.items() if key[0] != digest}

    def remove_peer(self, peer: str) -> None:
        for sources in self._by_version.values():
            sources.pop(peer, None)

    def clear_complaints(self, peer: str) -> None:
        self._complaints.pop(peer, None)
