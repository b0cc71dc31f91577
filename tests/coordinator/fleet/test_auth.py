"""Who may ask what of our own routes, over real TLS."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from coordinator.api.schema import TicketRequest
from protocols.enrollment import certificates, identity, signed_requests, tickets
from protocols.enrollment.joining import CA_PATH, JOIN_PATH, MQTT_PATH, JoinResponse
from tests.support.https_site import Machine, Site

OPERATORS = [
    ("GET", "/cw/v1/fleet"),
    ("GET", "/cw/v1/watch"),
    ("GET", "/cw/v1/runs"),
    ("POST", "/cw/v1/runs"),
    ("GET", "/cw/v1/runs/x"),
    ("POST", "/cw/v1/runs/x/stop"),
    ("GET", "/cw/v1/tickets"),
    ("POST", "/cw/v1/tickets"),
    ("POST", "/cw/v1/tickets/x/revoke"),
    ("GET", "/cw/v1/peers"),
    ("POST", "/cw/v1/peers/x/approve"),
    ("POST", "/cw/v1/peers/x/remove"),
    ("POST", "/cw/v1/peers/x/command"),
    ("GET", "/cw/v1/peers/x/logs"),
    ("GET", "/cw/v1/operators"),
    ("POST", "/cw/v1/operators/x/remove"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site"), approve=True).up() as running:
        yield running


def post(http: httpx.Client, site: Site, path: str, body: bytes = b"") -> httpx.Response:
    return http.post(path, content=body, headers=site.operator("POST", path, body))


@pytest.mark.parametrize(("method", "path"), OPERATORS)
def test_only_the_operator_may(http: httpx.Client, site: Site, method: str, path: str) -> None:
    machine = Machine()
    site.registry.join(machine.joining(site.ticket()))
    own = machine.headers(method, path)
    claimed = own | {signed_requests.SENDER: "operator"}
    for headers in ({}, own, claimed, site.operator(method, path + "x")):
        answer = http.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert b"signature" not in answer.content  # what was wrong stands in the log


def test_the_operator_is_served_once_a_signature(http: httpx.Client, site: Site) -> None:
    headers = site.operator("GET", "/cw/v1/peers")
    assert http.get("/cw/v1/peers", headers=headers).status_code == 200
    assert http.get("/cw/v1/peers", headers=headers).status_code == 401


def test_the_body_is_the_one_that_was_signed(http: httpx.Client, site: Site) -> None:
    path, body = "/cw/v1/tickets", msgspec.json.encode(TicketRequest(uses=1))
    headers = site.operator("POST", path, body)
    more = body.replace(b'"uses":1', b'"uses":9')
    assert http.post(path, content=more, headers=headers).status_code == 401
    headers = site.operator("POST", path, body)
    assert http.post(path, content=body, headers=headers).status_code == 200


def test_a_clock_that_is_wrong_is_refused(
    http: httpx.Client, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for away_s in (-2 * signed_requests.WINDOW_S, 2 * signed_requests.WINDOW_S):
        with monkeypatch.context() as patch:
            patch.setattr(
                "protocols.enrollment.signed_requests.time.time", lambda away_s=away_s: now + away_s
            )
            headers = site.operator("GET", "/cw/v1/peers")
        assert http.get("/cw/v1/peers", headers=headers).status_code == 401


def test_a_long_body_is_not_read_to_its_end(http: httpx.Client, site: Site) -> None:
    body = b"x" * 300_000
    assert post(http, site, "/cw/v1/tickets", body).status_code == 413
    assert http.post(JOIN_PATH, content=body).status_code == 413


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"uses":"many"}', b'{"uses":0}'])
def test_a_wrong_order_is_told_in_words(http: httpx.Client, site: Site, body: bytes) -> None:
    answer = post(http, site, "/cw/v1/tickets", body)
    assert answer.status_code == 422
    assert json.loads(answer.content).keys() == {"code", "message", "hint"}


def test_a_name_with_blanks_can_be_asked_for(http: httpx.Client, site: Site) -> None:
    machine = Machine("my box: täst 2")
    site.registry.join(machine.joining(site.ticket()))
    path = f"/cw/v1/peers/{machine.name}/approve"
    answer = post(http, site, path)
    assert answer.status_code == 200
    assert json.loads(answer.content) == {"peer": machine.peer}
    assert post(http, site, path.replace("box", "bx")).status_code == 422


def test_a_waiting_peer_is_known_but_gets_no_weights(http: httpx.Client, site: Site) -> None:
    machine = Machine()
    site.registry.join(machine.joining(site.ticket()))
    path = "/cw/v1/weights/" + "0" * 64
    assert http.get(path, headers=machine.headers("GET", path)).status_code == 403
    site.registry.approve(machine.peer)
    assert http.get(path, headers=machine.headers("GET", path)).status_code == 404


def test_the_ca_and_joining_are_open(http: httpx.Client, site: Site) -> None:
    assert certificates.ca_fingerprint(http.get(CA_PATH).content) == certificates.ca_fingerprint(
        site.ca_pem
    )
    machine = Machine("new")
    body = msgspec.json.encode(machine.joining(site.ticket()))
    answer = msgspec.json.decode(http.post(JOIN_PATH, content=body).content, type=JoinResponse)
    assert (answer.peer, answer.awaiting) == (machine.peer, True)
    certificate = certificates.verify_certificate(site.ca_pem, answer.certificate)
    assert certificate.sign_public == identity.public_bytes(machine.sign_key)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b"[" * 10_000, b'{"ticket":"\\ud800"}']
)
def test_a_malformed_joining_is_refused(http: httpx.Client, body: bytes) -> None:
    assert http.post(JOIN_PATH, content=body).status_code == 400


def test_a_joining_without_a_good_ticket_is_told_why(http: httpx.Client, site: Site) -> None:
    unknown = tickets.new_ticket(("host:1",), bytes(32))
    answer = http.post(JOIN_PATH, content=msgspec.json.encode(Machine().joining(unknown)))
    assert answer.status_code == 403
    assert json.loads(answer.content)["code"] == "refused"


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/cw/v1", "/cw/v1/nothing", "/cw/v2/fleet"]
)
def test_there_is_nothing_else(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 404


def test_a_wrong_method_is_refused(http: httpx.Client) -> None:
    assert http.delete("/cw/v1/peers").status_code == 405
    assert http.get(JOIN_PATH).status_code == 405


def test_a_downgraded_peer_is_named_in_the_log(
    http: httpx.Client,
    site: Site,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other tests of this file may have used up this second's lines.
    monkeypatch.setattr("coordinator.fleet.auth._MAX_LINES_PER_S", 10**6)
    machine = Machine("downgraded")
    site.registry.join(machine.joining(site.ticket()))
    machine.fleet = site.fleet_id
    assert http.get(MQTT_PATH, headers=machine.headers("GET", MQTT_PATH)).status_code == 403
    machine.fleet = ""
    assert http.get(MQTT_PATH, headers=machine.headers("GET", MQTT_PATH)).status_code == 401
    assert "downgraded signs requests as an older version does" in caplog.text
