"""The parts of agents that work without the coordinator, over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent.daemon.context import AgentContext
from agent.daemon.gossip_loop import GossipLoop
from agent.daemon.state_runner import StateRunner
from agent.home.enrollment_file import Enrollment
from agent.home.settings_schema import AgentSettings
from agent.transport import version_proofs
from agent.transport.bandwidth import Bandwidth
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.p2p.gossip import GossipState
from agent.transport.p2p.sharing import Sharing
from agent.transport.version_proofs import VersionIndex
from agent.transport.version_store import VersionStore
from protocols.enrollment import certificates, identity
from protocols.enrollment.certificates import NodeCertificate
from protocols.local.atomic_files import write_private
from protocols.messages.envelope import Presence
from protocols.messages.mqtt import MqttAddress
from protocols.messages.states import PeerState
from protocols.messages.work import SIGNED_WORK, Work
from protocols.p2p.gossip import Head
from tests.support.https_site import HOST, Machine, Site
from tests.support.waiting import until

IDLE = Presence(state=PeerState.IDLE, version="1")


def certificate(site: Site, machine: Machine) -> bytes:
    return certificates.issue_certificate(
        site.ca_key,
        NodeCertificate(
            fleet=site.fleet_id,
            peer=machine.peer,
            name=machine.name,
            sign_public=identity.public_bytes(machine.sign_key),
            node_public=identity.node_public_pem(machine.node_key),
            not_after=time.time() + 60,
        ),
    )


class Peer:
    """An enrolled machine with the parts of an agent that work without the coordinator."""

    def __init__(self, site: Site, folder: Path, name: str, policy: str = "on") -> None:
        self.site, self.name, self.machine = site, name, site.enroll(name)
        self.home = folder / name
        self.cache = self.home / "cache"
        self.cache.mkdir(parents=True)
        write_private(self.home / "node.key", identity.private_pem(self.machine.node_key))
        self.credentials = credentials = site.credentials(self.machine)
        self.signs = identity.public_bytes(self.machine.sign_key)
        self.public = public = identity.public_bytes(site.sign_key)
        self.serves_nobody = policy != "on"  # tests use addresses outside private networks
        self._enrollment = Enrollment(
            peer=self.machine.peer,
            name=name,
            fleet=site.fleet_id,
            addresses=(site.address,),
            ca_pem=site.ca_pem.decode(),
            certificate=certificate(site, self.machine),
            coordinator_public=public,
            mqtt=MqttAddress(host=HOST, port=1),
        )
        self.heads = VersionIndex(self.cache, public, site.fleet_id)
        self.gossip = self.new_gossip()
        self.sharing = Sharing(policy, self.home, credentials, public, gossip_state=self.gossip)  # type: ignore[arg-type]
        self.gossip.address = self.sharing.address
        self.link = CoordinatorClient(credentials)
        self.loop = StateRunner(lambda _: None)
        self.loop.start()
        self.spread = GossipLoop(
            AgentContext(
                self.home,
                self._enrollment,
                credentials,
                AgentSettings(),
                self.loop,
                Bandwidth(self.home),
            ),
            self.gossip,
            self.sharing,
            VersionStore(self.cache, lambda: self.link, self.sharing),
            lambda: self.link,
        )

    def hold(self, version: int, since: float = 1.0) -> Head:
        """Store a version of a run with the coordinator's signature."""
        head, work, data = made(version, since)
        (self.cache / f"{head.digest}.safetensors").write_bytes(data)
        version_proofs.save_proof(
            self.cache, work, *SIGNED_WORK.seal(work, self.site.sign_key.sign)
        )
        return head

    def new_gossip(self) -> GossipState:
        return GossipState(
            self.home,
            self._enrollment,
            self.credentials,
            self.heads,
            lambda: self._enrollment.certificate,
            lambda: IDLE,
        )


def made(version: int, since: float) -> tuple[Head, Work, bytes]:
    """A version: its head, signed work on it, and its bytes."""
    data = b"version %d of %f " % (version, since) * 1000
    work = Work(
        run=f"run-{since:g}",
        since=since,
        round=version + 1,
        kind="train",
        task="ping",
        base=hashlib.sha256(data).hexdigest(),
        nbytes=len(data),
    )
    return Head.of(work), work, data


@asynccontextmanager
async def without_coordinator(*peers: Peer) -> AsyncIterator[None]:
    """Running peers that know each other from the coordinator, which is gone."""
    serving = [asyncio.create_task(peer.sharing.run()) for peer in peers]
    running = []
    try:
        for peer in peers:
            await until(lambda p=peer: p.serves_nobody or p.sharing.plan_request().address)
        for peer in (*peers, *peers):  # again, now that all have announced their addresses
            assert await peer.spread._refresh_neighbors()
        running = [asyncio.create_task(peer.spread.run()) for peer in peers]
        yield
    finally:
        for task in (*serving, *running):
            task.cancel()
        await asyncio.gather(*serving, *running, return_exceptions=True)
        for peer in peers:
            peer.link.close()
