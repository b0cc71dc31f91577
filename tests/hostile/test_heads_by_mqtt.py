"""Agents tell each other by MQTT what they have seen of the coordinator's log."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.transport import mqtt_heads
from agent.transport.followed_log import Witnesses
from agent.transport.mqtt_client import MqttClient
from agent.transport.mqtt_heads import HeadExchange
from coordinator.transport.mqtt_access import Login
from coordinator.transport.mqtt_broker import EmbeddedBroker
from protocols.enrollment import identity
from protocols.errors import BadMessage
from protocols.messages import topics
from protocols.messages.version_log import MAX_SEEN_BYTES
from protocols.p2p import seen_heads
from protocols.p2p.seen_heads import SeenHead
from tests.hostile.test_broker_logins import is_cut_after, subscribed
from tests.hostile.test_forked_log import Scene, forked, scene
from tests.support.mqtt_fleet import Site, rogue, running, started
from tests.support.version_logs import Follower
from tests.support.waiting import until

__all__ = ["scene"]
OTHER = "ABCD-EFGH-IJKL-MNOP"


def _statement(peer: str, at: float | None = None) -> bytes:
    """A statement with an invalid signature, which this module does not verify."""
    seen = SeenHead(peer, time.time() if at is None else at, b"head")
    return seen_heads.sign(seen, b"certificate", lambda signed: bytes(64))


def _exchange(taken: list[bytes], peer: str = OTHER, *pinned: str) -> HeadExchange:
    return HeadExchange("f" * 16, peer, lambda: b"own", taken.append, lambda: pinned)


@asynccontextmanager
async def _by_mqtt(
    site: Site, scene: Scene, broker: EmbeddedBroker, *agents: Follower
) -> AsyncIterator[None]:
    """Connect agents to the broker, with nothing else between them."""
    links = []
    for agent in agents:
        broker.admit(agent.machine.peer, "agent")
        heads = HeadExchange(
            site.fleet,
            agent.machine.peer,
            agent.log.to_publish,
            agent.log.offer,
            lambda agent=agent: agent.witnesses.peers,  # type: ignore[misc]
        )
        links.append(
            MqttClient(
                site.login(broker, agent.machine.peer),
                site.fleet,
                agent.machine.peer,
                agent.machine.sign_key.sign,
                scene.authority.public,
                lambda command: None,
                lambda up, why: None,
                heads,
            )
        )
    async with running(*(link.run for link in links)):
        yield


@pytest.fixture
def site(tmp_path: Path, scene: Scene) -> Site:
    made = Site(tmp_path)
    made.fleet = scene.authority.fleet
    return made


@pytest.mark.attack("20.11")
async def test_peers_that_the_coordinator_keeps_apart_meet_at_the_broker(
    site: Site, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: show two peers different versions, pass on no heads, and name no neighbors."""
    monkeypatch.setattr(mqtt_heads, "DRAW_EVERY_S", 0.02)
    ada, bob = forked(scene)
    eve = scene.agent("eve")
    eve.train(3)
    async with started(site) as broker, _by_mqtt(site, scene, broker, ada, bob, eve):
        for agent in (ada, bob, eve):
            await until(lambda agent=agent: agent.log.has_waiting)  # type: ignore[misc]
            agent.log.process()
        await until(lambda: bool(ada.log.process() or ada.forks))
        await until(lambda: bool(bob.log.process() or bob.forks))
    assert "two logs that differ" in ada.forks[0]
    assert not eve.forks or "two logs" in eve.forks[0]


@pytest.mark.attack("20.11")
async def test_a_witness_is_read_by_name(
    site: Site, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a pinned witness is heard in a fleet of any size, whatever is passed on."""
    monkeypatch.setattr(mqtt_heads, "DRAW_EVERY_S", 0.02)
    monkeypatch.setattr(topics, "HEAD_STEPS", 0)  # none by chance
    ada, bob, eve = (scene.agent(name) for name in ("ada", "bob", "eve"))
    for agent in (ada, bob, eve):
        agent.train(3)
    ada.witnesses = Witnesses(1, (bob.machine.peer,))
    assert ada.log.missing_witnesses()
    async with started(site) as broker, _by_mqtt(site, scene, broker, ada, bob, eve):
        await until(lambda: bool(ada.log.process() or not ada.log.missing_witnesses()))
    assert not eve.log.has_waiting
    assert not bob.log.has_waiting


@pytest.mark.attack("20.11", by="peer")
async def test_an_agent_publishes_its_own_small_head_only(site: Site) -> None:
    """Attack: publish huge heads, those of other peers or groups; read other topics as heads."""
    fleet, own = site.fleet, site.peer
    login = Login(own, "agent", "")
    assert not login.may_publish(fleet, topics.head(fleet, own), retain=True, nbytes=4000)
    async with started(site) as broker:
        address = site.login(broker)
        good = topics.head(fleet, own)
        assert not await is_cut_after(address, (good, b"x" * MAX_SEEN_BYTES, True))
        for topic, payload in (
            (good, b"x" * (MAX_SEEN_BYTES + 1)),
            (topics.head(fleet, OTHER), b"x"),
            (f"cw/{fleet}/head/Z/Z/{own}", b"x"),
            (f"cw/{fleet}/head/{own}", b"x"),
            (good + "/x", b"x"),
            (topics.head("0" * 16, own), b"x"),
        ):
            assert await is_cut_after(address, (topic, payload, True)), topic
        async with rogue(address) as client:
            for step in range(topics.HEAD_STEPS):
                filters = topics.head_filters(fleet, step, random.Random(step))
                for start in range(0, len(filters), 16):
                    assert await subscribed(client, [(f, 0) for f in filters[start : start + 16]])  # type: ignore[arg-type]
            for strange in (
                f"cw/{fleet}/head/#",
                f"cw/{fleet}/+/+/+/+",
                f"cw/{fleet}/head/+/A/+",
                f"cw/{fleet}/head/A/B/{OTHER}x",
                topics.all_heads("0" * 16),
                f"$share/x/{topics.all_heads(fleet)}",
            ):
                assert not await subscribed(client, strange), strange
        broker.admit("monitor", "monitor")
        async with rogue(site.login(broker, "monitor")) as client:
            assert not await subscribed(client, topics.all_heads(fleet))


@pytest.mark.attack("20.11", by="broker")
def test_a_flood_of_heads_costs_an_agent_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: flood an agent with heads: huge, of other peers, and on invalid topics."""
    taken: list[bytes] = []
    heads = _exchange(taken)
    peers = [identity.peer_id(bytes([i // 256, i % 256]) * 16) for i in range(5000)]
    clock = [1000.0]
    monkeypatch.setattr(mqtt_heads.time, "monotonic", lambda: clock[0])
    for _ in range(100):
        heads.receive(topics.head("f" * 16, peers[0]), _statement(peers[0]))
    assert len(taken) == 1, "one of a peer at a time"
    for peer in peers:
        heads.receive(topics.head("f" * 16, peer), _statement(peer))
    assert len(taken) == mqtt_heads.MAX_IN_INTERVAL
    for second, peer in enumerate(peers):
        clock[0] = 2000.0 + 10 * second
        heads.receive(topics.head("f" * 16, peer), _statement(peer))
    assert len(heads._read_at) <= 4096
    assert len(heads._stated_at) <= 4096
    taken.clear()
    ours, mine = topics.head("f" * 16, peers[1]), topics.head("f" * 16, OTHER)
    for topic, payload in (
        (ours, bytes(MAX_SEEN_BYTES + 1)),
        (ours, "text"),
        (ours, b"\xff"),
        (ours, b"\x92\xc4\x00\xc4\x00"),
        (ours, _statement(peers[2])),
        (topics.head("0" * 16, peers[1]), _statement(peers[1])),
        (topics.presence("f" * 16, peers[1]), _statement(peers[1])),
        ("spam", b""),
    ):
        with pytest.raises(BadMessage):
            heads.receive(topic, payload)
    heads.receive(mine, _statement(OTHER))
    heads.receive(ours, b"")
    assert not taken


@pytest.mark.attack("20.11", by="peer")
def test_a_fleet_of_2000_reads_a_few_heads_each() -> None:
    """Attack: make 2,000 agents send their heads to all 2,000."""
    peers = [identity.peer_id(i.to_bytes(2) * 16) for i in range(2000)]
    topic_of = {peer: topics.head("f" * 16, peer) for peer in peers}
    read = []
    for peer in peers[:200]:
        heads, now, filters = _exchange([], peer), 0.0, list[str]()
        while new := heads.new_filters(now):
            now += mqtt_heads.DRAW_EVERY_S
            filters += new
            for other, topic in topic_of.items():
                if any(topic.startswith(one.rstrip("/+") + "/") for one in new):
                    heads.receive(topic, _statement(other))
        read.append(len(heads._stated_at))
    assert min(read) >= mqtt_heads.MIN_HEARD
    assert sum(read) / len(read) < 12
