"""What was captured once is worth nothing: requests of ours, Flower's, updates, claims."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from agent.transport.coordinator_client import CoordinatorClient, pack_message
from agent.transport.http_client import MAX_RESPONSE_BYTES, Body, Response
from coordinator.storage import run_events
from coordinator.transport.flower_records import CLAIM
from protocols.enrollment import identity, signed_requests
from protocols.enrollment.joining import ENROLLMENT_STATUS_PATH, MQTT_PATH
from protocols.messages.states import RunState
from protocols.messages.work import POLL_PATH, SIGNED_CLAIM, PollRequest, UpdateClaim
from protocols.model import weights
from protocols.model.weights import Weights
from tests.hostile.tools import (
    PROTOBUF,
    client,
    enroll,
    fleet_bodies,
    flowers,
    ours,
    state_of,
)
from tests.support.in_process_fleet import Agent, Fleet, fleet_of, some_data
from tests.support.waiting import until

OURS = (
    signed_requests.SENDER,
    signed_requests.TIME,
    signed_requests.NONCE,
    signed_requests.BODY,
    signed_requests.SIGNATURE,
    signed_requests.RECEIVER,
)


pytestmark = [
    pytest.mark.usefixtures("coordinator_home"),
    pytest.mark.attack("20.wire", by="network"),
]


class Tap:
    """Keeps every request of a link, as somebody would who has broken its TLS."""

    def __init__(self, link: CoordinatorClient) -> None:
        self.seen: list[httpx.Request] = []
        self._ask = link._http_client.request
        link._http_client.request = self._noted  # type: ignore[method-assign]

    def _noted(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Body = b"",
        *,
        max_bytes: int = MAX_RESPONSE_BYTES,
    ) -> Response:
        content = body if isinstance(body, bytes) else b"".join(body)
        headers = {name: value for name, value in headers.items() if name != "content-length"}
        self.seen.append(
            httpx.Request(method, f"https://tapped{path}", headers=headers, content=content)
        )
        return self._ask(method, path, headers, content, max_bytes=max_bytes)

    def again(self, http: httpx.Client, *, without_ours: bool = False) -> dict[str, int]:
        """Send all of them again, byte for byte; statuses by path."""
        statuses = {}
        for request in list(self.seen):
            headers = dict(request.headers)
            if without_ours:
                headers = {name: value for name, value in headers.items() if name not in OURS}
            answer = http.request(
                request.method, request.url.path, content=request.content, headers=headers
            )
            statuses[request.url.path] = answer.status_code
        return statuses


async def test_captured_requests_are_worth_nothing(tmp_path: Path) -> None:
    """Attack: send captured requests again, ours and those of Flower.

    Flower's signature is good for five minutes and any body.
    """
    async with fleet_of(tmp_path, some_data(20, 0)) as fleet:
        hub = fleet.hub
        victim = enroll(hub, "victim")
        node = hub._sessions.node_of(victim.peer)
        assert node is not None
        agent = Agent(tmp_path / "victim", victim, fleet.agents[0]._credentials, some_data(5, 1))
        mine = agent._credentials._replace(
            peer=victim.peer, node_key=victim.node_key, sign_key=victim.sign_key
        )
        link = CoordinatorClient(mine)
        tap = Tap(link)
        await asyncio.to_thread(link.open)
        await asyncio.to_thread(link.heartbeat)
        await asyncio.to_thread(link.mqtt_address)
        await asyncio.to_thread(link.enrollment_status)
        assert await asyncio.to_thread(link.pull) is None
        source = tmp_path / "update"
        digest = weights.save(Weights({"w": np.zeros(3, np.float32)}), source)
        hub.transfer.limits.max_bytes = 10_000
        hub.transfer.limits.is_expected = lambda: True
        await asyncio.to_thread(link.upload, digest, source)
        closer = CoordinatorClient(mine)
        closing = Tap(closer)
        await asyncio.to_thread(closer.open)
        await asyncio.to_thread(closer.close)
        await asyncio.to_thread(link.open)  # and is back
        tap.seen += closing.seen
        message = Message(
            RecordDict({"config": ConfigRecord({"n": 1})}), node, "train", group_id="r"
        )
        (message_id,) = hub._grid.push_messages([message])
        await until(lambda: victim.peer in hub._sessions._online)
        before = state_of(fleet)
        with client(fleet) as http:
            for without_ours in (False, True):
                found = await asyncio.to_thread(tap.again, http, without_ours=without_ours)
                print(f"sent again, without our signature {without_ours}: {found}")
                assert set(found) >= {
                    "/v1/fleet/activate-node",
                    "/v1/fleet/deactivate-node",
                    POLL_PATH,
                    MQTT_PATH,
                    ENROLLMENT_STATUS_PATH,
                }
                assert set(found.values()) == {401}
            # Flower's headers with any other body: what stock Flower would have served.
            signed = flowers(victim)
            run_id = hub._superlink.run_id
            for action, body in fleet_bodies(node, mine_public(victim), run_id).items():
                answer = await asyncio.to_thread(
                    http.post, f"/v1/fleet/{action}", content=body, headers=PROTOBUF | signed
                )
                assert answer.status_code in {401, 404}, action
        assert state_of(fleet) == before
        pulled = await asyncio.to_thread(link.pull)
        assert pulled is not None, "the message was not swallowed"
        assert pulled.metadata.message_id == message_id
        assert victim.peer in hub._sessions._online, "it was not taken offline"
        await asyncio.to_thread(link.close)


def mine_public(machine: Any) -> bytes:
    return identity.node_public_pem(machine.node_key)


async def test_requests_of_the_coordinators_last_life_are_refused(tmp_path: Path) -> None:
    """Attack: send a captured request again after the coordinator has restarted.

    It has forgotten the nonces, but not when it started.
    """
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            machine = enroll(fleet.hub, "box")
            captured = ours(machine, "GET", ENROLLMENT_STATUS_PATH)
        async with fleet.up():
            with client(fleet) as http:
                late = await asyncio.to_thread(http.get, ENROLLMENT_STATUS_PATH, headers=captured)
                fresh = ours(machine, "GET", ENROLLMENT_STATUS_PATH)
                now = await asyncio.to_thread(http.get, ENROLLMENT_STATUS_PATH, headers=fresh)
        assert (late.status_code, now.status_code) == (401, 200)
    finally:
        await fleet.close()


@pytest.mark.attack("20.wire", by="peer")
def test_one_who_spends_all_its_nonces_shuts_out_nobody_else() -> None:
    """Attack: use up all nonces, so that others are refused."""
    nonces = signed_requests.NonceCache(limit=1000)
    now = time.time()
    assert sum(nonces.use("rogue", str(number), now) for number in range(5000)) == 1000
    assert nonces.use("ada", "0", now)


# --- updates and claims ----------------------------------------------------------------------


def counted(fleet: Fleet, run_id: str) -> list[tuple[int, str]]:
    """Round and peer of each update in the ledger that counts (not evaluations)."""
    accepted = fleet.facts(run_id, run_events.UpdateAccepted)
    return [(fact.round, fact.peer) for fact in accepted if fact.update.digest]


@pytest.mark.attack("20.wire", by="peer")
async def test_an_update_sent_again_counts_no_second_time(tmp_path: Path) -> None:
    """Attack: send one update several times: at once, after the round, and in the next one."""
    datas = [some_data(20 + 10 * seed, seed) for seed in range(2)]
    async with fleet_of(tmp_path, *datas) as fleet:
        plain_run = await fleet.finished(fleet.start(rounds=3, quorum=2))
        rogue = fleet.agents[0]
        honest = rogue.answer
        first: list[tuple[bytes, bytes]] = []
        statuses: list[int] = []

        def answer(message: Message) -> Message:
            reply = honest(message)
            record = reply.content.config_records[CLAIM]
            claim = SIGNED_CLAIM.decode(record["claim"])  # type: ignore[arg-type]
            if claim.kind != "train":
                return reply
            if claim.round == 2:  # the claim of round 1, with its good signature
                payload, signature = first[0]
                old = ConfigRecord({"claim": payload, "signature": signature})
                return Message(RecordDict({CLAIM: old}), reply_to=message)
            if claim.round == 1:
                first.append((record["claim"], record["signature"]))  # type: ignore[arg-type]
            body = msgspec.msgpack.encode(PollRequest(reply=pack_message(reply), wants_work=False))
            with client(fleet) as http:
                for _ in range(5):
                    sent = http.post(
                        POLL_PATH,
                        content=body,
                        headers=ours(rogue.machine, "POST", POLL_PATH, body),
                    )
                    statuses.append(sent.status_code)
            return reply

        rogue.answer = answer  # type: ignore[method-assign]
        run_id = fleet.start(rounds=3, quorum=1)
        run = await fleet.finished(run_id)
        both, other = sorted(a.peer for a in fleet.agents), fleet.agents[1].peer
        assert run.state is RunState.FINISHED
        assert sorted(counted(fleet, run_id)) == sorted(
            [(1, both[0]), (1, both[1]), (2, other), (3, both[0]), (3, both[1])]
        )
        assert fleet.refusals(run_id) == [(2, rogue.peer, "late")]
        assert run.history[0].digest == plain_run.history[0].digest
        assert set(statuses) <= {200, 400}
        assert len(statuses) == 10


@pytest.mark.attack("20.13", by="peer")
async def test_a_claim_for_another_fleet_does_not_count(tmp_path: Path) -> None:
    """Attack: a claim that was signed for another fleet, or as an older version signs them."""
    datas = [some_data(20 + 10 * seed, seed) for seed in range(2)]
    async with fleet_of(tmp_path, *datas) as fleet:
        rogue = fleet.agents[0]
        honest = rogue.answer
        names = {2: "another-fleet", 3: ""}

        def answer(message: Message) -> Message:
            reply = honest(message)
            record = reply.content.config_records[CLAIM]
            claim = SIGNED_CLAIM.decode(record["claim"])  # type: ignore[arg-type]
            assert claim.fleet == fleet.keys.fleet
            if claim.kind != "train" or claim.round not in names:
                return reply
            changed = msgspec.structs.replace(claim, fleet=names[claim.round])
            payload, signature = SIGNED_CLAIM.seal(changed, rogue.machine.sign_key.sign)
            other = ConfigRecord({"claim": payload, "signature": signature})
            return Message(RecordDict({CLAIM: other}), reply_to=message)

        rogue.answer = answer  # type: ignore[method-assign]
        run_id = fleet.start(rounds=4, quorum=1)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        counts = [number for number, peer in counted(fleet, run_id) if peer == rogue.peer]
        assert set(counts) == {1, 4}
        assert fleet.refusals(run_id) == [(number, rogue.peer, "another fleet") for number in names]


@pytest.mark.attack("20.wire", by="peer")
async def test_nobody_claims_anothers_update_or_answers_in_its_name(tmp_path: Path) -> None:
    """Attack: claim another's upload, send another's signed claim, answer for another's node."""
    datas = [some_data(20 + 10 * seed, seed) for seed in range(3)]
    async with fleet_of(tmp_path, *datas) as fleet:
        rogue, victim = fleet.agents[0], fleet.agents[1]
        honest, theirs = rogue.answer, victim.answer
        seen: dict[int, tuple[UpdateClaim, bytes, bytes]] = {}
        statuses: list[int] = []

        def overheard(message: Message) -> Message:
            reply = theirs(message)
            record = reply.content.config_records[CLAIM]
            claim = SIGNED_CLAIM.decode(record["claim"])  # type: ignore[arg-type]
            if claim.kind == "train":
                seen[claim.round] = (claim, record["claim"], record["signature"])  # type: ignore[assignment]
            return reply

        def answer(message: Message) -> Message:
            reply = honest(message)
            record = reply.content.config_records[CLAIM]
            mine = SIGNED_CLAIM.decode(record["claim"])  # type: ignore[arg-type]
            if mine.kind != "train":
                return reply
            end = time.monotonic() + 30
            while mine.round not in seen and time.monotonic() < end:
                rogue._stopping.wait(0.01)
            claim, payload, signature = seen[mine.round]
            if mine.round == 1:  # its digest, signed by me
                payload, signature = SIGNED_CLAIM.seal(
                    msgspec.structs.replace(mine, digest=claim.digest), rogue.machine.sign_key.sign
                )
            elif mine.round == 3:  # its whole claim under my name
                payload, signature = SIGNED_CLAIM.seal(
                    msgspec.structs.replace(claim, peer=rogue.peer), rogue.machine.sign_key.sign
                )
            elif mine.round == 4:  # the reply itself in its node's name
                reply.metadata.__dict__["_src_node_id"] = fleet.hub._sessions.node_of(victim.peer)
                body = msgspec.msgpack.encode(
                    PollRequest(reply=pack_message(reply), wants_work=False)
                )
                with client(fleet) as http:
                    sent = http.post(
                        POLL_PATH,
                        content=body,
                        headers=ours(rogue.machine, "POST", POLL_PATH, body),
                    )
                statuses.append(sent.status_code)
            stolen = ConfigRecord({"claim": payload, "signature": signature})
            return Message(RecordDict({CLAIM: stolen}), reply_to=message)

        victim.answer = overheard  # type: ignore[method-assign]
        rogue.answer = answer  # type: ignore[method-assign]
        run_id = fleet.start(rounds=4, quorum=2)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert statuses == [400]
        words = ["bad weights", "bad signature", "bad weights", "bad signature"]
        assert fleet.refusals(run_id) == [(n, rogue.peer, w) for n, w in enumerate(words, 1)]
        others = sorted(agent.peer for agent in fleet.agents[1:])
        assert [sorted(closed.contributors) for closed in run.history] == [others] * 4
