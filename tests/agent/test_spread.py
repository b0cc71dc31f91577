"""Agents without their coordinator: they find each other, and all end on the newest version."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent import kept
from agent.bandwidth import Bandwidth
from agent.kept import Heads
from agent.link import Link
from agent.loop import WorkerLoop
from agent.settings import Enrolment
from agent.sharing import Sharing
from agent.sharing import spread as spreading
from agent.sharing.asking import Asking
from agent.sharing.gossip import FILE, Gossip
from agent.sharing.spread import Spread
from agent.versions import Versions
from agent.worker import WorkBegan, WorkEnded
from protocols import gossip, identity, messages, weights
from protocols.errors import Unreachable
from protocols.gossip import Head, Neighbour, Pass, Told
from protocols.identity import NodeCertificate
from protocols.messages import Presence, Work
from protocols.mqtt import MqttAddress
from protocols.states import PeerState
from tests.site_fixtures import HOST, Machine, Site

IDLE = Presence(state=PeerState.IDLE, version="1")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "_LOOK_S", 0.02)
    monkeypatch.setattr(spreading, "FIRST_S", 0.05)
    monkeypatch.setattr(spreading, "MOST_S", 0.1)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    with Site(folder).up() as up:
        yield up


def certificate(site: Site, machine: Machine) -> bytes:
    return identity.issue(
        site.ca_key,
        NodeCertificate(
            fleet=site.fleet_id,
            peer=machine.peer,
            name=machine.name,
            sign_public=identity.raw_public(machine.sign_key),
            node_public=identity.node_public(machine.node_key),
            not_after=time.time() + 60,
        ),
    )


class Peer:
    """A machine that has joined, with all of an agent that works without the coordinator."""

    def __init__(self, site: Site, folder: Path, name: str, policy: str = "on") -> None:
        self.site, self.name, self.machine = site, name, site.enrol(name)
        self.home = folder / name
        self.cache = self.home / "cache"
        self.cache.mkdir(parents=True)
        identity.save_key(self.home / "node.key", self.machine.node_key)
        self.credentials = credentials = site.credentials(self.machine)
        self.signs = identity.raw_public(self.machine.sign_key)
        self.public = public = identity.raw_public(site.sign_key)
        self.serves_nobody = policy == "off"
        self._enrolment = Enrolment(
            peer=self.machine.peer,
            name=name,
            fleet=site.fleet_id,
            addresses=(site.address,),
            ca_pem=site.ca_pem.decode(),
            certificate=certificate(site, self.machine),
            coordinator_public=public,
            mqtt=MqttAddress(host=HOST, port=1),
        )
        self.heads = Heads(self.cache, public)
        self.gossip = self.new_gossip()
        self.sharing = Sharing(policy, self.home, credentials, public, hearsay=self.gossip)  # type: ignore[arg-type]
        self.link = Link(credentials)
        self.loop = WorkerLoop(lambda _: None)
        self.loop.begin()
        self.spread = Spread(
            self.cache,
            credentials,
            public,
            self.loop,
            self.gossip,
            self.sharing,
            Versions(self.cache, lambda: self.link, self.sharing),
            Bandwidth(self.home),
            lambda: self.link,
        )

    def hold(self, version: int, since: float = 1.0) -> Head:
        """Let it have a version of a run, with the coordinator's word."""
        head, work, data = made(version, since)
        (self.cache / f"{head.digest}.safetensors").write_bytes(data)
        kept.prove(self.cache, work, *messages.sign_work(work, self.site.sign_key.sign))
        return head

    def new_gossip(self) -> Gossip:
        return Gossip(
            self.home,
            self._enrolment,
            self.credentials,
            self.heads,
            lambda: IDLE,
            lambda: self.sharing.asked().address,
        )


def made(version: int, since: float) -> tuple[Head, Work, bytes]:
    """A version: its head, work on it, its bytes."""
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


async def until(condition: Callable[[], object], within_s: float = 30.0) -> None:
    """Wait for a condition, with a bound that only a failure meets."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def without_coordinator(*peers: Peer) -> AsyncIterator[None]:
    """Peers at work that know each other from its time, and have it no more."""
    serving = [asyncio.create_task(peer.sharing.run()) for peer in peers]
    running = []
    try:
        for peer in peers:
            await until(lambda p=peer: p.serves_nobody or p.sharing.asked().address)
        for peer in (*peers, *peers):  # once more, now that all have told where they serve
            assert await asyncio.to_thread(peer.spread._learn)
        running = [asyncio.create_task(peer.spread.run()) for peer in peers]
        yield
    finally:
        for task in (*serving, *running):
            task.cancel()
        await asyncio.gather(*serving, *running, return_exceptions=True)
        for peer in peers:
            peer.link.close()


async def test_all_end_on_the_newest_version(site: Site, tmp_path: Path) -> None:
    ann, bob, cyd = (Peer(site, tmp_path, name) for name in ("ann", "bob", "cyd"))
    dan = Peer(site, tmp_path, "dan", "off")  # hears, and is heard, though it serves nobody
    old, newest = ann.hold(1), bob.hold(4)
    cyd.hold(7, since=0.5)  # of an earlier run
    fleet = (ann, bob, cyd, dan)
    async with without_coordinator(*fleet):
        await until(lambda: all(peer.heads.newest() == newest for peer in fleet))
        await until(lambda: all(peer.gossip.known().alike == 3 for peer in fleet))
        for peer in fleet:
            assert weights.file_digest(peer.heads.path(newest.digest)) == newest.digest
            assert bool(peer.gossip.known().shares_at) == (peer is not dan)
        assert ann.heads.path(old.digest).exists(), "the last two are kept"
        assert len(kept.held(cyd.cache, cyd.public)) == 2, "each with its proof"


async def test_what_is_in_work_stays_here(site: Site, tmp_path: Path) -> None:
    ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
    base, newest = ann.hold(1), bob.hold(4)
    ann.loop.happened(WorkBegan(made(1, 1.0)[1]))
    async with without_coordinator(ann, bob):
        await until(lambda: ann.gossip.known().heard)
        assert ann.heads.newest() == base
        ann.loop.happened(WorkEnded())
        await until(lambda: ann.heads.newest() == newest)


@pytest.mark.parametrize("wrong", ["no proof", "another's proof", "wrong bytes", "short"])
async def test_a_peer_that_lies_about_what_it_holds(
    site: Site, tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, rogue = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "rogue")
    base, real = ann.hold(1), rogue.hold(4)
    lie = real
    file = rogue.heads.path(real.digest)
    match wrong:
        case "no proof":
            lie = Head(since=1e12, run="mine", version=9, digest="9" * 64)
        case "another's proof":
            lie = Head(since=real.since, run=real.run, version=9, digest=real.digest)
        case "wrong bytes":
            file.write_bytes(bytes(file.stat().st_size))
        case "short":
            file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(rogue.heads, "newest", lambda: lie)
    rogue.sharing.shelf.put(real.digest, file)
    async with without_coordinator(ann, rogue):
        await until(lambda: lie in ann.spread._failed)
        assert ann.heads.newest() == base
        assert {path.name for path in ann.cache.iterdir()} == {
            f"{base.digest}.safetensors",
            f"{base.digest}.work.json",
        }


async def test_words_are_for_who_has_a_pass(site: Site, tmp_path: Path) -> None:
    ann, bob, eve = (Peer(site, tmp_path, name) for name in ("ann", "bob", "eve"))
    ann.hold(1)
    async with without_coordinator(ann, bob, eve):
        at_ann = Neighbour(
            peer=ann.machine.peer,
            name="ann",
            address=ann.sharing.asked().address,
            node_public=identity.node_public(ann.machine.node_key),
        )

        async def let_in(who: Peer, sealed: bytes, partner: Neighbour = at_ann) -> bool:
            asking = Asking(partner, sealed, who.credentials.signed)
            try:
                return bool((await asyncio.to_thread(asking.words, Told())).words)
            except Unreachable:
                return False

        assert bob.gossip.given is not None
        assert eve.gossip.given is not None
        good = bob.gossip.given.pass_
        assert await let_in(bob, good)
        assert not await let_in(bob, b"")
        assert not await let_in(eve, good), "a pass is for the key that it names"
        own = Pass(holder=eve.machine.peer, sign_public=eve.signs, until=time.time() + 60)
        assert not await let_in(eve, gossip.issue(own, eve.machine.sign_key.sign))
        ended = Pass(holder=bob.machine.peer, sign_public=bob.signs, until=time.time() - 1)
        assert not await let_in(bob, gossip.issue(ended, site.sign_key.sign))
        elsewhere = replace(at_ann, node_public=identity.node_public(bob.machine.node_key))
        assert not await let_in(bob, good, elsewhere), "nobody but ann is asked"

        site.registry.remove(eve.machine.peer, "a thief")
        assert await let_in(eve, eve.gossip.given.pass_)
        assert await asyncio.to_thread(ann.spread._learn)
        assert not await let_in(eve, eve.gossip.given.pass_)
        assert eve.machine.peer not in {one.peer for one in ann.gossip.partners()}


async def test_whom_to_ask_outlives_a_restart(site: Site, tmp_path: Path) -> None:
    ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
    async with without_coordinator(ann, bob):
        again = ann.new_gossip()
        assert [one.name for one in again.partners()] == ["bob"]
        (ann.home / FILE).write_text("{")
        assert ann.new_gossip().partners() == []
