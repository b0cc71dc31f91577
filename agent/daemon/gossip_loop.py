"""Spreads the newest version between peers while the coordinator is away.

During a session, peers compare directly what they have seen of the coordinator's log of versions.
From time to time the agent asks the coordinator for the addresses of such peers. Without a session
it exchanges gossip with some peers at growing intervals. If a peer holds a newer version, the agent
fetches it from there, with the coordinator's signature as proof.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable

from agent.daemon.context import AgentContext
from agent.daemon.state_machine import can_take_work
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.followed_log import FollowedLog
from agent.transport.p2p.gossip import GossipState
from agent.transport.p2p.peer_client import PeerClient
from agent.transport.p2p.sharing import Sharing
from agent.transport.version_proofs import list_verified, read_proof, save_proof
from agent.transport.version_store import VersionStore
from protocols.errors import BadMessage, BadWeights, CommonweightError
from protocols.local.disk_space import check_room
from protocols.local.safe_paths import path_in
from protocols.p2p.gossip import GossipBatch, Head, Neighbor

log = logging.getLogger("commonweight.share")

_TICK_S = 1.0
#: Between two rounds of gossip.
MIN_INTERVAL_S, MAX_INTERVAL_S = 2.0, 60.0
_PEERS_PER_ROUND = 2
#: The interval at which peers, during a session, compare what they have seen of the coordinator's
#: log.
SEEN_INTERVAL_S = 30.0
#: In one round, so that peers that lie or do not answer cannot block the others.
_MAX_VERSIONS_TRIED, _MAX_HOLDERS_TRIED = 4, 3
#: When to ask the coordinator again for neighbors and an access token: soon after a session opens,
#: as other peers may just have joined; then at a long interval; and after a failure.
_FIRST_REFRESHES_S, _REFRESH_EVERY_S, _REFRESH_RETRY_S = (10.0, 60.0, 600.0), 3600.0, 60.0
#: When to ask a peer for a version again, after no answer and after wrong data.
_NO_ANSWER_RETRY_S, _WRONG_DATA_RETRY_S = 60.0, 3600.0
_MAX_FAILED = 256


class GossipLoop:
    """Runs beside the agent's session. `link()` returns the current one."""

    def __init__(
        self,
        ctx: AgentContext,
        gossip: GossipState,
        sharing: Sharing,
        versions: VersionStore,
        link: Callable[[], CoordinatorClient],
        log_: FollowedLog | None = None,
    ) -> None:
        self._log = log_
        self._ctx, self._gossip, self._sharing = ctx, gossip, sharing
        self._versions, self._link = versions, link
        #: When a peer may be asked for a version again (monotonic s).
        self._retry_at: dict[tuple[Head, str], float] = {}
        self._shared_cache = False

    async def run(self) -> None:
        """GossipState until cancelled."""
        if self._sharing.is_off:
            await asyncio.Event().wait()
        refresh_at, refreshed_as, round_at, interval_s = 0.0, "", 0.0, MIN_INTERVAL_S
        seen_at = 0.0
        waits = iter(_FIRST_REFRESHES_S)
        while True:
            now = time.monotonic()
            if self._ctx.runner.state.session:
                address = self._sharing.plan_request().address
                if now >= refresh_at or address != refreshed_as:
                    done = await self._refresh_neighbors()
                    wait_s = next(waits, _REFRESH_EVERY_S) if done else _REFRESH_RETRY_S
                    refresh_at, refreshed_as = now + wait_s, address
                if now >= seen_at:
                    seen_at = now + SEEN_INTERVAL_S * random.uniform(0.8, 1.2)
                    await self._exchange_with_some(self._gossip.contacts())
                round_at, interval_s = now + MIN_INTERVAL_S, MIN_INTERVAL_S
            else:
                refresh_at, waits = now, iter(_FIRST_REFRESHES_S)
                if now >= round_at:
                    found = await self._run_round()
                    interval_s = MIN_INTERVAL_S if found else min(1.5 * interval_s, MAX_INTERVAL_S)
                    round_at = time.monotonic() + interval_s * random.uniform(0.8, 1.2)
            await asyncio.sleep(_TICK_S)

    async def _refresh_neighbors(self) -> bool:
        """Ask the coordinator for peers to use while it is away. False if that failed."""
        try:
            link, request = self._link(), self._sharing.plan_request()
            neighbors = await asyncio.to_thread(link.neighbors, request)
            self._gossip.learn(neighbors)
            await asyncio.to_thread(self._gossip.save, neighbors)
        except (CommonweightError, OSError) as err:
            log.debug("no neighbors from the coordinator: %s", err)
            return False
        return True

    async def _run_round(self) -> bool:
        """One round of gossip. True if it brought a newer version."""
        partners = self._gossip.contacts()
        if self._gossip.assigned is None or not partners:
            return False
        if not self._shared_cache:  # share the versions from before this start, too
            self._shared_cache = True
            await asyncio.to_thread(self._share_cached_versions)
        await self._exchange_with_some(partners)
        return await self._fetch_newest(partners)

    async def _exchange_with_some(self, partners: list[Neighbor]) -> None:
        """Exchange gossip with some of these peers."""
        if self._gossip.assigned is None or not partners:
            return
        if self._log is not None:
            await asyncio.to_thread(self._log.seen)
        sample = random.sample(partners, min(_PEERS_PER_ROUND, len(partners)))
        for batch in await asyncio.gather(*map(self._exchange_gossip, sample)):
            if batch is not None:
                self._gossip.receive(batch)

    def _share_cached_versions(self) -> None:
        for cached in list_verified(
            self._ctx.cache, self._ctx.coordinator_public, self._ctx.enrollment.fleet
        ):
            with contextlib.suppress(OSError):  # deleted since
                self._sharing.pieces.put(cached.work.base, cached.path)

    def _client(self, peer: Neighbor) -> PeerClient:
        assert self._gossip.assigned is not None
        return PeerClient(peer, self._gossip.assigned.access_token, self._ctx.credentials)

    async def _exchange_gossip(self, peer: Neighbor) -> GossipBatch | None:
        try:
            return await asyncio.to_thread(
                self._client(peer).exchange_gossip, self._gossip.outgoing()
            )
        except CommonweightError as err:
            log.debug("no gossip from a peer: %s", err.message)
            return None

    async def _fetch_newest(self, partners: list[Neighbor]) -> bool:
        """Fetch the newest version that a peer sends, if it is newer than ours."""
        # During work the version that it starts from must stay the newest.
        if not can_take_work(self._ctx.runner.state):
            return False
        own, now = self._gossip.heads.newest(), time.monotonic()
        heads = {word.peer: word.head for word, _, _ in self._gossip.entries() if word.head}
        holders: defaultdict[Head, list[Neighbor]] = defaultdict(list)
        for peer in partners:
            head = heads.get(peer.peer)
            is_newer = head is not None and (own is None or head > own)
            if head and is_newer and self._retry_at.get((head, peer.peer), 0.0) <= now:
                holders[head].append(peer)
        for head in sorted(holders, reverse=True)[:_MAX_VERSIONS_TRIED]:
            peers = holders[head]
            for peer in random.sample(peers, min(_MAX_HOLDERS_TRIED, len(peers))):
                if await self._try_fetch(head, peer):
                    return True
        return False

    async def _try_fetch(self, head: Head, peer: Neighbor) -> bool:
        """Fetch a version from this peer. False if that failed."""
        try:
            await asyncio.to_thread(self._fetch, head, peer)
        except (CommonweightError, OSError) as err:
            log.info("cannot fetch version %d of %s: %s", head.version, head.run, err)
            is_wrong = isinstance(err, BadMessage | BadWeights)
            self._retry_at.pop((head, peer.peer), None)  # the newest failure is the last entry
            self._retry_at[head, peer.peer] = time.monotonic() + (
                _WRONG_DATA_RETRY_S if is_wrong else _NO_ANSWER_RETRY_S
            )
            while len(self._retry_at) > _MAX_FAILED:
                del self._retry_at[next(iter(self._retry_at))]
            return False
        log.info("fetched version %d of %s from %s", head.version, head.run, peer.name)
        return True

    def _fetch(self, head: Head, peer: Neighbor) -> None:
        """Download a version and its proof. Raises CommonweightError, OSError."""
        client, folder = self._client(peer), self._ctx.cache
        proof = client.proof(head.digest)
        work, payload, signature = read_proof(
            proof, self._ctx.coordinator_public, self._ctx.enrollment.fleet
        )
        if Head.of(work) != head:
            raise BadMessage("it proves another version")
        check_room(folder, work.nbytes)
        part = path_in(folder, head.digest, ".spread")
        try:
            client.version(head.digest, work.nbytes, part, self._ctx.bandwidth.received)
            self._versions.adopt(part, head.digest)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        save_proof(folder, work, payload, signature)
