"""A fleet replaces its CA: machines follow what their own CA signed, and nothing else."""

from __future__ import annotations

import json
import shutil
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.daemon.context import AgentContext
from agent.daemon.current_enrollment import CurrentEnrollment
from agent.daemon.state_runner import StateRunner
from agent.home import enrollment_file, fleet_trust
from agent.home.credentials import Credentials
from agent.home.enrollment_file import Enrollment
from agent.home.settings_schema import AgentSettings
from agent.setup import enrollment as setup
from agent.setup.doctor import examine_agent
from agent.transport.bandwidth import Bandwidth
from agent.transport.http_client import HttpClient
from coordinator.admin import backup, keys
from coordinator.remote import access
from coordinator.remote.api_client import Remote
from coordinator.storage import ca_files, settings
from coordinator.storage.fleet_cards import CardFile
from coordinator.storage.settings import Keys
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.enrollment import ca_chain, certificates, fleet_card, identity, tickets
from protocols.enrollment.ca_chain import CaTrust, ChainResponse, Transition
from protocols.enrollment.certificates import NodeCertificate
from protocols.enrollment.identity import SigningKey
from protocols.enrollment.joining import CA_CHAIN_PATH
from protocols.errors import BadMessage, HomeError, Refused, Unreachable, UsageError
from protocols.local import homes
from protocols.messages.envelope import Presence
from protocols.messages.mqtt import MqttAddress
from protocols.messages.states import PeerState
from protocols.network.addresses import CoordinatorAddress
from protocols.p2p import gossip
from protocols.p2p.gossip import GossipStore
from tests.support.fleet_harness import fleet, free_port
from tests.support.https_site import HOST, Site
from tests.support.waiting import wait_for

pytestmark = pytest.mark.attack("20.keys", by="thief")

PASSPHRASE = "correct horse battery"
BROKER = MqttAddress(host="", port=1883)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    return settings.init(["localhost"])[0]


def announce(home: Path, old_ca_until: float = 0.0) -> bytes:
    """The card that `up` makes."""
    found = settings.open_keys(home)
    public = identity.public_bytes(found.sign_key)
    cards = CardFile(home, found.ca_pem, found.chain)
    return cards.current(found.ca_key, public, BROKER, found.issuer, old_ca_until)


def shown(home: Path) -> ChainResponse:
    """What the coordinator of this home shows to a machine that does not know its CA."""
    return ChainResponse(transitions=settings.open_keys(home).chain, card=announce(home))


def enrolled(home: Path) -> Enrollment:
    """A machine that has joined and trusts the present CA."""
    found, card = settings.open_keys(home), announce(home)
    return Enrollment(
        peer="ada",
        name="ada",
        fleet=found.fleet,
        addresses=("127.0.0.1:1",),
        ca_pem=found.ca_pem.decode(),
        certificate=b"",
        coordinator_public=identity.public_bytes(found.sign_key),
        mqtt=msgspec.structs.replace(BROKER, host=HOST, ca_pem=found.ca_pem.decode()),
        card=card,
        transitions=found.chain,
    )


def transition(old: Keys, new_ca: bytes, **changed: Any) -> Transition:
    fields: dict[str, Any] = {
        "fleet": old.fleet,
        "counter": len(old.chain) + 1,
        "old_ca": old.ca_pem,
        "new_ca": new_ca,
        "at": time.time(),
        "old_until": time.time() + 60,
    }
    return Transition(**(fields | changed))


def test_the_fleet_keeps_its_id_and_a_machine_follows_two_rotations(home: Path) -> None:
    """Control: the fleet keeps its id, and a machine follows two rotations at once."""
    before, machine = settings.open_keys(home), enrolled(home)
    keys.rotate_ca(home)
    once = fleet_trust.with_new_ca(machine, shown(home))
    keys.rotate_ca(home)
    keys.rotate(home, "signing")
    after, told = settings.open_keys(home), shown(home)
    assert after.fleet == before.fleet
    assert len({before.ca_pem, once.ca_pem.encode(), after.ca_pem}) == 3
    for known in (machine, once):
        moved = fleet_trust.with_new_ca(known, told)
        assert (moved.ca_pem.encode(), moved.fleet) == (after.ca_pem, before.fleet)
        assert moved.coordinator_public == identity.public_bytes(after.sign_key)
        assert moved.mqtt.ca_pem == moved.ca_pem
        enrollment_file.write_enrollment(home, moved)
        assert enrollment_file.read_enrollment(home) == moved
        assert fleet_trust.with_new_ca(moved, told) == moved


def forged_by_another_ca(old: Keys) -> ChainResponse:
    thief, pem = certificates.new_ca("commonweight")
    return answer(thief, pem, old, transition(old, pem), thief)


def forged_by_the_issuer_or_signing_key(old: Keys) -> ChainResponse:
    thief, pem = certificates.new_ca("commonweight")
    return answer(thief, pem, old, transition(old, pem), old.sign_key)


def from_another_first_ca(old: Keys) -> ChainResponse:
    """A whole chain of the thief's own, which claims the fleet's id."""
    first, first_pem = certificates.new_ca("commonweight")
    thief, pem = certificates.new_ca("commonweight")
    return answer(thief, pem, old, transition(old, pem, old_ca=first_pem), first)


def the_chain_of_another_fleet(old: Keys) -> ChainResponse:
    """A chain that is right for the thief's own fleet, and a card that names this one."""
    first, first_pem = certificates.new_ca("commonweight")
    thief, pem = certificates.new_ca("commonweight")
    step = transition(old, pem, old_ca=first_pem, fleet=certificates.fleet_id(first_pem))
    return answer(thief, pem, old, step, first)


def with_another_counter(old: Keys) -> ChainResponse:
    thief, pem = certificates.new_ca("commonweight")
    return answer(thief, pem, old, transition(old, pem, counter=2), old.ca_key)


def for_another_fleet(old: Keys) -> ChainResponse:
    thief, pem = certificates.new_ca("commonweight")
    return answer(thief, pem, old, transition(old, pem, fleet="0" * 16), old.ca_key)


def two_certificates(old: Keys) -> ChainResponse:
    """The CA signs its successor; the server adds a CA of its own behind it."""
    new, pem = certificates.new_ca("commonweight")
    return answer(new, pem, old, transition(old, pem + certificates.new_ca("x")[1]), old.ca_key)


def of_another_format(old: Keys) -> ChainResponse:
    new, pem = certificates.new_ca("commonweight")
    return answer(new, pem, old, transition(old, pem, v=2), old.ca_key)


def card_of_the_old_ca(old: Keys) -> ChainResponse:
    _, pem = certificates.new_ca("commonweight")
    return answer(old.ca_key, pem, old, transition(old, pem), old.ca_key)


def card_with_a_lower_number(old: Keys) -> ChainResponse:
    new, pem = certificates.new_ca("commonweight")
    return answer(new, pem, old, transition(old, pem), old.ca_key, counter=1)


def answer(
    new: SigningKey,
    pem: bytes,
    old: Keys,
    step: Transition,
    signer: SigningKey,
    counter: int = 2**50,
) -> ChainResponse:
    card = fleet_card.FleetCard(
        fleet=old.fleet,
        counter=counter,
        coordinator_public=bytes(32),
        broker=fleet_card.BrokerCard(port=1),
    )
    signed = ca_chain.sign_transition(signer, step)
    return ChainResponse(transitions=(signed,), card=fleet_card.issue_card(new, card))


@pytest.mark.parametrize(
    "forge",
    [
        forged_by_another_ca,
        forged_by_the_issuer_or_signing_key,
        from_another_first_ca,
        the_chain_of_another_fleet,
        with_another_counter,
        for_another_fleet,
        two_certificates,
        of_another_format,
        card_of_the_old_ca,
        card_with_a_lower_number,
    ],
    ids=lambda forge: forge.__name__,
)
def test_nobody_but_the_ca_names_its_successor(
    home: Path, forge: Callable[[Keys], ChainResponse]
) -> None:
    """Attack: a server shows a new CA with a transition that the fleet's CA did not sign so."""
    machine = enrolled(home)
    with pytest.raises(BadMessage):
        fleet_trust.with_new_ca(machine, forge(settings.open_keys(home)))


def test_the_key_that_was_replaced_leads_no_machine_away(home: Path) -> None:
    """Attack: whoever stole the old CA's key names another successor after the rotation."""
    old = settings.open_keys(home)
    keys.rotate_ca(home)
    machine, true = enrolled(home), settings.open_keys(home)
    thief, pem = certificates.new_ca("commonweight")
    instead = answer(thief, pem, old, transition(old, pem), old.ca_key)
    beyond = ca_chain.sign_transition(old.ca_key, transition(true, pem, counter=2))
    # Also not if the new CA signs it.
    back = answer(old.ca_key, old.ca_pem, true, transition(true, old.ca_pem), true.ca_key)
    for chain, card in (
        ((), instead.card),  # no transition at all
        (instead.transitions, instead.card),
        ((*instead.transitions, beyond), instead.card),
        ((*true.chain, beyond), instead.card),
        ((*true.chain, *true.chain), instead.card),
        ((*true.chain, *back.transitions), back.card),
    ):
        with pytest.raises(BadMessage):
            fleet_trust.with_new_ca(machine, ChainResponse(transitions=chain, card=card))
    assert fleet_trust.with_new_ca(machine, shown(home)) == machine


def test_an_enrollment_on_disk_needs_its_transitions(home: Path, tmp_path: Path) -> None:
    """Attack: a program of the owner's machine puts a CA of its own into the enrollment."""
    keys.rotate_ca(home)
    machine = enrolled(home)
    _, pem = certificates.new_ca("commonweight")
    for changed in (
        {"transitions": ()},
        {"ca_pem": pem.decode(), "card": b""},
        {"ca_pem": pem.decode(), "card": b"", "fleet": certificates.fleet_id(pem)},
    ):
        enrollment_file.write_enrollment(tmp_path, msgspec.structs.replace(machine, **changed))
        with pytest.raises(HomeError, match="trusts more"):
            enrollment_file.read_enrollment(tmp_path)


def entry(found: Keys, now: float) -> bytes:
    """A gossip entry of a peer with a certificate by the CA of these keys."""
    key = identity.new_signing_key()
    public = identity.public_bytes(key)
    certificate = NodeCertificate(
        fleet=found.fleet,
        peer=identity.peer_id(public),
        name="box",
        sign_public=public,
        node_public=identity.node_public_pem(identity.new_node_key()),
        not_after=now + 86400 * 365,
    )
    told = gossip.GossipEntry(
        peer=certificate.peer, at=now, presence=Presence(state=PeerState.IDLE)
    )
    signed = certificates.issue_certificate(found.ca_key, certificate)
    return gossip.sign_entry(told, signed, key.sign)


def test_certificates_of_the_old_ca_count_for_a_time(home: Path) -> None:
    """Attack: whoever stole the old CA's key makes peers with it after the period."""
    old, now = settings.open_keys(home), time.time()
    keys.rotate_ca(home, old_days=1)
    new = settings.open_keys(home)
    until = now + 3 * 86400  # on the card; the transition says one day
    trust = CaTrust.of(new.ca_pem, new.chain, until)
    for at, of_old in ((now, 1), (now + 2 * 86400, 0)):
        assert len(GossipStore(trust, new.fleet).add([entry(old, at)], at)) == of_old
        assert len(GossipStore(trust, new.fleet).add([entry(new, at)], at)) == 1
    all_have_moved = CaTrust.of(new.ca_pem, new.chain, 0.0)
    assert len(GossipStore(all_have_moved, new.fleet).add([entry(old, now)], now)) == 0
    machine = msgspec.structs.replace(enrolled(home), card=announce(home, until))
    assert fleet_trust.trusted_cas(machine).until < until


def test_no_peer_speaks_for_another_with_a_certificate_of_the_ca(home: Path) -> None:
    """Attack: a certificate by the old CA names another peer's id with a key of the thief."""
    found, now, key = settings.open_keys(home), time.time(), identity.new_signing_key()
    victim = identity.peer_id(identity.public_bytes(identity.new_signing_key()))
    certificate = NodeCertificate(
        fleet=found.fleet,
        peer=victim,
        name="box",
        sign_public=identity.public_bytes(key),
        node_public=identity.node_public_pem(identity.new_node_key()),
        not_after=now + 60,
    )
    told = gossip.GossipEntry(peer=victim, at=now, presence=Presence(state=PeerState.IDLE))
    signed = certificates.issue_certificate(found.ca_key, certificate)
    data = gossip.sign_entry(told, signed, key.sign)
    assert len(GossipStore(CaTrust(found.ca_pem), found.fleet).add([data], now)) == 0


@pytest.mark.parametrize("is_offline", [False, True])
def test_a_crash_between_the_files_loses_no_ca(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool
) -> None:
    """Attack: the power fails in the middle of a rotation, at any file."""
    SqliteLedger(home / "ledger.db").close()
    keep = keys.write_encrypted(tmp_path / "new.key", PASSPHRASE) if is_offline else None
    before, written = settings.open_keys(home), ca_files.write_private
    for number in range(1, 6):
        place = tmp_path / f"home-{number}"
        shutil.copytree(home, place)
        (tmp_path / "new.key").unlink(missing_ok=True)
        count = 0

        def write(path: Path, data: bytes, fails_at: int = number) -> None:
            nonlocal count
            count += 1
            if count == fails_at:
                raise KeyboardInterrupt  # nothing handles it, as after kill -9
            written(path, data)

        monkeypatch.setattr(ca_files, "write_private", write)
        is_done = number == 5  # more than there are files
        if is_done:
            keys.rotate_ca(place, keep_offline=keep)
        else:
            with pytest.raises(KeyboardInterrupt):
                keys.rotate_ca(place, keep_offline=keep)
        monkeypatch.setattr(ca_files, "write_private", written)
        middle = settings.open_keys(place)
        assert keys.read_status(place).fleet == before.fleet
        if number == 1:
            assert middle.ca_pem == before.ca_pem, "as if it had not begun"
            continue
        assert (len(middle.chain), middle.fleet) == (1, before.fleet)
        saved = tmp_path / f"saved-{number}"
        backup.write(place, saved, with_versions=False)
        again = tmp_path / f"again-{number}"
        backup.restore(saved, again)
        for folder in (place, again):
            ca_files.finish_rotation(folder)
            found = settings.open_keys(folder)
            assert (found.ca_pem, found.chain, found.issuer) == (
                middle.ca_pem,
                middle.chain,
                middle.issuer,
            )
            assert (folder / "ca.pem").read_bytes() == middle.ca_pem
            assert (folder / "ca.key").exists() != is_offline
            assert not (folder / ca_files.PENDING_FILE).exists()
        found = settings.open_keys(place)
        assert settings.certify(place, found.ca_key, found.ca_pem, ["localhost"], found.issuer)
        context = ssl.create_default_context(cadata=found.ca_pem.decode())
        assert len(context.get_ca_certs()) == 1


def test_an_offline_ca_is_replaced_and_a_ca_is_taken_offline(home: Path, tmp_path: Path) -> None:
    """Control: an offline CA is replaced, and a CA is taken offline by a rotation."""
    first, second, fleet_id = (
        tmp_path / "first.key",
        tmp_path / "second.key",
        settings.open_keys(home).fleet,
    )
    with pytest.raises(UsageError, match="in this home"):
        keys.rotate_ca(home, old=(first, PASSPHRASE))
    keys.rotate_ca(home, keep_offline=keys.write_encrypted(first, PASSPHRASE))
    machine = enrolled(home)
    assert not (home / "ca.key").exists()
    for old, keep, reason in (
        (None, keys.write_encrypted(second, PASSPHRASE), "has to sign"),
        ((first, PASSPHRASE), None, "needs a file"),
        ((first, "wrong horse battery"), keys.write_encrypted(second, PASSPHRASE), "cannot open"),
    ):
        with pytest.raises(UsageError, match=reason):
            keys.rotate_ca(home, old=old, keep_offline=keep)
        assert not second.exists()
    keep = keys.write_encrypted(second, PASSPHRASE)
    keys.rotate_ca(home, old=(first, PASSPHRASE), keep_offline=keep)
    after = settings.open_keys(home)
    assert (after.fleet, len(after.chain)) == (fleet_id, 2)
    assert fleet_trust.with_new_ca(machine, shown(home)).ca_pem.encode() == after.ca_pem
    with pytest.raises(UsageError, match="not the key"):
        keys.rotate_issuer(home, first, PASSPHRASE)
    keys.rotate_issuer(home, second, PASSPHRASE)


def test_a_stolen_issuer_key_names_no_new_ca(home: Path, tmp_path: Path) -> None:
    """Attack: whoever reads the home of a fleet with an offline CA names a new CA."""
    keys.rotate_ca(home, keep_offline=keys.write_encrypted(tmp_path / "ca.key", PASSPHRASE))
    machine, stolen = enrolled(home), settings.open_keys(home)
    thief, pem = certificates.new_ca("commonweight")
    for old_ca in (stolen.ca_pem, stolen.issuer):
        step = transition(stolen, pem, old_ca=old_ca)
        told = answer(thief, pem, stolen, step, stolen.ca_key)
        chain = (*stolen.chain, *told.transitions)
        with pytest.raises(BadMessage):
            fleet_trust.with_new_ca(machine, ChainResponse(transitions=chain, card=told.card))


def test_an_older_machine_joins_a_fleet_with_a_new_ca_only_after_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: an older machine is told to update before it joins a fleet with a new CA."""
    monkeypatch.setenv("COMMONWEIGHT_OPERATOR_HOME", str(tmp_path / "watch"))
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "none"))
    (tmp_path / "agent").mkdir()
    (tmp_path / "site").mkdir()
    site = Site(tmp_path / "site")
    site.replace_ca()
    with site.up():
        ticket = site.ticket(uses=9)
        setup.join(tmp_path / "agent", tickets.encode(ticket), name="new", labels={})
        joined = enrollment_file.read_enrollment(tmp_path / "agent")
        assert joined.fleet == site.fleet_id != certificates.fleet_id(site.ca_pem)
        monkeypatch.setattr(setup, "JoinRequest", lambda **given: _without_ca(given))
        with pytest.raises(Refused, match="replaced its CA") as refused:
            setup.join(
                tmp_path / "agent", tickets.encode(ticket), name="old", labels={}, replace=True
            )
        assert "pip install --upgrade" in refused.value.hint
        assert len(site.registry.peers) == 1


def _without_ca(given: dict[str, Any]) -> Any:
    from protocols.enrollment.joining import JoinRequest

    return JoinRequest(**{name: given[name] for name in given if name != "follows_ca"})


def test_a_monitor_follows_its_ca_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: another server takes over the address, or the transition is of another CA."""
    watch = tmp_path / "watch"
    monkeypatch.setenv("COMMONWEIGHT_OPERATOR_HOME", str(watch))
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "none"))
    for name in ("site", "other", "again"):
        (tmp_path / name).mkdir()
    site, other = Site(tmp_path / "site"), Site(tmp_path / "other")
    ticket = tickets.new_ticket(site.addresses(), certificates.ca_fingerprint(site.ca_pem))
    site.registry.create_ticket(ticket, ttl_s=60, uses=1, role="operator")
    with site.up():
        access.join(tickets.encode(ticket), "laptop")
        assert Remote(watch).peers() == []
    before = (watch / access.ACCESS_FILE).read_bytes()

    def now_at(address: str) -> None:
        known = msgspec.json.decode((watch / access.ACCESS_FILE).read_bytes(), type=access.Access)
        known = msgspec.structs.replace(known, addresses=(address,))
        (watch / access.ACCESS_FILE).write_bytes(msgspec.json.encode(known))

    now_at(other.address)
    with other.up(), pytest.raises(Unreachable, match="certificate"):
        Remote(watch).peers()
    assert ("GET", "/cw/v1/peers") not in other.requests
    other = Site(tmp_path / "again")
    other.replace_ca()
    now_at(other.address)
    with other.up(), pytest.raises(Refused, match="another CA"):
        Remote(watch).peers()
    assert ("GET", "/cw/v1/peers") not in other.requests
    (watch / access.ACCESS_FILE).write_bytes(before)
    site = Site.again(site)
    site.replace_ca()
    now_at(site.address)
    with site.up():
        remote = Remote(watch)
        assert remote.peers() == []
        assert remote.watch().fleet == site.fleet_id
        assert site.registry.behind == set()
    known = msgspec.json.decode((watch / access.ACCESS_FILE).read_bytes(), type=access.Access)
    assert known.ca_pem.encode() == site.ca_pem
    assert HOST in known.addresses[0]


@pytest.mark.parametrize("at_first", [True, False], ids=["first", "last"])
def test_a_strangers_server_at_one_address_keeps_no_agent_from_the_new_ca(
    tmp_path: Path, at_first: bool
) -> None:
    """Attack: take over one of the addresses of the coordinator, while the fleet has a new CA. The
    server there shows a CA of its own."""
    for name in ("site", "other", "agent"):
        (tmp_path / name).mkdir()
    site, other = Site(tmp_path / "site"), Site(tmp_path / "other")
    other.replace_ca()
    ticket = tickets.new_ticket(site.addresses(), certificates.ca_fingerprint(site.ca_pem))
    site.registry.create_ticket(ticket, ttl_s=60, uses=1)
    with site.up():
        setup.join(tmp_path / "agent", tickets.encode(ticket), name="ada", labels={})
    joined = enrollment_file.read_enrollment(tmp_path / "agent")
    site = Site.again(site)
    site.replace_ca()
    nobody = f"{HOST}:{free_port()}"
    places = (nobody, other.address, site.address) if at_first else (site.address, other.address)
    known = msgspec.structs.replace(joined, addresses=places)
    ctx = AgentContext(
        home=tmp_path / "agent",
        enrollment=known,
        credentials=Credentials.load(tmp_path / "agent", known),
        settings=AgentSettings(),
        runner=StateRunner(lambda _: None),
        bandwidth=Bandwidth(tmp_path / "agent"),
    )
    lost = Unreachable("its certificate is not valid")
    with other.up():
        with pytest.raises(Refused, match="another CA"):
            CurrentEnrollment(ctx, lambda _: None).follow_ca(lost)
        assert {path for _, path in other.requests} == {CA_CHAIN_PATH}
        with site.up(), pytest.raises(Unreachable, match="the fleet has a new CA"):
            CurrentEnrollment(ctx, lambda _: None).follow_ca(lost)
    now = enrollment_file.read_enrollment(tmp_path / "agent")
    assert (now.ca_pem.encode(), now.addresses) == (site.ca_pem, places)


def test_a_strangers_server_at_one_address_stops_no_operator_no_doctor_and_no_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: the same, at the first address that an operator's machine and an agent's know: they
    ask the others, too."""
    watch, home = tmp_path / "watch", tmp_path / "agent"
    monkeypatch.setenv("COMMONWEIGHT_OPERATOR_HOME", str(watch))
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(home))
    for name in ("site", "other"):
        (tmp_path / name).mkdir()
    site, other = Site(tmp_path / "site"), Site(tmp_path / "other")
    other.replace_ca()
    known = certificates.ca_fingerprint(site.ca_pem)
    tickets_of = [tickets.new_ticket(site.addresses(), known) for _ in range(2)]
    site.registry.create_ticket(tickets_of[0], ttl_s=60, uses=1, role="operator")
    site.registry.create_ticket(tickets_of[1], ttl_s=60, uses=1)
    with site.up():
        access.join(tickets.encode(tickets_of[0]), "laptop")
        homes.open_home("agent", create=True)
        setup.join(home, tickets.encode(tickets_of[1]), name="ada", labels={})
    site = Site.again(site)
    site.replace_ca()
    places = (other.address, site.address)
    joined = msgspec.structs.replace(enrollment_file.read_enrollment(home), addresses=places)
    enrollment_file.write_enrollment(home, joined)
    file = watch / access.ACCESS_FILE
    seen = msgspec.json.decode(file.read_bytes(), type=access.Access)
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(seen, addresses=places)))
    with other.up(), site.up():
        tls = next(check for check in examine_agent(home) if check.name == "tls")
        assert "the fleet has a new CA" in tls.fix
        assert [peer["name"] for peer in Remote(watch).peers()] == ["ada"]
        setup.leave(home, joined)
        assert [peer["standing"] for peer in Remote(watch).peers()] == ["removed"]
    assert {path for _, path in other.requests} == {CA_CHAIN_PATH}
    assert not (home / enrollment_file.ENROLLMENT_FILE).exists()


@pytest.mark.parametrize("wrong", ["a..b:9092", f"{'a' * 64}.org:9092", "a\x07b:9092", "xn--ä:1"])
def test_an_address_that_is_none_keeps_no_agent_from_the_others(tmp_path: Path, wrong: str) -> None:
    """Attack: name an address on the fleet card that is no name of a host, before a right one."""
    assert msgspec.convert(wrong, CoordinatorAddress) == wrong, "a card may have it"
    site, nobody = Site(tmp_path), f"{HOST}:{free_port()}"
    tls = ssl.create_default_context(cadata=site.ca_pem.decode())
    with site.up():
        wire = HttpClient([nobody, wrong, site.address], tls, timeout_s=9.0, max_idle_s=9.0)
        assert wire.request("GET", CA_CHAIN_PATH, {}).status == 200
        assert wire.places[0] == site.address
        wire.close()
    for places in ([nobody, wrong], [wrong]):
        wire = HttpClient(places, tls, timeout_s=9.0, max_idle_s=9.0)
        with pytest.raises(Unreachable):
            wire.request("GET", "/", {})


@pytest.mark.long
def test_a_fleet_goes_on_with_a_new_ca(tmp_path: Path) -> None:
    """Attack: the CA's key was stolen; the operator replaces it twice, and no machine joins again.

    One agent runs on, one is off meanwhile, and a ticket of before is not valid any more.
    """
    port = free_port()
    with fleet(tmp_path) as site:
        up = site.up(port=port)
        site.join("ada", "bea")
        site.start("ada")
        files = {name: tmp_path / name / "enrolled.json" for name in ("ada", "bea")}
        joined = {name: json.loads(file.read_text()) for name, file in files.items()}
        stale = site.ticket()
        refused = site.ask("keys", "rotate", "ca")
        assert (refused.returncode, "is running" in refused.stderr) == (1, True)
        up.stop()
        site.data("keys", "rotate", "ca")
        digest = site.data("keys", "rotate", "ca", "--old-days", "2")["sha256"]
        site.up(port=port)

        def has_moved(name: str) -> bool:
            return len(json.loads(files[name].read_text()).get("transitions", ())) == 2

        wait_for(lambda: has_moved("ada"), "ada has the new CA")
        site.until_agent("ada", "is back", lambda told: told["session"] and told["mqtt"])
        status = site.data("keys", "status")
        assert (status["ca"], status["ca_rotations"], status["behind"]) == (digest, 2, ["bea"])
        assert status["old_ca_until"] > time.time()
        doctor = site.ask_agent("bea", "doctor")
        assert "has a new CA, signed by the one known here" in doctor.stdout + doctor.stderr
        site.start("bea")
        wait_for(lambda: has_moved("bea"), "bea has the new CA")
        run = site.ended_run(site.start_run("ping", "--rounds", "1", "--quorum", "2"))
        assert run["state"] == "finished"
        status = site.data("keys", "status")
        assert (status["behind"], status["old_ca_until"]) == ([], 0.0)
        for name, file in files.items():
            now = json.loads(file.read_text())
            assert (now["peer"], now["fleet"]) == (joined[name]["peer"], joined[name]["fleet"])
            assert now["certificate"] != joined[name]["certificate"]
            assert site.programs[name].process.poll() is None, "the same process"
        checks = site.ask_agent("ada", "doctor")
        assert checks.returncode == 0, checks.stdout
        cid = site.ask_agent("cid", "join", stale, "--name", "cid")
        assert cid.returncode != 0
        assert "new CA since the ticket was made" in cid.stderr
        site.join("dan")
        site.start("dan")
        texts = [line["text"] for line in site.data("audit")]
        assert f"the ca key was replaced by {digest}" in texts
        assert any("bea" in text and "uses the new CA" in text for text in texts)
