"""Agents without their coordinator find each other and fetch the newest version."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from agent.daemon import gossip_loop
from agent.daemon.state_machine import WorkEnded, WorkStarted
from agent.transport import version_proofs
from agent.transport.p2p import server, sharing
from agent.transport.p2p.gossip import FILE
from agent.transport.p2p.peer_client import PeerClient
from protocols.enrollment import identity
from protocols.errors import Unreachable
from protocols.messages.envelope import Presence
from protocols.messages.states import PeerState
from protocols.model import weights
from protocols.p2p import gossip
from protocols.p2p.gossip import AccessToken, GossipBatch, Head, Neighbor
from protocols.p2p.swarm import DownloadPlanRequest
from tests.support.https_site import Machine, Site
from tests.support.lone_peers import Peer, certificate, made, without_coordinator
from tests.support.waiting import until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip_loop, "_TICK_S", 0.02)
    monkeypatch.setattr(gossip_loop, "MIN_INTERVAL_S", 0.05)
    monkeypatch.setattr(gossip_loop, "MAX_INTERVAL_S", 0.1)


async def test_all_peers_fetch_the_newest_version(site: Site, tmp_path: Path) -> None:
    ann, bob, cyd = fleet = [Peer(site, tmp_path, name) for name in ("ann", "bob", "cyd")]
    old, newest = ann.hold(1), bob.hold(4)
    cyd.hold(7, since=0.5)  # of an earlier run
    async with without_coordinator(*fleet):
        await until(lambda: all(peer.heads.newest() == newest for peer in fleet))
        await until(lambda: all(peer.gossip.summary().alike == 2 for peer in fleet))
        for peer in fleet:
            assert weights.file_digest(peer.heads.path(newest.digest)) == newest.digest
            assert peer.gossip.summary().shares_at
        assert ann.heads.path(old.digest).exists(), "the last two are kept"
        assert len(version_proofs.list_verified(cyd.cache, cyd.public, site.fleet_id)) == 2, (
            "each with its proof"
        )


async def test_a_peer_that_shares_nothing_sends_and_fetches_nothing(
    site: Site, tmp_path: Path
) -> None:
    ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
    dan = Peer(site, tmp_path, "dan", "off")
    newest = bob.hold(4)
    async with without_coordinator(ann, bob, dan):
        await until(lambda: ann.heads.newest() == newest)
        await until(lambda: ann.gossip.summary().alike)
        assert dan.heads.newest() is None
        assert dan.gossip.summary() == (None, 0, 0, "")
        for peer in (ann, bob):
            assert {word.peer for word, _, _ in peer.gossip.entries()} < {
                ann.machine.peer,
                bob.machine.peer,
            }


async def test_no_version_is_fetched_during_work(site: Site, tmp_path: Path) -> None:
    ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
    base, newest = ann.hold(1), bob.hold(4)
    ann.loop.dispatch(WorkStarted(made(1, 1.0)[1]))
    async with without_coordinator(ann, bob):
        await until(lambda: ann.gossip.summary().heard)
        assert ann.heads.newest() == base
        ann.loop.dispatch(WorkEnded())
        await until(lambda: ann.heads.newest() == newest)


@pytest.mark.parametrize("wrong", ["no proof", "another's proof", "wrong bytes", "short"])
async def test_a_peer_that_lies_about_its_version(
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
    rogue.sharing.pieces.put(real.digest, file)
    async with without_coordinator(ann, rogue):
        await until(lambda: (lie, rogue.machine.peer) in ann.spread._retry_at)
        assert ann.heads.newest() == base
        assert {path.name for path in ann.cache.iterdir()} == {
            f"{base.digest}.safetensors",
            f"{base.digest}.work.json",
        }


async def test_gossip_needs_an_access_token(site: Site, tmp_path: Path) -> None:
    ann, bob, eve = (Peer(site, tmp_path, name) for name in ("ann", "bob", "eve"))
    ann.hold(1)
    async with without_coordinator(ann, bob, eve):
        at_ann = Neighbor(
            peer=ann.machine.peer,
            name="ann",
            address=ann.sharing.plan_request().address,
            node_public=identity.node_public_pem(ann.machine.node_key),
            signs=2,
        )

        async def let_in(who: Peer, sealed: bytes, partner: Neighbor = at_ann) -> bool:
            asking = PeerClient(partner, sealed, who.credentials)
            try:
                return bool(
                    (await asyncio.to_thread(asking.exchange_gossip, GossipBatch())).entries
                )
            except Unreachable:
                return False

        assert bob.gossip.assigned is not None
        assert eve.gossip.assigned is not None
        good = bob.gossip.assigned.access_token
        assert await let_in(bob, good)
        assert not await let_in(bob, b"")
        assert not await let_in(eve, good), "a token is valid only for the key that it names"
        own = AccessToken(holder=eve.machine.peer, sign_public=eve.signs, until=time.time() + 60)
        assert not await let_in(
            eve, gossip.SIGNED_ACCESS_TOKEN.pack(own, eve.machine.sign_key.sign)
        )
        ended = AccessToken(holder=bob.machine.peer, sign_public=bob.signs, until=time.time() - 1)
        assert not await let_in(bob, gossip.SIGNED_ACCESS_TOKEN.pack(ended, site.sign_key.sign))
        elsewhere = replace(at_ann, node_public=identity.node_public_pem(bob.machine.node_key))
        assert not await let_in(bob, good, elsewhere), "the server must have the key of ann"

        site.registry.remove(eve.machine.peer, "a thief")
        assert await let_in(eve, eve.gossip.assigned.access_token)
        assert await ann.spread._refresh_neighbors()
        assert not await let_in(eve, eve.gossip.assigned.access_token)
        assert eve.machine.peer not in {one.peer for one in ann.gossip.contacts()}


async def test_known_peers_survive_a_restart(site: Site, tmp_path: Path) -> None:
    ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
    async with without_coordinator(ann, bob):
        again = ann.new_gossip()
        assert [one.name for one in again.contacts()] == ["bob"]
        (ann.home / FILE).write_text("{")
        assert ann.new_gossip().contacts() == []


async def test_a_version_that_no_peer_sends_blocks_no_other(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
    cyd, rogue = Peer(site, tmp_path, "cyd", "lan"), Peer(site, tmp_path, "rogue")
    cyd.hold(9)  # announces that it is in no private network, and serves no peer
    ann.hold(1)
    lies = iter(range(100, 10_000))  # a new one each time
    monkeypatch.setattr(
        rogue.heads,
        "newest",
        lambda: Head(since=1e12, run="mine", version=next(lies), digest="9" * 64),
    )
    newest = bob.hold(4)
    async with without_coordinator(ann, bob, cyd, rogue):
        await until(lambda: ann.gossip.summary().heard == 3)
        await until(lambda: ann.heads.newest() == newest)


async def test_a_peer_that_did_not_send_a_version_is_asked_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gossip_loop, "_NO_ANSWER_RETRY_S", 0.1)
    ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
    newest = bob.hold(4)
    file = bob.heads.path(newest.digest)
    bob.spread._shared_cache = True  # it announces a version that it cannot send yet
    monkeypatch.setattr(server, "_PIECE_S", 0.05)
    async with without_coordinator(ann, bob):
        await until(lambda: (newest, bob.machine.peer) in ann.spread._retry_at)
        bob.sharing.pieces.put(newest.digest, file)
        await until(lambda: ann.heads.newest() == newest)


@pytest.mark.parametrize("address", ["x", "h:1", f"{'a' * 70}:80", "127.0.0.1 :80", "[::1]:²"])
async def test_a_malformed_address_has_no_effect(site: Site, tmp_path: Path, address: str) -> None:
    ann, rogue = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "rogue")
    nowhere = DownloadPlanRequest(address=address, serves_other_networks=True)
    rogue.sharing.plan_request = lambda: nowhere  # type: ignore[method-assign, misc, assignment]
    rogue.gossip.address = lambda: address
    with pytest.raises(Unreachable):  # the coordinator refuses it, too
        await asyncio.to_thread(rogue.link.neighbors, nowhere)
    ann.sharing.run = asyncio.Event().wait  # type: ignore[method-assign, assignment]
    assert await ann.spread._refresh_neighbors()
    ann.gossip.receive(rogue.gossip.outgoing())
    assert not ann.gossip.entries()
    assert not await ann.spread._run_round()
    ann.link.close()
    rogue.link.close()


async def test_a_batch_is_never_larger_than_its_limit(site: Site, tmp_path: Path) -> None:
    ann = Peer(site, tmp_path, "ann")
    tasks = tuple(f"{number:060}" for number in range(64))  # the maximum number and length
    long = Presence(state=PeerState.IDLE, tasks=tasks, reason="long " * 60)
    for number in range(gossip.MAX_ENTRIES):
        machine = Machine(f"m{number}")
        word = gossip.GossipEntry(peer=machine.peer, at=time.time(), presence=long)
        said = gossip.sign_entry(word, certificate(site, machine), machine.sign_key.sign)
        ann.gossip.receive(GossipBatch(entries=(said,)))
    told = ann.gossip.outgoing()
    assert 100 < len(told.entries) < len(ann.gossip.entries())
    assert len(msgspec.msgpack.encode(told)) <= gossip.MAX_BATCH_BYTES
    ann.link.close()


async def test_an_agent_runs_without_a_certificate_for_sharing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_CHECK_EVERY_S", 0.01)
    ann = Peer(site, tmp_path, "ann")
    there = ann.home / sharing.CERTIFICATE
    there.mkdir()  # the file cannot be written, as on a full disk
    running = asyncio.create_task(ann.sharing.run())
    await asyncio.wait({running}, timeout=0.2)
    assert not running.done()
    there.rmdir()
    await until(lambda: ann.sharing.plan_request().address)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    ann.link.close()
