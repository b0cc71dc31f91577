"""A signed request is good for the fleet or peer that it names, and nowhere else."""

from __future__ import annotations

import hashlib
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.transport.p2p.authorization import RequestAuthorizer
from protocols.enrollment import identity, signed_requests
from protocols.enrollment.joining import ENROLLMENT_STATUS_PATH
from protocols.errors import BadMessage
from protocols.messages.fleet_names import FleetNames
from protocols.p2p.swarm import DOWNLOAD_TOKEN_HEADER, SIGNED_DOWNLOAD_TOKEN, DownloadToken
from tests.support.https_site import Machine, Site

DIGEST = "a" * 64
VERSION_PATH = f"/cw/v1/weights/{DIGEST}"


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "other").mkdir()
    with Site(tmp_path / "other").up() as running:
        yield running


@pytest.mark.attack("20.13", by="coordinator")
def test_a_request_for_one_fleet_is_refused_by_another(site: Site, other: Site) -> None:
    """Attack: the coordinator of one fleet replays a request to another with the same peer."""
    machine = site.enroll("twin")
    other.registry.join(machine.joining(other.ticket()))
    with site.http() as ours, other.http() as theirs:
        sent = site.credentials(machine).sign_request("GET", ENROLLMENT_STATUS_PATH)
        assert theirs.get(ENROLLMENT_STATUS_PATH, headers=sent).status_code == 401
        receiver = getattr(signed_requests, "RECEIVER", "x-cw-receiver")
        for named in ("", other.fleet_id, other.fleet_id.upper(), machine.peer, "é"):
            changed = sent | {receiver: named.encode("utf-8").decode("latin-1")}
            headers = {name: text.encode("latin-1") for name, text in changed.items()}
            answer = theirs.get(ENROLLMENT_STATUS_PATH, headers=headers)
            assert answer.status_code == 401, named
        without = {name: text for name, text in sent.items() if name != receiver}
        assert theirs.get(ENROLLMENT_STATUS_PATH, headers=without).status_code == 401
        assert ours.get(ENROLLMENT_STATUS_PATH, headers=sent).status_code == 200


@pytest.mark.attack("20.13", by="coordinator")
def test_an_operators_request_is_refused_by_another_fleet(site: Site, other: Site) -> None:
    """Attack: the same with an operator whose key is in two fleets, such as a copied home."""
    other.auth._operator = site.auth._operator
    path = "/cw/v1/tickets"
    with other.http() as theirs:
        answer = theirs.get(path, headers=site.operator("GET", path))
    assert answer.status_code == 401


@pytest.mark.attack("20.13", by="network")
def test_the_older_format_is_refused_after_the_newer(site: Site) -> None:
    """Attack: a request without a receiver, as older agents sign them, is passed on."""
    machine = site.enroll("ann")
    old = signed_requests.sign_headers
    key = machine.sign_key.sign
    with site.http() as http:
        first = old(machine.peer, key, "GET", ENROLLMENT_STATUS_PATH)
        assert http.get(ENROLLMENT_STATUS_PATH, headers=first).status_code == 200, "an older agent"
        named = site.credentials(machine).sign_request("GET", ENROLLMENT_STATUS_PATH)
        assert http.get(ENROLLMENT_STATUS_PATH, headers=named).status_code == 200
        later = old(machine.peer, key, "GET", ENROLLMENT_STATUS_PATH)
        assert http.get(ENROLLMENT_STATUS_PATH, headers=later).status_code == 401


@pytest.mark.attack("20.13", by="network")
def test_an_update_is_taken_for_the_run_that_its_sender_signed(site: Site) -> None:
    """Attack: a proxy that ends TLS gives an update for an earlier run to the present one."""
    machine, data = site.enroll("ann"), b"an update"
    digest = hashlib.sha256(data).hexdigest()
    path, key = f"/cw/v1/updates/{digest}", machine.sign_key.sign

    def signed(path: str, receiver: str = site.fleet_id) -> dict[str, str]:
        return signed_requests.sign_headers(machine.peer, key, "PUT", path, digest, receiver)

    with site.http() as http, site.transfer.receiving("run-2", lambda peer: set()):
        site.transfer.limits.max_bytes = 1 << 20
        for query, changed, header in (
            ("?run=run-1", "?run=run-1", ""),
            ("?run=run-1", "?run=run-1", "run-2"),
            ("?run=run-1", "?run=run-2", ""),
            ("?run=run-1", "", "run-2"),
            ("?run=run-1", "?run=run-1&run=run-2", ""),
        ):
            headers = signed(path + query) | ({"x-cw-run": header} if header else {})
            answer = http.put(path + changed, content=data, headers=headers)
            assert answer.status_code in (401, 410), (query, changed, header)
        older = signed(path, "") | {"x-cw-run": "run-1"}
        assert http.put(path, content=data, headers=older).status_code == 401, "a downgrade"
        assert not site.lane.uploads.path(machine.peer, digest).exists()
        headers = signed(path + "?run=run-2")
        assert http.put(path + "?run=run-2", content=data, headers=headers).status_code == 200


@pytest.mark.attack("20.13", by="coordinator")
def test_work_and_claims_for_one_fleet_do_not_count_in_another(site: Site, other: Site) -> None:
    """Attack: what was signed for one fleet is used in another that has the same keys."""
    names = FleetNames(site.fleet_id)
    names.check("ann", "")  # an older agent
    for sender, named in (("ann", other.fleet_id), ("bob", other.fleet_id), ("ann", "x")):
        with pytest.raises(BadMessage, match="signed for fleet"):
            names.check(sender, named)
    names.check("ann", site.fleet_id)
    with pytest.raises(BadMessage, match="unlike before"):
        names.check("ann", "")
    names.check("bob", "")


def token(site: Site, machine: Machine, **changed: Any) -> dict[str, str]:
    made = DownloadToken(
        peer=machine.peer,
        sign_public=identity.public_bytes(machine.sign_key),
        digest=DIGEST,
        until=time.time() + 60,
        **changed,
    )
    signed = SIGNED_DOWNLOAD_TOKEN.pack(made, site.sign_key.sign)
    return {DOWNLOAD_TOKEN_HEADER: b64encode(signed).decode()}


@pytest.mark.attack("20.13")
def test_a_request_to_one_peer_is_refused_by_another(site: Site) -> None:
    """Attack: a peer replays the request that it got to another peer, or the coordinator."""
    ann, bob, eve = (site.enroll(name) for name in ("ann", "bob", "eve"))
    public = identity.public_bytes(site.sign_key)
    at_bob, at_eve = (RequestAuthorizer(public, one.peer) for one in (bob, eve))

    def allows(at: RequestAuthorizer, headers: dict[str, str]) -> bool:
        return bool(at.authorize("GET", VERSION_PATH, headers, DIGEST))

    def sent(receiver: str, **changed: Any) -> dict[str, str]:
        sha256 = signed_requests.EMPTY_SHA256
        signed = site.credentials(ann).sign_request_to(receiver, "GET", VERSION_PATH, sha256)
        return signed | token(site, ann, **changed)

    to_eve = sent(eve.peer, signs=2)
    assert not allows(at_bob, to_eve)
    assert not allows(at_bob, to_eve | {signed_requests.RECEIVER: bob.peer})
    assert not allows(at_bob, {k: v for k, v in to_eve.items() if k != signed_requests.RECEIVER})
    with site.http() as http:
        assert http.get(VERSION_PATH, headers=to_eve).status_code == 401
    assert allows(at_eve, to_eve)
    assert not allows(at_eve, to_eve), "once"
    for_old = sent("", signs=2)  # ann takes eve for an older agent, as eve claims
    assert not allows(at_bob, for_old)
    assert allows(at_bob, sent("")), "an older agent asks"
    assert not allows(at_bob, sent(site.fleet_id, signs=2)), "a request to the coordinator"
