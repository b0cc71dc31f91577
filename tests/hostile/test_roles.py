"""Who may call which route: each route of the coordinator, asked by each kind of caller."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.routing import Route

from coordinator.admin import audit
from coordinator.api.app import make_app
from coordinator.api.schema import EvaluationsResponse
from coordinator.daemon.coordinator import Coordinator
from coordinator.fleet.auth import Auth
from coordinator.storage import ledger_place, run_events
from coordinator.transport.flower_sessions import FLEET_PREFIX, sessions_app
from protocols.enrollment import identity, joining, signed_requests, tickets
from protocols.enrollment.identity import SigningKey
from protocols.messages.states import RunState
from tests.support.https_site import HOST, Machine
from tests.support.in_process_fleet import Fleet

ANYONE, AWAITING, PEER = "anyone", "also a peer that awaits approval", "an enrolled peer"
OBSERVER, OPERATOR = "also an observer", "an operator"
ALLOWED = {
    ANYONE: {"stranger", "awaiting", "enrolled", "gone", "observer", "operator", "dropped", "home"},
    AWAITING: {"awaiting", "enrolled"},
    PEER: {"enrolled"},
    OBSERVER: {"observer", "operator", "home"},
    OPERATOR: {"operator", "home"},
}
#: Every route has its row. HEAD is as GET.
ROLES = {
    "GET /cw/v1/ca": ANYONE,
    "GET /cw/v1/ca/transitions": ANYONE,
    "POST /cw/v1/join": ANYONE,
    "POST /cw/v1/operators/join": ANYONE,
    "GET /cw/v1/standing": AWAITING,
    "POST /cw/v1/leave": AWAITING,
    "POST /cw/v1/exchange": PEER,
    "GET /cw/v1/mqtt": PEER,
    "POST /cw/v1/renew": PEER,
    "POST /cw/v1/logs": PEER,
    "POST /cw/v1/comparisons": PEER,
    "GET /cw/v1/weights/{digest}": PEER,
    "GET /cw/v1/patches/{digest}": PEER,
    "PUT /cw/v1/updates/{digest}": PEER,
    "GET /cw/v1/inputs/{digest}": PEER,
    "PUT /cw/v1/answers/{digest}": PEER,
    "POST /cw/v1/plans/{digest}": PEER,
    "POST /cw/v1/plans/{digest}/held": PEER,
    "POST /cw/v1/neighbours": PEER,
    "GET /cw/v1/log/{start}": PEER,
    "GET /cw/v1/models/{name}/{which}": PEER,
    "GET /cw/v1/offers": PEER,
    "GET /cw/v1/offers/{digest}": PEER,
    "POST /v1/fleet/activate-node": PEER,
    "POST /v1/fleet/deactivate-node": PEER,
    "GET /cw/v1/fleet": OBSERVER,
    "GET /cw/v1/watch": OBSERVER,
    "GET /cw/v1/peers": OBSERVER,
    "GET /cw/v1/jobs/{job}/stands": OBSERVER,
    "GET /cw/v1/neighbours": OBSERVER,
    "GET /cw/v1/peers/{peer}/logs": OPERATOR,
    "POST /cw/v1/peers/{peer}/approve": OPERATOR,
    "POST /cw/v1/peers/{peer}/remove": OPERATOR,
    "POST /cw/v1/peers/{peer}/command": OPERATOR,
    "GET /cw/v1/jobs": OPERATOR,
    "POST /cw/v1/jobs": OPERATOR,
    "GET /cw/v1/jobs/{job}": OPERATOR,
    "GET /cw/v1/jobs/{job}/shares": OPERATOR,
    "POST /cw/v1/jobs/{job}/stop": OPERATOR,
    "POST /cw/v1/jobs/{job}/taken": OPERATOR,
    "POST /cw/v1/jobs/{job}/resume": OPERATOR,
    "GET /cw/v1/runs": OPERATOR,
    "POST /cw/v1/runs": OPERATOR,
    "GET /cw/v1/runs/{run}": OPERATOR,
    "GET /cw/v1/runs/{run}/evaluations": OPERATOR,
    "POST /cw/v1/runs/{run}/stop": OPERATOR,
    "POST /cw/v1/runs/{run}/resume": OPERATOR,
    "GET /cw/v1/runs/{run}/deletion": OPERATOR,
    "POST /cw/v1/runs/{run}/delete": OPERATOR,
    "GET /cw/v1/runs/{run}/versions/{digest}": OPERATOR,
    "POST /cw/v1/runs/{run}/exported/{digest}": OPERATOR,
    "GET /cw/v1/tasks": OPERATOR,
    "POST /cw/v1/tasks": OPERATOR,
    "POST /cw/v1/tasks/withdraw": OPERATOR,
    "GET /cw/v1/tickets": OPERATOR,
    "POST /cw/v1/tickets": OPERATOR,
    "POST /cw/v1/tickets/{ticket}/revoke": OPERATOR,
    "GET /cw/v1/operators": OPERATOR,
    "POST /cw/v1/operators/{operator}/remove": OPERATOR,
}
EMPTY = hashlib.sha256(b"").hexdigest()


@pytest.fixture
async def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    fleet = Fleet(tmp_path)
    async with fleet.up():
        yield fleet


def served(fleet: Fleet) -> set[str]:
    """Method and path of each route of the coordinator."""
    hub = fleet.hub
    auth = Auth(hub.registry, identity.public_bytes(fleet.keys.operator_key))
    apps = (make_app(hub, auth, fleet.keys.ca_key), sessions_app(hub._superlink, auth))
    found = set()
    for route in (route for app in apps for route in app.routes):
        assert isinstance(route, Route), f"{route} has no role"
        found |= {f"{method} {route.path}" for method in route.methods or ()}
    return found


def machine(hub: Coordinator, standing: str) -> tuple[str, SigningKey]:
    """A new machine of this standing."""
    made = Machine(standing)
    ticket = tickets.new_ticket(hub.addresses(), bytes(32))
    hub.registry.create_ticket(ticket, ttl_s=60, uses=1)
    hub.registry._approve = standing == "awaiting"
    hub.registry.join(made.joining(ticket))
    if standing == "gone":
        hub.registry.remove(made.peer, "a test")
    return made.peer, made.sign_key


def person(hub: Coordinator, role: Any) -> tuple[str, SigningKey]:
    """A new operator or observer, or an operator who was removed (`dropped`)."""
    ticket, key = tickets.new_ticket(hub.addresses(), bytes(32)), identity.new_signing_key()
    known: Any = "observer" if role == "observer" else "operator"
    hub.registry.create_ticket(ticket, ttl_s=60, uses=1, role=known)
    public = identity.public_bytes(key)
    proof = key.sign(joining.operator_join_proof(ticket.id, ticket.secret, public))
    joined = hub.registry.join_operator(
        joining.OperatorJoinRequest(
            ticket=ticket.id,
            secret=ticket.secret,
            name=f"the-{role}",
            sign_public=public,
            proof=proof,
            version="0",
        )
    )
    if role == "dropped":
        hub.registry.remove_operator(joined.operator)
    return joined.operator, key


CALLERS: dict[str, Callable[[Coordinator, str], tuple[str, SigningKey]]] = {
    "awaiting": machine,
    "enrolled": machine,
    "gone": machine,
    "observer": person,
    "operator": person,
    "dropped": person,
}


@pytest.mark.attack("20.8")
async def test_each_route_admits_its_role_and_nobody_else(fleet: Fleet) -> None:
    """Attack: an observer, a peer, a removed one or a stranger calls each route, HEAD included.

    Observers could read agents' logs, the answers of single peers, runs, tickets and operators.
    """
    assert {line for line in served(fleet) if not line.startswith("HEAD ")} == set(ROLES)
    hub, wrong = fleet.hub, []
    async with httpx.AsyncClient(base_url=f"https://{HOST}:{hub.port}", verify=False) as client:
        for line in sorted(served(fleet)):
            method, template = line.split()
            allowed = ALLOWED[ROLES[line.replace("HEAD ", "GET ")]]
            path = template.replace("{digest}", EMPTY).replace("{start}", "1")
            path = re.sub(r"{\w+}", "none", path)
            # Flower checks a signature of its own after ours, which other tests pass.
            for caller in ALLOWED[ANYONE] - ({"enrolled"} if FLEET_PREFIX in path else set()):
                headers = {}
                if caller == "home":
                    sender, key = "operator", fleet.keys.operator_key
                elif caller != "stranger":
                    sender, key = CALLERS[caller](hub, caller)
                if caller != "stranger":
                    headers = signed_requests.sign_headers(sender, key.sign, method, path, EMPTY)
                answer = await client.request(method, path, headers=headers)
                is_refused = answer.status_code in (401, 403)
                if is_refused is (caller in allowed):
                    wrong.append(f"{line} by {caller}: {answer.status_code} {answer.text[:80]}")
    assert wrong == []


@pytest.mark.attack("20.8")
async def test_an_observer_gets_no_evaluation_of_a_single_peer(fleet: Fleet) -> None:
    """Attack: an observer asks a real run for each peer's evaluation, in several ways.

    An operator gets them, and the audit names who has read them.
    """
    hub = fleet.hub
    run_id = a_run_with_an_evaluation(fleet)
    async with httpx.AsyncClient(base_url=f"https://{HOST}:{hub.port}", verify=False) as client:

        async def ask(role: str, method: str, path: str) -> httpx.Response:
            sender, key = person(hub, role)
            headers = signed_requests.sign_headers(sender, key.sign, method, path, EMPTY)
            return await client.request(method, path, headers=headers)

        path = f"/cw/v1/runs/{run_id}/evaluations"
        for own in (path, f"{path}?role=operator", f"/cw/v1/runs/{run_id}", "/cw/v1/runs"):
            refused = await ask("observer", "GET", own)
            assert (refused.status_code, str(SECRET) in refused.text) == (403, False), own
        assert (await ask("observer", "HEAD", path)).status_code == 403
        assert str(SECRET) not in (await ask("observer", "GET", "/cw/v1/fleet")).text
        assert "answers read" not in audited(fleet)
        allowed = await ask("operator", "GET", path)
    found = msgspec.json.decode(allowed.content, type=EvaluationsResponse)
    assert found.evaluations["ada"].metrics == {"loss": SECRET}
    assert found.withheld == ""
    assert "answers read the-operator (" in audited(fleet)
    assert f"): the peers' evaluations in run {run_id}" in audited(fleet)


#: The loss of one peer, between those of others.
SECRET = 0.123456789


def a_run_with_an_evaluation(fleet: Fleet) -> str:
    """The id of a run in which three peers have evaluated a version; `ada` has this loss."""
    run_id, runs = "softmax-1", fleet.hub.runs
    losses = {"ada": SECRET, "bob": 0.1, "cleo": 0.3, "dan": 0.4}
    news: list[run_events.RunEvent] = [
        run_events.RunStarted(run_events.RunSpec(task="softmax", rounds=1)),
        run_events.WeightsInitialised(EMPTY, "ada"),
        run_events.RoundOpened(1, EMPTY, ("ada",)),
        run_events.UpdateAccepted(1, "ada", run_events.Update(digest=EMPTY, num_examples=9)),
        run_events.TrainingClosed(1, ("ada",)),
        run_events.VersionCommitted(1, EMPTY, EMPTY, ("ada",), {}),
        run_events.EvaluationOpened(1, tuple(losses)),
        *(
            run_events.UpdateAccepted(
                1, peer, run_events.Update(num_examples=9, metrics={"loss": loss})
            )
            for peer, loss in losses.items()
        ),
        run_events.RoundClosed(1, {"loss": 0.2}, 1.0, 0, 0),
        run_events.RunEnded(RunState.FINISHED, "done"),
    ]
    runs._append(run_id, *news)
    runs._enqueue(run_id)
    return run_id


def audited(fleet: Fleet) -> str:
    """The lines of the audit."""
    with ledger_place.reading(fleet.home) as ledger:
        return "\n".join(f"{line.event} {line.text}" for line in audit.read_audit(ledger))


@pytest.mark.attack("20.8")
async def test_a_refused_observer_is_told_why(fleet: Fleet) -> None:
    """Attack: an observer asks for an agent's log under other spellings of the path."""
    hub = fleet.hub
    peer, _ = machine(hub, "enrolled")
    sender, key = person(hub, "observer")
    async with httpx.AsyncClient(base_url=f"https://{HOST}:{hub.port}", verify=False) as client:

        async def ask(path: str) -> httpx.Response:
            headers = signed_requests.sign_headers(sender, key.sign, "GET", path, EMPTY)
            return await client.get(path, headers=headers)

        plain = await ask(f"/cw/v1/peers/{peer}/logs")
        assert plain.status_code == 403
        assert "is for operators" in plain.json()["message"]
        for path in (f"/cw/v1/peers/{peer}/logs/", f"/cw/v1//peers/{peer}/logs", "/CW/v1/jobs"):
            assert (await ask(path)).status_code in (307, 404), path
        for path in (f"/cw/v1/peers/{peer}/logs?role=operator", "/cw/v1/tickets?x=/cw/v1/fleet"):
            assert (await ask(path)).status_code == 403, path
