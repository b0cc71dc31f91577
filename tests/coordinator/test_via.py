"""Watching the fleet through one of its peers, while the coordinator is away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from coordinator import via
from coordinator.plain import plain_table
from coordinator.via import ViaSource
from protocols import identity
from protocols.errors import NotRunning, Refused, UnknownName, Unreachable
from protocols.gossip import NEIGHBOURS_PATH, Neighbours
from protocols.states import PeerState
from tests.agent.lone_peers import Peer, until, without_coordinator
from tests.site_fixtures import HOST, Site


def home_of(site: Site, folder: Path) -> Path:
    """An operator's home, as `init` makes it."""
    home = folder / "home"
    home.mkdir()
    identity.save_key(home / "operator.key", site.operator_key)
    (home / "ca.pem").write_bytes(site.ca_pem)
    return home


async def told(site: Site) -> Neighbours:
    """What a watcher is given while the coordinator is there."""

    def ask() -> bytes:
        with site.http() as http:
            headers = site.operator("GET", NEIGHBOURS_PATH)
            return http.get(NEIGHBOURS_PATH, headers=headers).raise_for_status().content

    return msgspec.json.decode(await asyncio.to_thread(ask), type=Neighbours)


async def test_the_fleet_as_a_peer_knows_it(tmp_path: Path) -> None:
    (tmp_path / "coordinator").mkdir()
    with Site(tmp_path / "coordinator").up() as site:
        home = home_of(site, tmp_path)
        with pytest.raises(NotRunning):
            ViaSource(home, "ann")
        ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
        head = ann.hold(3)
        async with without_coordinator(ann, bob):
            via.keep(home, await told(site))
            await until(lambda: bob.heads.newest() == head)
            await until(lambda: ann.gossip.known().alike)
            source = ViaSource(home, "ann")
            fleet = await source.snapshot()
            assert source.heading == fleet.name == "as ann knows it"
            rows = {peer.name: (peer.state, peer.run, peer.round) for peer in fleet.peers.values()}
            assert rows == dict.fromkeys(("ann", "bob"), (PeerState.IDLE, head.run, head.version))
            assert [event.text for event in fleet.events if head.digest[:12] in event.text]
            assert "as ann knows it" in str(plain_table(fleet, fleet.at, source.heading).title)

            moved = ViaSource(home, ann.sharing.asked().address)
            assert (await moved.snapshot()).peers.keys() == fleet.peers.keys()
            with pytest.raises(UnknownName, match="cyd"):
                ViaSource(home, "cyd")
            with pytest.raises(Refused):
                await source.stop_run("r")
            with pytest.raises(Unreachable):
                await anext(aiter(source.messages()))


async def test_who_is_not_of_the_fleet_sees_nothing(tmp_path: Path) -> None:
    (tmp_path / "coordinator").mkdir()
    with Site(tmp_path / "coordinator").up() as site:
        home = home_of(site, tmp_path)
        ann, bob = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "bob")
        async with without_coordinator(ann, bob):
            given = await told(site)
            identity.save_key(home / "operator.key", identity.new_signing_key())
            via.keep(home, given)
            with pytest.raises(Refused, match="ann refused"):
                await ViaSource(home, "ann").snapshot()
            # Somebody else at ann's address is not asked.
            at_bob = bob.sharing.asked().address
            near = tuple(
                msgspec.structs.replace(one, address=at_bob) for one in given.near
                if one.name == "ann"
            )  # fmt: skip
            via.keep(home, msgspec.structs.replace(given, near=near))
            with pytest.raises(Refused, match="somebody else"):
                await ViaSource(home, "ann").snapshot()
            via.keep(home, msgspec.structs.replace(given, near=()))
            with pytest.raises(Refused, match="somebody else"):
                await ViaSource(home, at_bob).snapshot()
        via.keep(home, given)
        with pytest.raises(Unreachable):
            await ViaSource(home, "ann").snapshot()
        assert at_bob.startswith(HOST)
