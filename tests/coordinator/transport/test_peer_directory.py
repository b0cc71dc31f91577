"""Whom the coordinator names to a peer, for a time without it."""

from __future__ import annotations

from coordinator.transport.peer_directory import PeerDirectory
from protocols.p2p.gossip import MAX_NEIGHBORS
from protocols.p2p.swarm import DownloadPlanRequest

HOME = ("192.168.1.0/24",)


def at(
    host: str, *, is_open: bool = False, networks: tuple[str, ...] = HOME
) -> DownloadPlanRequest:
    return DownloadPlanRequest(
        address=f"{host}:5000", networks=networks, serves_other_networks=is_open
    )


def test_near_ones_and_open_ones_are_named() -> None:
    book = PeerDirectory()
    book.update("near", at("192.168.1.2"), "80.0.0.1")
    book.update("another home", at("192.168.1.3"), "80.0.0.2")
    book.update("open", at("10.9.9.9", is_open=True, networks=("10.9.9.0/24",)), "80.0.0.3")
    book.update("silent", DownloadPlanRequest(networks=HOME), "80.0.0.1")
    asked = at("192.168.1.9")
    assert book.nearby("me", asked, "80.0.0.1") == [
        ("open", "80.0.0.3:5000"),  # where it was seen
        ("near", "192.168.1.2:5000"),
    ]
    assert [peer for peer, _ in book.all()] == ["near", "another home", "open"]
    book.remove("open")
    book.update("near", DownloadPlanRequest(), "80.0.0.1")  # it has stopped to serve
    assert book.nearby("me", asked, "80.0.0.1") == []


def test_few_are_named_those_who_told_last() -> None:
    book = PeerDirectory()
    for number in range(2 * MAX_NEIGHBORS):
        book.update(f"p{number}", at(f"192.168.1.{number + 1}"), "80.0.0.1")
    named = [peer for peer, _ in book.nearby("p31", at("192.168.1.99"), "80.0.0.1")]
    assert named == [f"p{number}" for number in range(30, 30 - MAX_NEIGHBORS, -1)]
