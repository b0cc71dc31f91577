"""Discovery of coordinators over real multicast DNS on loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.setup import discovery, enrollment
from agent.setup.discovery import DiscoveredCoordinator
from coordinator.daemon import mdns as announcing
from coordinator.daemon.mdns import announce, ip_addresses
from protocols.enrollment import certificates, tickets
from protocols.enrollment.mdns import encode_txt_record, parse_txt_record
from protocols.errors import Refused, TicketMalformed, UnknownName, Unreachable
from tests.support.https_site import HOST, Site
from tests.support.waiting import wait_for


@contextmanager
def announced(
    name: str, port: int, ca_sha256: bytes, on: Sequence[str] = (HOST,)
) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    task = loop.create_task(announce(name, port, ca_sha256, [HOST], on))
    thread = threading.Thread(target=lambda: loop.run_until_complete(_quietly(task)))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(20)
        loop.close()


async def _quietly(task: asyncio.Task[None]) -> None:
    await asyncio.gather(task, return_exceptions=True)


def seen(*, at_least: int) -> list[DiscoveredCoordinator]:
    found: list[DiscoveredCoordinator] = []
    for _ in range(10):
        found = discovery.discover(1.0, [HOST])
        if len(found) >= at_least:
            break
    return found


def test_a_code_joins_the_coordinator_that_made_it_and_no_forger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own", "forger", "home", "other"):
        (tmp_path / name).mkdir()
    with Site(tmp_path / "own").up() as own, Site(tmp_path / "forger").up() as forger:
        ca = certificates.ca_fingerprint(own.ca_pem)
        own_port, forged_port = (int(site.address.rpartition(":")[2]) for site in (own, forger))
        code = tickets.encode_code(own.ticket())
        assert len(code) < 64
        # The forger announces the hash of the other's CA, but cannot present that CA.
        with announced("forger", forged_port, ca), announced("own", own_port, ca):
            network = seen(at_least=2)
        assert sorted(one.name for one in network) == ["forger", "own"]
        assert all(one.ca == ca[: tickets.CA_BYTES] for one in network)
        only_forged = [one for one in network if one.name == "forger"]
        monkeypatch.setattr(discovery, "discover", lambda: only_forged)
        with pytest.raises(Refused, match="is not the coordinator"):
            enrollment.join(tmp_path / "home", code, name="box", labels={})
        assert ("POST", "/cw/v1/join") not in forger.requests
        monkeypatch.setattr(discovery, "discover", lambda: network)  # the forger comes first
        joined, _ = enrollment.join(tmp_path / "home", code, name="box", labels={})
        assert joined.addresses == (own.address,)
        monkeypatch.setattr(discovery, "discover", list)
        with pytest.raises(UnknownName, match="found: none"):
            enrollment.join(tmp_path / "other", code, name="box", labels={})


def test_malformed_announcements_are_ignored() -> None:
    ca = bytes(range(32))
    good = {k.encode(): v.encode() for k, v in encode_txt_record("box", ca).items()}
    told = parse_txt_record(good)
    assert told is not None
    assert told.name == "box"
    assert told.ca == ca[:16]
    assert "\x1b" not in parse_txt_record(good | {b"name": b"\x1b[2J"}).name  # type: ignore[union-attr]
    for wrong in ({b"v": b"2"}, {b"ca": b"zz"}, {b"ca": b"00"}, {b"ca": None}, {b"name": b"\xff"}):
        assert parse_txt_record(good | wrong) is None
    assert parse_txt_record({}) is None


def test_a_mistyped_code_fails_before_any_request() -> None:
    code = tickets.encode_code(tickets.new_ticket(("a:1",), bytes(32)))
    for wrong in (code[:-3], code[:-1] + ("A" if code[-1] != "A" else "B"), "cw1s.", "cw1s.AAAA"):
        with pytest.raises(TicketMalformed):
            tickets.decode(wrong)
    assert tickets.decode(code).addresses == ()


def test_only_addresses_are_announced() -> None:
    assert ip_addresses(["box", "192.168.1.5", "fe80::1"]) == ["192.168.1.5", "fe80::1"]


#: Of the block for documentation: no machine has it.
NOBODYS = "203.0.113.7"


def test_the_announcement_is_retried_until_there_is_a_network(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(announcing, "RETRY_S", 0.1)
    interfaces = [NOBODYS]
    with announced("own", 1, bytes(32), interfaces):
        wait_for(lambda: "cannot announce" in caplog.text)
        interfaces[:] = [HOST]
        # Other coordinators may announce themselves in this network.
        wait_for(lambda: "own" in [one.name for one in seen(at_least=1)])


def test_discovery_without_a_network_is_an_error() -> None:
    with pytest.raises(Unreachable, match="cannot search") as told:
        discovery.discover(0.1, [NOBODYS])
    assert "whole ticket" in told.value.hint
