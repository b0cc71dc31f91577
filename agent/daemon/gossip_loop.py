"""Life without the coordinator: peers tell each other what they hold, and end on the newest.

While the coordinator is there it is asked now and then who could be asked instead. When it is away,
some peers are asked for words at growing intervals; whoever hears of a newer version than its own
fetches it from a peer that holds it, with the coordinator's signature as proof.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

from agent.daemon.state_machine import is_willing
from agent.daemon.state_runner import StateRunner
from agent.home.credentials import Credentials
from agent.transport.bandwidth import Bandwidth
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.p2p.gossip import GossipState
from agent.transport.p2p.peer_client import PeerClient
from agent.transport.p2p.sharing import Sharing
from agent.transport.version_proofs import list_verified, read_proof, save_proof
from agent.transport.version_store import VersionStore
from protocols.errors import BadMessage, BadWeights, CommonweightError
from protocols.local.disk_space import check_room
from protocols.messages.work import Work
from protocols.p2p.gossip import GossipBatch, Head, Neighbor

log = logging.getLogger("commonweight.share")

_TICK_S = 1.0
#: Between two rounds of asking, first and at most.
MIN_INTERVAL_S, MAX_INTERVAL_S = 2.0, 60.0
_PEERS_PER_ROUND = 2
#: In one round, and of each version: who lies, or serves nobody, holds up no other.
_MAX_VERSIONS_TRIED, _MAX_HOLDERS_TRIED = 4, 3
#: When the coordinator is asked for neighbours and a new pass again: soon in a session, as others
#: may just have come, then so often. And after a failure.
_FIRST_REFRESHES_S, _REFRESH_EVERY_S, _REFRESH_RETRY_S = (10.0, 60.0, 600.0), 3600.0, 60.0
#: Who did not answer may later; who has sent what is not the version is not asked for it soon.
_NO_ANSWER_RETRY_S, _WRONG_DATA_RETRY_S = 60.0, 3600.0
_MAX_FAILED = 256


class GossipLoop:
    """Runs beside an agent's session. `link()` is that of the moment; `session()`: is it open?"""

    def __init__(
        self,
        folder: Path,
        credentials: Credentials,
        coordinator_public: bytes,
        runner: StateRunner,
        gossip: GossipState,
        sharing: Sharing,
        versions: VersionStore,
        bandwidth: Bandwidth,
        link: Callable[[], CoordinatorClient],
    ) -> None:
        self._folder, self._credentials = folder, credentials
        self._coordinator_public = coordinator_public
        self._runner, self._gossip, self._sharing = runner, gossip, sharing
        self._versions, self._bandwidth, self._link = versions, bandwidth, link
        #: By version and peer: until when (monotonic s) it is not asked for it again.
        self._retry_at: dict[tuple[Head, str], float] = {}
        self._shared_cache = False

    async def run(self) -> None:
        """Until cancelled."""
        if self._sharing.is_off:
            await asyncio.Event().wait()
        learn_at, learnt_as, ask_at, every_s = 0.0, "", 0.0, MIN_INTERVAL_S
        waits = iter(_FIRST_REFRESHES_S)
        while True:
            now = time.monotonic()
            if self._runner.state.session:
                address = self._sharing.plan_request().address
                if now >= learn_at or address != learnt_as:
                    done = await self._refresh_neighbours()
                    learn_at = now + (next(waits, _REFRESH_EVERY_S) if done else _REFRESH_RETRY_S)
                    learnt_as = address
                ask_at, every_s = now + MIN_INTERVAL_S, MIN_INTERVAL_S
            else:
                learn_at, waits = now, iter(_FIRST_REFRESHES_S)
                if now >= ask_at:
                    every_s = (
                        MIN_INTERVAL_S
                        if await self._run_round()
                        else min(1.5 * every_s, MAX_INTERVAL_S)
                    )
                    ask_at = time.monotonic() + every_s * random.uniform(0.8, 1.2)
            await asyncio.sleep(_TICK_S)

    async def _refresh_neighbours(self) -> bool:
        """Ask the coordinator whom to ask without it; False if that failed."""
        try:
            link, asked = self._link(), self._sharing.plan_request()
            self._gossip.learn(given := await asyncio.to_thread(link.neighbours, asked))
            await asyncio.to_thread(self._gossip.save, given)
        except (CommonweightError, OSError) as err:
            log.debug("no neighbours from the coordinator: %s", err)
            return False
        return True

    async def _run_round(self) -> bool:
        """One round; True if it brought a newer version."""
        given = self._gossip.assigned
        partners = self._gossip.contacts()
        if given is None or not partners:
            return False
        if not self._shared_cache:  # what lay here before this agent was started can be served too
            self._shared_cache = True
            await asyncio.to_thread(self._share_cached_versions)
        chosen = random.sample(partners, min(_PEERS_PER_ROUND, len(partners)))
        for told in await asyncio.gather(*(self._exchange_gossip(partner) for partner in chosen)):
            if told is not None:
                self._gossip.receive(told)
        return await self._fetch_newest(partners)

    def _share_cached_versions(self) -> None:
        for kept in list_verified(self._folder, self._coordinator_public):
            with contextlib.suppress(OSError):  # dropped meanwhile
                self._sharing.pieces.put(kept.work.base, kept.path)

    def _client(self, partner: Neighbor) -> PeerClient:
        assert self._gossip.assigned is not None
        return PeerClient(
            partner, self._gossip.assigned.access_token, self._credentials.sign_request
        )

    async def _exchange_gossip(self, partner: Neighbor) -> GossipBatch | None:
        try:
            return await asyncio.to_thread(self._client(partner).words, self._gossip.outgoing())
        except CommonweightError as err:
            log.debug("no words from a peer: %s", err.message)
            return None

    async def _fetch_newest(self, partners: list[Neighbor]) -> bool:
        """Fetch the newest version that a peer sends, if it is newer than ours."""
        worker = self._runner.state
        if worker.work is not None or not is_willing(worker):  # what it works on must stay here
            return False
        own, now = self._gossip.heads.newest(), time.monotonic()
        told = {word.peer: word.head for word, _, _ in self._gossip.entries() if word.head}
        holders: dict[Head, list[Neighbor]] = {}
        for one in partners:
            head = told.get(one.peer)
            if head is None or (own is not None and head <= own):
                continue
            if self._retry_at.get((head, one.peer), 0.0) <= now:
                holders.setdefault(head, []).append(one)
        for head in sorted(holders, reverse=True)[:_MAX_VERSIONS_TRIED]:
            near = holders[head]
            for holder in random.sample(near, min(_MAX_HOLDERS_TRIED, len(near))):
                if await self._try_fetch(head, holder):
                    return True
        return False

    async def _try_fetch(self, head: Head, holder: Neighbor) -> bool:
        """Fetch a version from this peer; False if it does not come."""
        try:
            await asyncio.to_thread(self._fetch, head, holder)
        except (CommonweightError, OSError) as err:
            log.info("version %d of %s does not come: %s", head.version, head.run, err)
            wait_s = (
                _WRONG_DATA_RETRY_S
                if isinstance(err, BadMessage | BadWeights)
                else _NO_ANSWER_RETRY_S
            )
            self._retry_at.pop((head, holder.peer), None)
            self._retry_at[head, holder.peer] = time.monotonic() + wait_s
            while len(self._retry_at) > _MAX_FAILED:
                del self._retry_at[next(iter(self._retry_at))]
            return False
        log.info("took version %d of %s from %s", head.version, head.run, holder.name)
        return True

    def _fetch(self, head: Head, holder: Neighbor) -> None:
        """Bring a version and its proof. Raises CommonweightError, OSError."""
        asking = self._client(holder)
        work, payload, signature = self._verify_proof(head, asking.proof(head.digest))
        check_room(self._folder, work.nbytes)
        part = self._folder / f"{head.digest}.spread"
        try:
            asking.version(head.digest, work.nbytes, part, self._bandwidth.received)
            self._versions.adopt(part, head.digest)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        save_proof(self._folder, work, payload, signature)

    def _verify_proof(self, head: Head, proof: bytes) -> tuple[Work, bytes, bytes]:
        """What the coordinator has signed of a version. Raises BadMessage."""
        work, payload, signature = read_proof(proof, self._coordinator_public)
        if Head.of(work) != head:
            raise BadMessage("it proves another version")
        return work, payload, signature
