"""Joining a real coordinator: strangers get no data, and each refusal has its reason."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from pathlib import Path

import msgspec
import pytest

from agent.home.enrollment_file import ENROLLMENT_FILE, read_enrollment
from agent.setup import enrollment
from agent.transport.p2p.gossip import FILE
from agent.transport.p2p.sharing import CERTIFICATE
from protocols.enrollment import certificates, identity, tickets
from protocols.enrollment.joining import CA_PATH, JOIN_PATH
from protocols.enrollment.tickets import Ticket
from protocols.errors import HomeError, HomeLocked, Refused, TicketMalformed, Unreachable
from protocols.local import homes
from protocols.local.atomic_files import write_private
from tests.support.https_site import HOST, Machine, Site


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "agent").mkdir()
    return tmp_path / "agent"


def join(home: Path, ticket: Ticket, **options: bool) -> str:
    joined, _ = enrollment.join(home, tickets.encode(ticket), name="box", labels={}, **options)
    return joined.peer


def test_a_machine_joins(site: Site, home: Path) -> None:
    joined, awaiting = enrollment.join(
        home, tickets.encode(site.ticket()), name="box", labels={"site": "north"}
    )
    assert not awaiting
    assert joined == read_enrollment(home)
    assert joined.addresses == (site.address,)
    assert joined.fleet == site.fleet_id
    assert joined.mqtt.host == HOST
    assert joined.coordinator_public == identity.public_bytes(site.sign_key)
    certificate = certificates.verify_certificate(site.ca_pem, joined.certificate)
    key = identity.load_signing_key(home / "sign.key")
    assert certificate.sign_public == identity.public_bytes(key)
    assert joined.peer == identity.peer_id(certificate.sign_public)
    assert site.registry.peers[joined.peer].labels == {"site": "north"}
    assert site.requests == [("GET", CA_PATH), ("POST", JOIN_PATH)]
    if os.name == "posix":
        for name in ("sign.key", "node.key", ENROLLMENT_FILE):
            assert (home / name).stat().st_mode & 0o777 == 0o600


def test_a_server_with_another_ca_gets_nothing(site: Site, home: Path) -> None:
    """Another server answers at the address: it gets no secret, no key and no name."""
    ticket = msgspec.structs.replace(site.ticket(), ca_sha256=bytes(32))
    with pytest.raises(Refused, match="not the coordinator that made this ticket"):
        join(home, ticket)
    assert site.requests == [("GET", CA_PATH)]
    assert [path.name for path in home.iterdir()] == ["lock"], "no key was made"


def test_the_right_ca_without_its_key_gets_nothing(site: Site, home: Path, tmp_path: Path) -> None:
    """An impostor can show a copy of the CA certificate, but TLS then asks for a key."""
    (tmp_path / "impostor").mkdir()
    impostor = Site(tmp_path / "impostor")
    impostor.identity = impostor.identity._replace(ca_pem=site.ca_pem)
    ticket = msgspec.structs.replace(site.ticket(), addresses=(impostor.address,))
    with impostor.up(), pytest.raises(Unreachable, match="certificate"):
        join(home, ticket)
    assert impostor.requests == [("GET", CA_PATH)]
    assert not (home / ENROLLMENT_FILE).exists()


def test_a_malformed_ticket_sends_no_request(site: Site, home: Path) -> None:
    text = tickets.encode(site.ticket())
    for wrong in (text[:-1], text[1:], "", "hello"):
        with pytest.raises(TicketMalformed):
            enrollment.join(home, wrong, name="box", labels={})
    assert site.requests == []
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("use", "used already"),
        ("expire", "expired"),
        ("revoke", "revoked"),
        ("unknown", "does not know this ticket"),
        ("secret", "does not know this ticket"),
    ],
)
def test_an_unusable_ticket_is_refused_with_the_reason(
    site: Site, home: Path, spoil: str, words: str
) -> None:
    ticket = site.ticket(ttl_s=-1.0 if spoil == "expire" else 60.0)
    if spoil == "use":
        site.registry.join(Machine().joining(ticket))
    elif spoil == "revoke":
        site.registry.revoke_ticket(ticket.id)
    elif spoil == "unknown":
        ticket = msgspec.structs.replace(ticket, id="00000000")
    elif spoil == "secret":
        ticket = msgspec.structs.replace(ticket, secret=bytes(16))
    with pytest.raises(Refused, match=words) as caught:
        join(home, ticket)
    assert caught.value.hint
    assert not (home / ENROLLMENT_FILE).exists()


def test_a_second_try_with_the_same_key_is_the_same_machine(site: Site, home: Path) -> None:
    ticket = site.ticket()
    first = join(home, ticket)
    (home / ENROLLMENT_FILE).unlink()  # as if the answer had been lost
    assert join(home, ticket) == first
    assert len(site.registry.peers) == 1


def test_joining_twice_is_refused_and_replace_joins_as_a_new_machine(
    site: Site, home: Path
) -> None:
    first = join(home, site.ticket())
    with pytest.raises(HomeError, match="joined a fleet already") as caught:
        join(home, site.ticket())
    assert "--replace" in caught.value.hint
    second = join(home, site.ticket(), replace=True)
    assert second != first
    assert read_enrollment(home).peer == second


@pytest.mark.parametrize("how", ["replace", "leave"])
def test_peers_of_the_last_fleet_are_forgotten(site: Site, home: Path, how: str) -> None:
    join(home, site.ticket())
    for file in (
        FILE,
        CERTIFICATE,
    ):  # an access token, addresses of peers, and what the key has signed
        write_private(home / file, b"of the last fleet")
    if how == "replace":
        join(home, site.ticket(), replace=True)
    else:
        enrollment.leave(home, read_enrollment(home), offline=True)
    assert not (home / FILE).exists()
    assert not (home / CERTIFICATE).exists()


def test_a_machine_is_not_replaced_while_its_agent_runs(site: Site, home: Path) -> None:
    """A running agent would later overwrite the new enrollment with its old one."""
    first = join(home, site.ticket())
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    running = homes.lock_home(home, "agent")
    with pytest.raises(HomeLocked, match="is running") as caught:
        join(home, site.ticket(), replace=True)
    assert "commonweight-agent service stop" in caught.value.hint
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    assert list(site.registry.peers) == [first], "no request was sent"
    running.release()
    assert join(home, site.ticket(), replace=True) != first
    homes.lock_home(home, "agent").release()


def test_a_removed_machine_may_join_again_with_a_new_key(site: Site, home: Path) -> None:
    site.registry.remove(join(home, site.ticket()), "test")
    (home / ENROLLMENT_FILE).unlink()
    with pytest.raises(Refused, match="removed") as caught:
        join(home, site.ticket())
    assert "--replace" in caught.value.hint
    join(home, site.ticket(), replace=True)


def test_a_refused_replacement_keeps_the_old_enrollment(site: Site, home: Path) -> None:
    first = join(home, site.ticket())
    bad = msgspec.structs.replace(site.ticket(), secret=bytes(16))
    with pytest.raises(Refused):
        join(home, bad, replace=True)
    assert read_enrollment(home).peer == first
    key = identity.load_signing_key(home / "sign.key")
    assert identity.peer_id(identity.public_bytes(key)) == first


def test_the_first_address_that_answers_is_used(site: Site, home: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        closed = f"{HOST}:{taken.getsockname()[1]}"
    ticket = msgspec.structs.replace(site.ticket(), addresses=(closed, site.address))
    join(home, ticket)
    assert read_enrollment(home).addresses == (site.address, closed)


@pytest.mark.parametrize(
    "address", ["no such host:1", "[::1", "", "a:b:c", "host:99999", "1.2.3.4:x"]
)
def test_a_malformed_address_is_skipped(site: Site, home: Path, address: str) -> None:
    """The ticket is well formed, but its address is not."""
    ticket = msgspec.structs.replace(site.ticket(), addresses=(address, site.address))
    join(home, ticket)


def test_no_coordinator_answers(site: Site, home: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        closed = f"{HOST}:{taken.getsockname()[1]}"
    ticket = msgspec.structs.replace(site.ticket(), addresses=(closed,))
    with pytest.raises(Unreachable, match=closed):
        join(home, ticket)


def test_a_server_without_tls(site: Site, home: Path) -> None:
    with socket.create_server((HOST, 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            connection.sendall(b"220 mail.example ESMTP\r\n")
            connection.close()

        greeting = threading.Thread(target=greet)
        greeting.start()
        address = f"{HOST}:{server.getsockname()[1]}"
        ticket = msgspec.structs.replace(site.ticket(), addresses=(address,))
        with pytest.raises(Unreachable):
            join(home, ticket)
        greeting.join()


def test_a_machine_that_awaits_approval(tmp_path: Path, home: Path) -> None:
    (tmp_path / "careful").mkdir()
    with Site(tmp_path / "careful", approve=True).up() as careful:
        _, awaiting = enrollment.join(home, tickets.encode(careful.ticket()), name="box", labels={})
    assert awaiting


def test_an_endless_certificate_is_cut(site: Site, home: Path, tmp_path: Path) -> None:
    key = identity.new_node_key()
    write_private(tmp_path / "own.key", identity.private_pem(key))
    write_private(tmp_path / "own.pem", certificates.new_node_tls(key, "forger"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem", tmp_path / "own.key")
    sent = 0

    def answer(listener: socket.socket) -> None:
        nonlocal sent
        with contextlib.suppress(OSError):
            accepted, _ = listener.accept()
            with context.wrap_socket(accepted, server_side=True) as call:
                call.recv(65536)
                call.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while sent < 256 << 20:
                    call.sendall(bytes(65536))
                    sent += 65536

    with socket.create_server((HOST, 0)) as listener:
        forger = threading.Thread(target=answer, args=(listener,))
        forger.start()
        address = f"{HOST}:{listener.getsockname()[1]}"
        ticket = msgspec.structs.replace(site.ticket(), addresses=(address,))
        with pytest.raises(Refused, match="is not the coordinator"):
            join(home, ticket)
        forger.join(20)
    assert sent < 32 << 20
