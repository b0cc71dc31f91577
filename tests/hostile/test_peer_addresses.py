"""Nobody can send a machine to an address of his choice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from agent.transport.p2p.peer_client import PeerClient
from coordinator.transport.peer_directory import PeerDirectory
from coordinator.transport.piece_sources import PieceSources
from protocols.enrollment import identity
from protocols.errors import Unreachable
from protocols.p2p import peer_addresses
from protocols.p2p.gossip import GossipBatch, Neighbor
from protocols.p2p.swarm import DownloadPlanRequest, DownloadReport
from tests.support.https_site import HOST, Site
from tests.support.lone_peers import Peer

pytestmark = pytest.mark.attack("20.12")

OUTSIDE = "203.0.113.7"
#: Addresses inside of a machine or its cloud, also as IPv6 can write them.
FORBIDDEN = [
    "127.0.0.1:6379",
    "127.8.8.8:6379",
    "0.0.0.0:6379",
    "0.1.2.3:6379",
    "169.254.169.254:8080",
    "224.0.0.1:8080",
    "255.255.255.255:8080",
    "240.0.0.1:8080",
    "168.63.129.16:32526",
    "100.100.100.200:8080",
    "[::]:6379",
    "[::1]:6379",
    "[fe80::1]:6379",
    "[fe80::1%eth0]:6379",
    "[fd00:ec2::254]:8080",
    "[ff02::1]:6379",
    "[fec0::1]:6379",
    "[::ffff:127.0.0.1]:6379",
    "[::ffff:169.254.169.254]:8080",
    "[::127.0.0.1]:6379",
    "[64:ff9b::169.254.169.254]:8080",
    "[2002:7f00:1::]:6379",
    "[2001::1]:6379",
    "192.168.1.2:22",
    "192.168.1.2:0",
    "192.168.1.2:65536",
    "192.168.1.2:99999",
    "192.168.1.02:4000",
]


@pytest.mark.attack("20.12")
@pytest.mark.parametrize("address", FORBIDDEN)
@pytest.mark.parametrize("is_open", [False, True])
def test_the_coordinator_sends_nobody_into_a_machine(address: str, is_open: bool) -> None:
    """Attack: a peer reports the address of a service inside other machines as its own."""
    everywhere = ("0.0.0.0/0", "::/0")
    evil = DownloadPlanRequest(address=address, networks=everywhere, serves_other_networks=is_open)
    asked = DownloadPlanRequest(networks=everywhere)
    directory, sources = PeerDirectory(), PieceSources()
    directory.update("evil", evil, OUTSIDE)
    sources.plan_fetch("0" * 64, "evil", evil, OUTSIDE, 0.0)
    for outside in (OUTSIDE, "198.51.100.1", "127.0.0.1"):
        found = directory.nearby("victim", asked, outside)
        found += sources.plan_fetch("0" * 64, "victim", asked, outside, 1.0).sources
        assert address not in {where for _, where in found}
        assert all(where.startswith(OUTSIDE) for _, where in found)
    assert address not in {where for _, where in directory.all()}


@pytest.mark.attack("20.12")
@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("seen", ["198.51.100.9", "10.1.1.1"])
def test_the_coordinator_sends_nobody_to_another_machine(seen: str, is_open: bool) -> None:
    """Attack: a peer reports the address of somebody else, so that a fleet knocks there."""
    everywhere = ("0.0.0.0/0", "::/0")
    directory = PeerDirectory()
    for address in ("93.184.216.34:8443", "10.0.0.5:8443", "[2606:2800::1]:8443"):
        evil = DownloadPlanRequest(
            address=address, networks=everywhere, serves_other_networks=is_open
        )
        directory.update("evil", evil, seen)
        for outside in ("203.0.113.1", "93.184.216.34", "192.168.1.1"):
            found = directory.nearby("victim", DownloadPlanRequest(networks=everywhere), outside)
            assert {where.rpartition(":")[0] for _, where in found} <= {seen}


@pytest.mark.attack("20.12")
def test_private_addresses_of_another_home_are_told_to_nobody() -> None:
    """Attack: a peer claims the whole Internet as its network, and asks where others serve."""
    directory = PeerDirectory()
    home = DownloadPlanRequest(address="192.168.1.2:5000", networks=("192.168.1.0/24",))
    directory.update("ann", home, OUTSIDE)
    asked = DownloadPlanRequest(networks=("0.0.0.0/0",))
    assert directory.nearby("evil", asked, "198.51.100.1") == []


@pytest.mark.attack("20.12", by="coordinator")
@pytest.mark.parametrize("address", [one for one in FORBIDDEN if "%" not in one])
async def test_an_agent_connects_to_no_address_inside_a_machine(
    address: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a coordinator names such an address for a peer; the agent checks it again."""
    connected: list[object] = []
    monkeypatch.setattr("socket.create_connection", lambda where, *_, **__: connected.append(where))
    ann = site.enroll("ann")
    public = identity.node_public_pem(ann.node_key)
    peer = Neighbor(peer="evil", name="evil", address=address, node_public=public)
    outside = site.credentials(ann)._replace(address="hub.example:9092")
    client = PeerClient(peer, b"", outside)
    with pytest.raises(Unreachable, match="no request is sent to"):
        await asyncio.to_thread(client.exchange_gossip, GossipBatch())
    assert connected == []


@pytest.mark.attack("20.12")
async def test_gossip_names_no_other_host(site: Site, tmp_path: Path) -> None:
    """Attack: a peer's own, signed gossip entry says that it serves at another machine."""
    ann, rogue = Peer(site, tmp_path, "ann"), Peer(site, tmp_path, "rogue")
    try:
        for address in ("10.0.0.5:8443", "127.0.0.2:8443", "169.254.169.254:8080"):
            rogue.gossip.address = lambda address=address: address  # type: ignore[misc]
            ann.gossip.receive(rogue.gossip.outgoing(), rogue.machine.peer, HOST)
            await asyncio.sleep(0.001)  # the next entry is newer
        assert ann.gossip.entries(), "the entry itself is good"
        assert ann.gossip.contacts() == []
        ann.gossip.receive(rogue.gossip.outgoing(), "somebody else", "169.254.169.254")
        assert ann.gossip.contacts() == []
        rogue.gossip.address = lambda: f"{HOST}:8443"
        ann.gossip.receive(rogue.gossip.outgoing(), rogue.machine.peer, HOST)
        assert [one.address for one in ann.gossip.contacts()] == [f"{HOST}:8443"]
    finally:
        ann.link.close()
        rogue.link.close()


def test_ordinary_addresses_are_fine() -> None:
    """Control: private and public addresses of machines are allowed."""
    for address in (
        "192.168.1.2:4000",
        "10.0.0.1:65535",
        "100.64.1.2:1024",
        "93.184.216.34:4000",
        "[fd12::1]:4000",
        "[2606:2800::1]:4000",
    ):
        assert peer_addresses.refusal(address, allow_loopback=False) == ""
    assert peer_addresses.refusal("127.0.0.1:4000", allow_loopback=True) == ""


@pytest.mark.parametrize("rate", ["-1", "-1e300", "1e13", "1e300", "1e999", "NaN"])
def test_a_peer_reports_no_impossible_speed_of_another(rate: str) -> None:
    """Attack: report a negative or endless speed of another peer, to draw downloads to it or away
    from it."""
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(f'{{"rates": {{"peer": {rate}}}}}', type=DownloadReport)
    honest = msgspec.json.decode(b'{"rates": {"peer": 1.25e9}}', type=DownloadReport)
    assert honest.rates == {"peer": 1.25e9}
