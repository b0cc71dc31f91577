"""Nobody but the coordinator of a ticket gets a machine, or a monitor, to trust it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.home.enrollment_file import ENROLLMENT_FILE, read_enrollment
from agent.setup import discovery, enrollment
from agent.setup.discovery import DiscoveredCoordinator
from coordinator.remote import access
from protocols.enrollment import certificates, identity, tickets
from protocols.enrollment.joining import CA_PATH
from protocols.enrollment.tickets import Ticket
from protocols.errors import HomeError, Refused, Unreachable
from protocols.local import join_client
from protocols.messages.mqtt import MqttAddress
from tests.support.https_site import HOST, Site

#: How a server can show a CA of its own (`own`) beside the right one (`ca`).
SHOWN: dict[str, Callable[[bytes, bytes], bytes]] = {
    "behind": lambda ca, own: ca + own,
    "behind without a new line": lambda ca, own: ca.rstrip() + own,
    "behind an empty line": lambda ca, own: ca + b"\n" + own,
    "behind a comment": lambda ca, own: ca + b"# and\n" + own,
    "behind, with other line ends": lambda ca, own: ca + own.replace(b"\n", b"\r\n"),
    "behind, as a trusted certificate": lambda ca, own: (
        ca + own.replace(b" CERTIFICATE", b" X509 CERTIFICATE")
    ),
    "twice, then": lambda ca, own: ca + ca + own,
    "before": lambda ca, own: own + ca,
    "after a private block": lambda ca, own: (
        b"-----BEGIN X-----\nAA==\n-----END X-----\n" + ca + own
    ),
}


class Impostor(Site):
    """A server in the middle: it passes a join on to `true`, and changes the answer.

    It has true node certificates (the key of `true` stands for passing on), and a signing key and
    a CA of its own.
    """

    def __init__(self, folder: Path, true: Site, shown: Callable[[bytes, bytes], bytes]) -> None:
        folder.mkdir()
        super().__init__(folder)
        self.true, self.own_ca = true, self.ca_pem
        self.own_ca_key, self.ca_key = self.ca_key, true.ca_key
        public = identity.public_bytes(self.sign_key)
        self.identity = self.identity._replace(
            fleet=true.fleet_id, ca_pem=shown(true.ca_pem, self.own_ca), public=public
        )
        self.card = b""
        self.broker = super().mqtt_for(HOST, "")

    def fleet_card(self) -> bytes:
        return self.card

    def mqtt_for(self, host: str, user: str) -> MqttAddress:
        return self.broker

    def steal_tls(self) -> None:
        """Take the TLS key and certificate of the true coordinator."""
        for name in ("server.key", "server.pem"):
            shutil.copy(self.true.folder / name, self.folder / name)

    def lure(self, ticket: Ticket) -> Ticket:
        """The ticket of the true coordinator, which leads to us (by DNS, ARP or a proxy)."""
        self.registry.create_ticket(ticket, ttl_s=60, uses=9)
        return msgspec.structs.replace(ticket, addresses=(self.address,))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("COMMONWEIGHT_OPERATOR_HOME", str(tmp_path / "watch"))
    (tmp_path / "agent").mkdir()
    return tmp_path / "agent"


def join(home: Path, text: str) -> None:
    enrollment.join(home, text, name="box", labels={})


@pytest.mark.attack("20.1")
@pytest.mark.parametrize("how", SHOWN)
def test_a_second_ca_hijacks_no_agent(site: Site, home: Path, tmp_path: Path, how: str) -> None:
    """Attack: a server shows the ticket's CA and its own; TLS would trust both."""
    impostor = Impostor(tmp_path / "impostor", site, SHOWN[how])
    ticket = impostor.lure(site.ticket())
    with impostor.up(), pytest.raises(Refused, match="not the coordinator that made this ticket"):
        join(home, tickets.encode(ticket))
    assert impostor.requests == [("GET", CA_PATH)], "no secret, no key and no name were sent"
    assert not (home / ENROLLMENT_FILE).exists()


@pytest.mark.attack("20.1")
def test_a_second_ca_hijacks_no_agent_with_a_code(
    site: Site, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: the same by a forged mDNS announcement, for `join --code`."""
    impostor = Impostor(tmp_path / "impostor", site, SHOWN["behind"])
    code = impostor.lure(site.ticket())
    found = DiscoveredCoordinator("true", code.ca_sha256[:16], (impostor.address,), "0")
    monkeypatch.setattr(discovery, "discover", lambda: [found])
    with impostor.up(), pytest.raises(Refused, match="not the coordinator that made this ticket"):
        join(home, tickets.encode_code(code))
    assert impostor.requests == [("GET", CA_PATH)]


@pytest.mark.attack("20.1")
def test_a_second_ca_hijacks_no_monitor(site: Site, home: Path, tmp_path: Path) -> None:
    """Attack: the same for an operator's ticket (`monitor --join`)."""
    impostor = Impostor(tmp_path / "impostor", site, SHOWN["behind"])
    ticket = tickets.new_ticket((impostor.address,), certificates.ca_fingerprint(site.ca_pem))
    impostor.registry.create_ticket(ticket, ttl_s=60, uses=1, role="operator")
    with impostor.up(), pytest.raises(Refused, match="not the coordinator that made this ticket"):
        access.join(tickets.encode(ticket), "laptop")
    assert impostor.requests == [("GET", CA_PATH)]
    assert not (tmp_path / "watch" / access.ACCESS_FILE).exists()


@pytest.mark.attack("20.1", by="thief")
@pytest.mark.parametrize("card", ["none", "own", "true", "of another fleet", "spliced"])
def test_a_stolen_tls_key_brings_in_no_signing_key(
    site: Site, home: Path, tmp_path: Path, card: str
) -> None:
    """Attack: a server with the TLS key answers with a signing key that the CA did not sign."""
    impostor = Impostor(tmp_path / "impostor", site, lambda ca, own: ca)
    impostor.steal_tls()
    if card == "own":
        keys = (impostor.own_ca_key, impostor.identity.public)
        impostor.card = impostor.cards.current(*keys, site.mqtt_for("", ""))
    elif card == "true":
        impostor.card = site.fleet_card()
    elif card == "of another fleet":
        impostor.card = Impostor(tmp_path / "third", site, SHOWN["before"]).cards.current(
            site.ca_key, impostor.identity.public, site.mqtt_for("", "")
        )  # as if one CA key served two certificates
    elif card == "spliced":
        from protocols.enrollment.fleet_card import verify_card

        true = verify_card(site.ca_pem, site.fleet_card())
        forged = msgspec.structs.replace(true, coordinator_public=impostor.identity.public)
        impostor.card = site.fleet_card()[:64] + msgspec.json.encode(forged)
    ticket = impostor.lure(site.ticket())
    with impostor.up(), pytest.raises(Refused, match="fleet's CA") as caught:
        join(home, tickets.encode(ticket))
    assert caught.value.hint
    assert not (home / ENROLLMENT_FILE).exists()


@pytest.mark.attack("20.1", by="thief")
@pytest.mark.parametrize(
    "changed", [{"tls": False}, {"port": 1884}, {"ca_pem": "own"}], ids=["tls", "port", "ca"]
)
def test_a_stolen_tls_key_brings_in_no_broker(
    site: Site, home: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    """Attack: a server with the TLS key names a broker of its own, or one without TLS."""
    impostor = Impostor(tmp_path / "impostor", site, lambda ca, own: ca)
    impostor.steal_tls()
    impostor.sign_key, impostor.card = site.sign_key, site.fleet_card()
    impostor.identity = impostor.identity._replace(public=site.identity.public)
    impostor.broker = msgspec.structs.replace(impostor.broker, **changed)
    ticket = impostor.lure(site.ticket())
    with impostor.up(), pytest.raises(Refused, match="this fleet's CA"):
        join(home, tickets.encode(ticket))
    assert not (home / ENROLLMENT_FILE).exists()


@pytest.mark.attack("20.1")
def test_a_broker_on_the_coordinators_host_cannot_be_moved(
    site: Site, home: Path, tmp_path: Path
) -> None:
    """Attack: the answer names another host for the broker; the card says "the coordinator's"."""
    impostor = Impostor(tmp_path / "impostor", site, lambda ca, own: ca)
    impostor.steal_tls()
    impostor.card = site.fleet_card()
    impostor.identity = impostor.identity._replace(public=site.identity.public)
    impostor.broker = msgspec.structs.replace(impostor.broker, host="evil.example")
    ticket = impostor.lure(site.ticket())
    with impostor.up():
        join(home, tickets.encode(ticket))
    assert read_enrollment(home).mqtt.host == HOST


@pytest.mark.attack("20.1")
def test_a_server_cannot_hold_a_join_for_hours(
    site: Site, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a server sends a byte of its CA now and then, and no timeout of a read is reached."""
    monkeypatch.setattr(join_client, "_TIMEOUT_S", 0.3)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.folder / "server.pem", site.folder / "server.key")
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = listener.accept()
            with context.wrap_socket(accepted, server_side=True) as call:
                call.recv(65536)
                call.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while not ended.wait(0.05):
                    call.sendall(b"-")

    with socket.create_server((HOST, 0)) as listener:
        server = threading.Thread(target=drip, args=(listener,))
        server.start()
        address = f"{HOST}:{listener.getsockname()[1]}"
        ticket = msgspec.structs.replace(site.ticket(), addresses=(address,))
        try:
            with pytest.raises(Unreachable, match="takes longer"):
                join(home, tickets.encode(ticket))
        finally:
            ended.set()
            server.join(20)


@pytest.mark.attack("20.1", by="thief")
def test_a_ticket_takes_no_older_card(site: Site, home: Path, tmp_path: Path) -> None:
    """Attack: with the TLS key and a signing key that was replaced, by the card of that time."""
    impostor = Impostor(tmp_path / "impostor", site, lambda ca, own: ca)
    impostor.steal_tls()
    impostor.card, leaked = site.fleet_card(), site.identity.public
    impostor.identity = impostor.identity._replace(public=leaked)
    site.sign_key = identity.new_signing_key()
    site.identity = site.identity._replace(public=identity.public_bytes(site.sign_key))
    with site.http() as http:
        body = b"{}"
        headers = site.operator("POST", "/cw/v1/tickets", body)
        made = http.post("/cw/v1/tickets", content=body, headers=headers).json()
    ticket = impostor.lure(tickets.decode(made["ticket"]))
    with impostor.up(), pytest.raises(Refused, match="is older"):
        join(home, tickets.encode(ticket))
    assert not (home / ENROLLMENT_FILE).exists()
    true = msgspec.structs.replace(ticket, addresses=site.addresses())
    join(home, tickets.encode(true))
    assert read_enrollment(home).coordinator_public == site.identity.public


@pytest.mark.attack("20.1")
def test_a_home_that_was_hijacked_before_is_refused(site: Site, home: Path, tmp_path: Path) -> None:
    """Attack: a home that joined through an impostor, with an older version, goes on."""
    join(home, tickets.encode(site.ticket()))
    _, own = certificates.new_ca("impostor")
    file = home / ENROLLMENT_FILE
    fields = msgspec.json.decode(file.read_bytes())
    file.write_bytes(msgspec.json.encode(fields | {"ca_pem": fields["ca_pem"] + own.decode()}))
    with pytest.raises(HomeError, match="trusts more than this fleet's CA"):
        read_enrollment(home)
    file.write_bytes(msgspec.json.encode(fields | {"coordinator_public": "A" * 43 + "="}))
    with pytest.raises(HomeError, match="not on the fleet card"):
        read_enrollment(home)
    ticket = tickets.new_ticket(site.addresses(), certificates.ca_fingerprint(site.ca_pem))
    site.registry.create_ticket(ticket, ttl_s=60, uses=1, role="operator")
    joined = access.join(tickets.encode(ticket), "laptop")
    both = msgspec.structs.replace(joined, ca_pem=joined.ca_pem + own.decode())
    (tmp_path / "watch" / access.ACCESS_FILE).write_bytes(msgspec.json.encode(both))
    with pytest.raises(HomeError, match="trusts more than this fleet's CA"):
        access.connection_info(access.open_home())
