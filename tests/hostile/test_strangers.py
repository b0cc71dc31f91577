"""Who does not belong gets in nowhere: every route, without, with another's, removed or waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import pytest
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.routing import Route

from agent.home.credentials import Credentials
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.weight_transfer import SessionLost
from coordinator.api.app import make_app
from coordinator.fleet.auth import OPERATOR, Auth
from protocols.enrollment import identity, signed_requests, tickets
from protocols.enrollment.joining import (
    CA_CHAIN_PATH,
    CA_PATH,
    ENROLLMENT_STATUS_PATH,
    JOIN_PATH,
    LEAVE_PATH,
    OPERATOR_JOIN_PATH,
    JoinResponse,
)
from tests.hostile.tools import (
    BARE,
    PROTOBUF,
    REFUSED,
    client,
    enroll,
    fleet_bodies,
    flowers,
    ours,
    secure,
    state_of,
)
from tests.support.https_site import HOST, Machine
from tests.support.in_process_fleet import Fleet, fleet_of, some_data
from tests.support.waiting import until

NOT_THERE = [
    *(f"/v1/control/{name}" for name in ("start-run", "stop-run", "list-runs", "register-node")),
    *(f"/v1/runtime/{name}" for name in ("acquire-task", "pull-task-input", "push-messages")),
    "/v1/serverappio/pull-messages",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/v1/fleet/docs",
    "/v1/fleet/openapi.json",
    "/v1/fleet/",
    "/v1/health",
    "/cw/v1/",
    "/metrics",
    "/",
    "/cw/v1/../v1/fleet/pull-messages",
    "/CW/V1/runs",
    "//cw/v1/runs",
]


pytestmark = [pytest.mark.usefixtures("coordinator_home"), pytest.mark.attack("20.strangers")]


def own_routes(fleet: Fleet) -> list[tuple[str, str]]:
    """Method and path of every route of ours, as the app itself lists them."""
    hub, keys = fleet.hub, fleet.keys
    auth = Auth(hub.registry, identity.public_bytes(keys.operator_key), keys.fleet)
    app = make_app(hub, auth, keys.ca_key)
    found = []
    for route in app.routes:
        assert isinstance(route, Route)
        path = (
            route.path.replace("{digest}", "0" * 64)
            .replace("{run}", "softmax-1")
            .replace("{job}", "x-1")
        )
        path = path.replace("{ticket}", "abcdef01").replace("{peer}", fleet.agents[0].peer)
        path = path.replace("{operator}", "laptop").replace("{start}", "1")
        path = path.replace("{name}", "softmax").replace("{which}", "best")
        assert "{" not in path
        for method in sorted((route.methods or set()) - {"HEAD"}):
            found.append((method, path))
    return found


class Call(NamedTuple):
    method: str
    path: str
    body: bytes
    headers: dict[str, str]


def fleet_calls(fleet: Fleet, claimed: Machine, sign: Callable[[str, bytes], dict[str, str]]):
    """Every Fleet request in the name of `claimed`, with the headers that `sign` makes."""
    node = fleet.hub._sessions.node_of(claimed.peer) or 1
    public = identity.node_public_pem(claimed.node_key)
    bodies = fleet_bodies(node, public, fleet.hub._superlink.run_id)
    known = {route.path.removeprefix("/v1/fleet/") for route in fleet_router.routes}  # type: ignore[attr-defined]
    assert bodies.keys() == known, "every route of Flower's is asked"
    for action, body in bodies.items():
        path = f"/v1/fleet/{action}"
        yield Call("POST", path, body, PROTOBUF | sign(path, body))


def as_nobody(fleet: Fleet) -> Iterator[Call]:
    victim = fleet.agents[0].machine
    for method, path in own_routes(fleet):
        yield Call(method, path, b"", {})
        yield Call(method, path, b"{}", dict.fromkeys(ours(victim, method, path), "x"))
    yield from fleet_calls(fleet, victim, lambda path, body: {})
    for path in NOT_THERE:
        yield Call("GET", path, b"", {})
        yield Call("POST", path, b"", PROTOBUF)


def as_another(fleet: Fleet, rogue: Machine) -> Iterator[Call]:
    """The rogue is enrolled itself, and claims to be its victim or the operator."""
    victim = fleet.agents[0].machine
    victims_public = identity.node_public_pem(victim.node_key)
    stranger = Machine("stranger")
    for method, path in own_routes(fleet):
        for who in (rogue, stranger):
            yield Call(method, path, b"", ours(who, method, path, sender=victim.peer))
            yield Call(method, path, b"", ours(who, method, path, sender=OPERATOR))
        genuine = ours(victim, method, path + "x")  # for another path
        yield Call(method, path, b"", genuine)
        yield Call(method, path, b"other", ours(victim, method, path, b"this"))
        if path.startswith(("/cw/v1/runs", "/cw/v1/tickets", "/cw/v1/peers", "/cw/v1/fleet")):
            yield Call(method, path, b"", ours(rogue, method, path))
    ways: list[Callable[[str, bytes], dict[str, str]]] = [
        lambda path, body: flowers(rogue),
        lambda path, body: flowers(rogue, victims_public),
        lambda path, body: flowers(victim),  # what a capture holds, without our signature
        lambda path, body: flowers(rogue) | ours(rogue, "POST", path, body),
        lambda path, body: flowers(rogue, victims_public) | ours(rogue, "POST", path, body),
        lambda path, body: flowers(victim) | ours(rogue, "POST", path, body),
        lambda path, body: flowers(victim) | ours(rogue, "POST", path, body, victim.peer),
        lambda path, body: flowers(victim) | ours(victim, "POST", path, b"another body"),
        lambda path, body: flowers(stranger) | ours(stranger, "POST", path, body),
    ]
    for way in ways:
        yield from fleet_calls(fleet, victim, way)


def as_itself(fleet: Fleet, machine: Machine, *, but: tuple[str, ...] = ()) -> Iterator[Call]:
    """With its own keys, on every route that is not open to all."""
    for method, path in own_routes(fleet):
        if path not in but:
            yield Call(method, path, b"", ours(machine, method, path))
            if path.startswith("/cw/v1/updates"):
                signed = ours(machine, method, path) | {"x-cw-body": "0" * 64}
                yield Call(method, path, b"", signed)
    yield from fleet_calls(
        fleet, machine, lambda path, body: flowers(machine) | ours(machine, "POST", path, body)
    )


def refusals(http: httpx.Client, calls: Iterator[Call]) -> int:
    """Make these calls; each must be refused with a bare word. How many there were."""
    number = 0
    for call in calls:
        # Open to all; a ticket decides.
        if call.path in (CA_PATH, CA_CHAIN_PATH, JOIN_PATH, OPERATOR_JOIN_PATH):
            continue
        answer = http.request(call.method, call.path, content=call.body, headers=call.headers)
        assert answer.status_code in REFUSED, (call, answer.status_code, answer.content)
        assert answer.content in BARE, (call, answer.content)
        assert "server" not in answer.headers
        number += 1
    return number


async def test_no_route_lets_in_who_does_not_belong(tmp_path: Path) -> None:
    """Attack: call every route without a key, with another's, and with a removed machine's."""
    async with fleet_of(tmp_path, some_data(20, 0), some_data(30, 1)) as fleet:
        rogue, removed = enroll(fleet.hub, "rogue"), enroll(fleet.hub, "removed")
        with client(fleet) as http:
            # Its connection was open before it was removed, and stays open.
            path = ENROLLMENT_STATUS_PATH
            kept = await asyncio.to_thread(http.get, path, headers=ours(removed, "GET", path))
            assert kept.status_code == 200
            fleet.hub.registry.remove(removed.peer, "test")
            before = state_of(fleet)
            number = await asyncio.to_thread(refusals, http, as_nobody(fleet))
            number += await asyncio.to_thread(refusals, http, as_another(fleet, rogue))
            number += await asyncio.to_thread(refusals, http, as_itself(fleet, removed))
        assert state_of(fleet) == before
        print(f"{number} requests of strangers refused, 0 accepted, nothing changed")
        assert number > 350


async def test_who_awaits_approval_may_only_ask_how_it_stands(tmp_path: Path) -> None:
    """Attack: a machine that awaits approval calls every route."""
    async with fleet_of(tmp_path, some_data(20, 0)) as fleet:
        fleet.hub.registry._approve = True
        waiting = enroll(fleet.hub, "waiting")
        before = state_of(fleet)
        with client(fleet) as http:
            calls = as_itself(fleet, waiting, but=(ENROLLMENT_STATUS_PATH, LEAVE_PATH))
            number = await asyncio.to_thread(refusals, http, calls)
            told = ours(waiting, "GET", ENROLLMENT_STATUS_PATH)
            answer = await asyncio.to_thread(http.get, ENROLLMENT_STATUS_PATH, headers=told)
            assert answer.json()["standing"] == "awaiting"
        assert state_of(fleet) == before
        print(f"{number} requests of a waiting machine refused")
        assert number >= 30


async def test_a_waiting_machine_is_not_given_the_fleets_mqtt_login(tmp_path: Path) -> None:
    """Attack: a machine that awaits approval asks for the MQTT login."""
    async with fleet_of(tmp_path, some_data(20, 0)) as fleet:
        fleet.hub.registry._approve = True
        machine = Machine("waiting")
        ticket = tickets.new_ticket(fleet.hub.addresses(), bytes(32))
        fleet.hub.registry.create_ticket(ticket, ttl_s=60, uses=1)
        fleet.hub._broker._address = msgspec.structs.replace(  # as an external broker would have
            fleet.hub._broker.address(), user="fleet", password="a fleet's password"
        )
        with client(fleet) as http:
            body = msgspec.json.encode(machine.joining(ticket))
            answer = await asyncio.to_thread(http.post, JOIN_PATH, content=body)
            joined = msgspec.json.decode(answer.content, type=JoinResponse)
            assert joined.awaiting
            assert (joined.mqtt.user, joined.mqtt.password) == ("", "")
            fleet.hub.registry.approve(machine.peer)
            path = "/cw/v1/mqtt"
            answer = await asyncio.to_thread(http.get, path, headers=ours(machine, "GET", path))
            assert answer.json()["password"] == "a fleet's password"


async def test_nobody_joins_with_a_key_that_he_has_only_seen(tmp_path: Path) -> None:
    """Attack: join with the public key of another machine, or without proof of the own one.

    Neither with a good ticket, nor with a spent one to be told what the owner was told.
    """
    async with fleet_of(tmp_path, some_data(20, 0)) as fleet:
        victim, thief = fleet.agents[0].machine, Machine("thief")
        ticket = tickets.new_ticket(fleet.hub.addresses(), bytes(32))
        fleet.hub.registry.create_ticket(ticket, ttl_s=60, uses=3)
        seen = identity.public_bytes(victim.sign_key)
        before = state_of(fleet)
        with client(fleet) as http:
            for changed in (
                {"sign_public": seen},
                {"sign_public": seen, "node_public": identity.node_public_pem(victim.node_key)},
                {"sign_public": identity.public_bytes(Machine().sign_key)},
                {"proof": bytes(64)},
                {"node_public": identity.node_public_pem(thief.node_key).replace(b"\n", b"\r\n")},
                {"node_public": b"\n" + identity.node_public_pem(thief.node_key)},
            ):
                body = msgspec.json.encode(thief.joining(ticket, **changed))
                answer = await asyncio.to_thread(http.post, JOIN_PATH, content=body)
                assert answer.status_code == 403, changed
                assert b"password" not in answer.content
        assert state_of(fleet) == before


async def test_a_host_header_chooses_no_route(tmp_path: Path) -> None:
    """Attack: a Host header pretends another path than the one that is checked."""
    async with fleet_of(tmp_path, some_data(20, 0)) as fleet:
        operator = fleet.keys.operator_key

        def ask(host: str) -> int:
            headers = signed_requests.sign_headers(OPERATOR, operator.sign, "GET", "/cw/v1/peers")
            with client(fleet) as http:
                return http.get("/cw/v1/tickets", headers=headers | {"host": host}).status_code

        for host in ("x/cw/v1/peers#", "x/cw/v1/peers?", "[::1", "a" * 3000, "x:y:z", "_"):
            assert await asyncio.to_thread(ask, host) in {400, 401}, host


async def test_a_peer_removed_in_the_middle_of_a_round_is_out_at_once(tmp_path: Path) -> None:
    """Attack: a removed peer goes on over its open connection and in an upload under way.

    The others end the round.
    """
    datas = [some_data(20 + 10 * seed, seed) for seed in range(3)]
    async with fleet_of(tmp_path, *datas) as fleet:
        removed = fleet.agents[0]
        reached, opened = threading.Event(), threading.Event()

        def hold(kind: str, number: int) -> None:
            if (kind, number) == ("train", 1):
                reached.set()
                opened.wait(30)

        removed.trainer.before = hold
        run_id = fleet.start(rounds=2, quorum=2)
        await until(reached.is_set)
        machine, link = removed.machine, removed._open_link()
        digest = "ab" * 32
        path = f"/cw/v1/updates/{digest}"
        head = machine.headers("PUT", path, digest=digest) | {"content-length": "5000"}
        lines = [f"PUT {path} HTTP/1.1", "host: x", *(f"{k}: {v}" for k, v in head.items())]
        upload = await asyncio.to_thread(secure, fleet.port, fleet.keys.ca_pem.decode())
        upload.sendall("\r\n".join([*lines, "", ""]).encode() + b"x" * 1000)
        part = fleet.home / "spool" / run_id / f"{machine.peer}-{digest}.part"
        await until(part.exists)
        assert link.mqtt_address is not None

        fleet.hub.registry.remove(machine.peer, "test")
        for ask in (
            link.pull,
            link.heartbeat,
            link.mqtt_address,
            link.open,
            link.enrollment_status,
        ):
            with pytest.raises(SessionLost, match="401"):
                await asyncio.to_thread(ask)
        upload.sendall(b"x" * 1000)
        answer = await asyncio.to_thread(upload.recv, 4096)
        assert b" 401 " in answer.split(b"\r\n")[0]
        upload.close()
        await until(lambda: not part.exists())
        opened.set()
        run = await fleet.finished(run_id)
        others = sorted(agent.peer for agent in fleet.agents[1:])
        assert [sorted(closed.contributors) for closed in run.history] == [others, others]
        new = CoordinatorClient(
            Credentials(f"{HOST}:{fleet.port}", fleet.keys.ca_pem, *credentials(machine))
        )
        with pytest.raises(SessionLost, match="401"):
            await asyncio.to_thread(new.open)
        new.close()


def credentials(machine: Machine) -> tuple[str, object, object]:
    return machine.peer, machine.node_key, machine.sign_key
