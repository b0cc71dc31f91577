"""Watching the fleet through one of its peers, while the coordinator is away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from agent.transport.p2p.peer_client import PeerClient
from coordinator.fleet.auth import OPERATOR
from coordinator.monitor.plain_table import plain_table
from coordinator.remote import peer_source
from coordinator.remote.peer_source import PeerSource
from protocols.enrollment import identity
from protocols.errors import NotRunning, Refused, UnknownName, Unreachable
from protocols.local.atomic_files import write_private
from protocols.messages.states import PeerState
from protocols.p2p.gossip import NEIGHBORS_PATH, GossipBatch, NeighborsResponse
from tests.support.https_site import HOST, Site
from tests.support.lone_peers import Peer, without_coordinator
from tests.support.waiting import until


@pytest.fixture(autouse=True)
def _quick_gossip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.daemon.gossip_loop._TICK_S", 0.02)
    monkeypatch.setattr("agent.daemon.gossip_loop.MIN_INTERVAL_S", 0.05)


def home_of(site: Site, folder: Path) -> Path:
    """An operator's home, as `init` makes it."""
    home = folder / "home"
    home.mkdir()
    write_private(home / "operator.key", identity.private_pem(site.operator_key))
    (home / "ca.pem").write_bytes(site.ca_pem)
    return home


async def told(site: Site) -> NeighborsResponse:
    """What a watcher is given while the coordinator is there."""

    def ask() -> bytes:
        with site.http() as http:
            headers = site.operator("GET", NEIGHBORS_PATH)
            return http.get(NEIGHBORS_PATH, headers=headers).raise_for_status().content

    return msgspec.json.decode(await asyncio.to_thread(ask), type=NeighborsResponse)


async def test_the_fleet_as_a_peer_knows_it(tmp_path: Path) -> None:
    (tmp_path / "coordinator").mkdir()
    with Site(tmp_path / "coordinator").up() as site:
        home = home_of(site, tmp_path)
        with pytest.raises(NotRunning):
            PeerSource(home, "ann")
        ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
        head = ann.hold(3)
        async with without_coordinator(ann, bob):
            peer_source.save_neighbors(home, await told(site))
            await until(lambda: bob.heads.newest() == head)
            await until(lambda: ann.gossip.summary().alike)
            source = PeerSource(home, "ann")
            fleet = await source.snapshot()
            assert source.heading == fleet.name == "as ann knows it"
            rows = {peer.name: (peer.state, peer.run, peer.round) for peer in fleet.peers.values()}
            assert rows == dict.fromkeys(("ann", "bob"), (PeerState.IDLE, head.run, head.version))
            assert [event.text for event in fleet.events if head.digest[:12] in event.text]
            assert "as ann knows it" in str(plain_table(fleet, fleet.at, source.heading).title)

            moved = PeerSource(home, ann.sharing.plan_request().address)
            assert (await moved.snapshot()).peers.keys() == fleet.peers.keys()
            with pytest.raises(UnknownName, match="cyd"):
                PeerSource(home, "cyd")
            with pytest.raises(Refused):
                await source.ask(lambda remote: remote.stop_run("r"))
            with pytest.raises(Unreachable):
                await anext(aiter(source.messages()))


async def test_an_observer_cannot_download_versions(tmp_path: Path) -> None:
    (tmp_path / "coordinator").mkdir()
    with Site(tmp_path / "coordinator").up() as site:
        ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
        head = ann.hold(3)
        operator = ann.credentials._replace(peer=OPERATOR, sign_key=site.operator_key)
        async with without_coordinator(ann, bob):
            await until(lambda: bob.heads.newest() == head)
            given = await told(site)
            near = next(one for one in given.neighbors if one.name == "ann")
            asking = PeerClient(near, given.access_token, operator)
            assert (await asyncio.to_thread(asking.exchange_gossip, GossipBatch())).entries
            with pytest.raises(Unreachable, match="401"):
                await asyncio.to_thread(asking.proof, head.digest)
            nbytes = ann.heads.path(head.digest).stat().st_size
            part = tmp_path / "part"
            with pytest.raises(Unreachable, match="401"):
                await asyncio.to_thread(asking.version, head.digest, nbytes, part, lambda got: None)


@pytest.mark.parametrize("word", ["127.0.0.1:70000", f"{'a' * 70}:80", "a b:80"])
async def test_an_invalid_address_is_a_clear_error(tmp_path: Path, word: str) -> None:
    (tmp_path / "coordinator").mkdir()
    with Site(tmp_path / "coordinator").up() as site:
        home = home_of(site, tmp_path)
        peer_source.save_neighbors(home, await told(site))
        with pytest.raises(Unreachable, match="does not answer at"):
            await PeerSource(home, word).snapshot()


async def test_strangers_see_nothing(tmp_path: Path) -> None:
    (tmp_path / "coordinator").mkdir()
    with Site(tmp_path / "coordinator").up() as site:
        home = home_of(site, tmp_path)
        ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
        async with without_coordinator(ann, bob):
            given = await told(site)
            write_private(home / "operator.key", identity.private_pem(identity.new_signing_key()))
            peer_source.save_neighbors(home, given)
            with pytest.raises(Refused, match="ann refused"):
                await PeerSource(home, "ann").snapshot()
            # Somebody else at ann's address is not asked.
            at_bob = bob.sharing.plan_request().address
            near = tuple(
                msgspec.structs.replace(one, address=at_bob) for one in given.neighbors
                if one.name == "ann"
            )  # fmt: skip
            peer_source.save_neighbors(home, msgspec.structs.replace(given, neighbors=near))
            with pytest.raises(Refused, match="another machine"):
                await PeerSource(home, "ann").snapshot()
            peer_source.save_neighbors(home, msgspec.structs.replace(given, neighbors=()))
            with pytest.raises(Refused, match="another machine"):
                await PeerSource(home, at_bob).snapshot()
        peer_source.save_neighbors(home, given)
        with pytest.raises(Unreachable):
            await PeerSource(home, "ann").snapshot()
        assert at_bob.startswith(HOST)
