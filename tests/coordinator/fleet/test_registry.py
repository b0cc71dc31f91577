"""Enrollment: tickets spent and refused; peers joined, approved and removed; all of it kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.fleet.members import Peer
from coordinator.fleet.registry import Registry
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.enrollment import identity, tickets
from protocols.enrollment.tickets import Ticket
from protocols.errors import BadMessage, ExitCode, Refused, UnknownName
from protocols.messages.envelope import PeerChanged
from tests.support.https_site import Machine


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(SqliteLedger(tmp_path / "ledger.db"))


def issue(registry: Registry, *, ttl_s: float = 60.0, uses: int = 1) -> Ticket:
    ticket = tickets.new_ticket(("host:1",), bytes(32))
    registry.create_ticket(ticket, ttl_s=ttl_s, uses=uses)
    return ticket


def join(registry: Registry, machine: Machine | None = None, **changed: Any) -> Peer:
    machine = machine or Machine()
    ticket = changed.pop("ticket", None) or issue(registry)
    return registry.join(machine.joining(ticket, **changed))


def test_a_machine_joins_with_a_ticket(registry: Registry) -> None:
    told: list[Peer] = []
    registry.on_change = told.append
    machine = Machine("laptop")
    peer = join(registry, machine, labels={"site": "north"})
    assert peer.peer == machine.peer
    assert (peer.name, peer.labels, peer.standing) == ("laptop", {"site": "north"}, "enrolled")
    assert told == registry.enrolled() == [peer]
    assert registry.find("laptop") == registry.find(machine.peer) == peer


def test_a_ticket_is_for_so_many_machines(registry: Registry) -> None:
    ticket = issue(registry, uses=2)
    join(registry, ticket=ticket)
    join(registry, ticket=ticket)
    with pytest.raises(Refused, match="used already") as caught:
        join(registry, ticket=ticket)
    assert caught.value.exit_code is ExitCode.REFUSED
    assert len(registry.peers) == 2


def test_a_ticket_ends(registry: Registry) -> None:
    with pytest.raises(Refused, match="expired"):
        join(registry, ticket=issue(registry, ttl_s=-1.0))


def test_a_ticket_is_revoked(registry: Registry) -> None:
    ticket = issue(registry)
    registry.revoke_ticket(ticket.id)
    with pytest.raises(Refused, match="revoked"):
        join(registry, ticket=ticket)
    with pytest.raises(UnknownName, match="no ticket"):
        registry.revoke_ticket("00000000")


def test_an_unknown_ticket_and_a_wrong_secret_are_told_alike(registry: Registry) -> None:
    """Else somebody could learn which tickets there are."""
    ticket, unknown = issue(registry), tickets.new_ticket(("host:1",), bytes(32))
    wrong = msgspec.structs.replace(ticket, secret=bytes(16))
    words = set()
    for candidate in (wrong, unknown):
        with pytest.raises(Refused) as caught:
            join(registry, ticket=candidate)
        words.add(caught.value.message)
    assert len(words) == 1
    join(registry, ticket=ticket)


def test_joining_twice_with_the_same_key_is_the_same_peer(registry: Registry) -> None:
    """The answer to the first try may have been lost."""
    machine, ticket = Machine(), issue(registry)
    first = join(registry, machine, ticket=ticket)
    assert join(registry, machine, ticket=ticket) == first
    assert join(registry, machine, ticket=issue(registry)) == first
    assert len(registry.peers) == 1
    assert registry.tickets[ticket.id].uses_left == 0


def test_a_removed_key_stays_out(registry: Registry) -> None:
    machine = Machine("laptop")
    join(registry, machine)
    registry.remove("laptop", "stolen")
    assert registry.enrolled() == []
    with pytest.raises(Refused, match="removed"):
        join(registry, machine)
    with pytest.raises(UnknownName):
        registry.find(machine.peer)
    assert not registry.verify(machine.peer, machine.sign_key.sign(b"x"), b"x")
    assert join(registry, Machine("laptop")).name == "laptop"


@pytest.mark.parametrize("removed", [False, True])
def test_a_node_key_belongs_to_one_machine(registry: Registry, removed: bool) -> None:
    """Flower takes it once: a second would stop every later start of the coordinator."""
    first, second = Machine("one"), Machine("two")
    second.node_key = first.node_key
    join(registry, first)
    if removed:
        registry.remove("one", "test")
    ticket = issue(registry)
    with pytest.raises(Refused, match="node key"):
        join(registry, second, ticket=ticket)
    assert registry.tickets[ticket.id].uses_left == 1


def test_a_wrong_node_key_is_no_key(registry: Registry) -> None:
    for pem in (b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(BadMessage):
            join(registry, node_public=pem)
    assert registry.peers == {}


def test_names_are_told_apart_and_stay_names(registry: Registry) -> None:
    for name in ("laptop", "n" * 64):
        peers = [join(registry, Machine(name)) for _ in range(3)]
        assert len({peer.name for peer in peers}) == 3
        for peer in peers:
            told = PeerChanged(peer=peer.peer, name=peer.name, public_key=peer.sign_public)
            assert msgspec.json.decode(msgspec.json.encode(told), type=PeerChanged) == told
    assert registry.find("laptop-2").name == "laptop-2"


def test_an_id_comes_before_a_name(registry: Registry) -> None:
    """Older ledgers have peers whose name is an id; no such name is taken any more."""
    victim = Machine("victim")
    with pytest.raises(Refused, match="stands for something else"):
        join(registry, Machine(victim.peer))
    older = join(registry, Machine("older"))
    registry.peers[older.peer] = msgspec.structs.replace(older, name=victim.peer)
    join(registry, victim)
    assert registry.find(victim.peer).name == "victim"


@pytest.mark.parametrize("by", ["name", "id"])
def test_a_waiting_peer_is_let_in(tmp_path: Path, by: str) -> None:
    registry = Registry(SqliteLedger(tmp_path / "ledger.db"), approve=True)
    machine = Machine("laptop")
    assert join(registry, machine).standing == "awaiting"
    assert registry.enrolled() == []
    assert registry.verify(machine.peer, machine.sign_key.sign(b"x"), b"x")
    approved = registry.approve("laptop" if by == "name" else machine.peer)
    assert approved.standing == "enrolled"
    assert registry.enrolled() == [approved]
    with pytest.raises(UnknownName):
        registry.approve("nobody")


def test_it_is_all_in_the_ledger_but_the_secret(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.db")
    registry = Registry(ledger, approve=True)
    ticket = issue(registry, uses=3)
    machines = [Machine(name) for name in "abc"]
    for machine in machines:
        join(registry, machine, ticket=ticket)
    registry.approve("a")
    registry.remove("b", "test")
    revoked = issue(registry)
    registry.revoke_ticket(revoked.id)
    ledger.close()
    again = Registry(SqliteLedger(tmp_path / "ledger.db"))
    assert again.peers == registry.peers
    assert again.tickets == registry.tickets
    assert [peer.standing for peer in again.peers.values()] == ["enrolled", "removed", "awaiting"]
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert ticket.secret not in content
        assert ticket.secret.hex().encode() not in content


def test_who_signed_is_known_by_its_key(registry: Registry) -> None:
    machine, other = Machine("a"), Machine("b")
    join(registry, machine)
    join(registry, other)
    signature = machine.sign_key.sign(b"message")
    assert registry.verify(machine.peer, signature, b"message")
    assert not registry.verify(other.peer, signature, b"message")
    assert not registry.verify(identity.peer_id(bytes(32)), signature, b"message")
