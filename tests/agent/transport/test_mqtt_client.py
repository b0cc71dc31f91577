"""The agent's link: whom it obeys, what it keeps while it is down, how it says that it is down."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiomqtt
import pytest
from msgspec.structs import replace

from agent.transport import mqtt_heads
from agent.transport.mqtt_client import MAX_NOTICES, PRESENCE_EVERY_S, TELEMETRY_EVERY_S
from agent.transport.mqtt_heads import HeadExchange
from protocols.enrollment import identity
from protocols.errors import HomeError
from protocols.messages import topics
from protocols.messages.envelope import (
    Body,
    Command,
    Doorbell,
    Envelope,
    Notice,
    Presence,
    Sign,
    Telemetry,
    seal,
)
from protocols.messages.mqtt import SequencedSigner
from protocols.messages.states import PeerState
from protocols.p2p import seen_heads
from protocols.p2p.seen_heads import SeenHead
from tests.support.mqtt_fleet import IDLE, Agent, Site, Watch, rogue, running, started
from tests.support.waiting import until

PAUSE = Command(action="pause")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


class Stage:
    """An agent that is up, and a rogue with the fleet's password."""

    def __init__(self, site: Site, agent: Agent, rogue: aiomqtt.Client) -> None:
        self.site, self.agent, self.rogue = site, agent, rogue
        self.topic = topics.command(site.fleet, site.peer)

    async def send(self, payload: bytes) -> None:
        await self.rogue.publish(self.topic, payload, qos=1)

    def sealed(
        self,
        body: Body,
        sender: str = topics.COORDINATOR,
        sign: Sign | None = None,
        topic: str = "",
        seq: int = 0,
        late_s: float = 0.0,
    ) -> bytes:
        envelope = Envelope(sender=sender, epoch="e", seq=seq, at=time.time() - late_s, body=body)
        return seal(topic or self.topic, envelope, sign or self.site.coordinator_key.sign)


@pytest.fixture
async def stage(site: Site) -> AsyncIterator[Stage]:
    async with started(site) as broker:
        agent = Agent(site, site.login(broker))
        async with running(agent.link.run), rogue(site.address(broker)) as client:
            await until(lambda: agent.link.connected)
            yield Stage(site, agent, client)


async def test_forged_commands_are_not_obeyed(stage: Stage) -> None:
    thief, site = identity.new_signing_key(), stage.site
    elsewhere = topics.command(site.fleet, "AAAA-AAAA-AAAA-AAAA")
    forged = [
        stage.sealed(PAUSE, sign=thief.sign),
        stage.sealed(Doorbell(), sign=thief.sign),
        stage.sealed(PAUSE, sender=site.peer, sign=site.agent_key.sign),
        stage.sealed(PAUSE, topic=elsewhere),  # the coordinator's, but for another peer
        stage.sealed(IDLE),  # the coordinator's, but no command
        stage.sealed(PAUSE, late_s=600),
        stage.sealed(PAUSE, late_s=-600),
    ]
    for payload in forged:
        await stage.send(payload)
    await until(lambda: stage.agent.link.rejected == len(forged))
    assert stage.agent.told == []
    assert "-600 s" in stage.agent.link.rejected_why
    await stage.send(stage.sealed(PAUSE, seq=1))
    await until(lambda: stage.agent.told == [PAUSE])


async def test_a_replayed_command_is_obeyed_once(stage: Stage, site: Site) -> None:
    agent = stage.agent
    coordinator = SequencedSigner(topics.COORDINATOR, site.coordinator_key.sign)
    first, second = (coordinator.seal(stage.topic, Command(action=a)) for a in ("pause", "resume"))
    for payload in (first, second, first, second, first):
        await stage.send(payload)
    await until(lambda: agent.link.rejected == 3)
    assert agent.told == [Command(action="pause"), Command(action="resume")]
    again = SequencedSigner(
        topics.COORDINATOR, site.coordinator_key.sign
    )  # a restarted coordinator
    await stage.send(again.seal(stage.topic, PAUSE))
    await stage.send(first)
    await until(lambda: agent.link.rejected == 4)
    assert len(agent.told) == 3


async def test_a_command_of_its_last_life_is_not_obeyed(stage: Stage, site: Site) -> None:
    """A restarted agent has forgotten which commands it heard; the broker need not have."""
    captured = stage.sealed(PAUSE, seq=3)
    await stage.send(captured)
    await until(lambda: stage.agent.told == [PAUSE])
    again = Agent(site, stage.agent.link._address)
    async with running(again.link.run):
        await until(lambda: again.link.connected)
        await stage.send(captured)
        await until(lambda: again.link.rejected == 1)
        assert "before this agent's start" in again.link.rejected_why
        assert again.told == []
        await stage.send(stage.sealed(PAUSE, seq=4))
        await until(lambda: again.told == [PAUSE])


async def test_a_doorbell_rings_whatever_the_clocks_say(stage: Stage) -> None:
    await stage.send(stage.sealed(Doorbell(), late_s=86_400))
    await until(lambda: stage.agent.told == [Doorbell()])
    # A doorbell (QoS 0) may overtake a command (QoS 1): it does not make the command old.
    await stage.send(stage.sealed(Doorbell(), seq=9))
    await stage.send(stage.sealed(PAUSE, seq=8))
    await until(lambda: stage.agent.told == [Doorbell(), Doorbell(), PAUSE])
    assert stage.agent.link.rejected == 0


async def test_any_bytes_are_counted_and_ignored(stage: Stage) -> None:
    rng = random.Random(2)
    good = stage.sealed(PAUSE)
    sent = 0
    # In groups: beyond 64 waiting messages the newest are dropped.
    for group in range(1, 11):
        for _ in range(20):
            at = rng.randrange(len(good))
            cut, noise = good[:at] + b"\x00" + good[at + 1 :], rng.randbytes(rng.randrange(300))
            await stage.send(rng.choice([cut, noise]))
            sent += 1
        await until(lambda group=group: stage.agent.link.rejected == 20 * group)
    assert sent == 200
    assert stage.agent.told == []
    await stage.send(good)
    await until(lambda: stage.agent.told == [PAUSE])


async def test_a_flood_of_telemetry_sends_few_and_the_last(site: Site) -> None:
    async with started(site) as broker:
        watch, agent = Watch(site, site.address(broker)), Agent(site, site.login(broker))
        async with running(watch.feed.run, agent.link.run):
            await until(lambda: watch.feed.connected and agent.link.connected)
            began = time.monotonic()
            for step in range(1000):
                agent.link.telemetry(Telemetry(step=step))
                if step % 100 == 0:
                    await until(lambda: True)
            last = Telemetry(step=999)
            await until(lambda: last in watch.bodies(Telemetry))
            took = time.monotonic() - began
        assert len(watch.heard) <= 2 + took / TELEMETRY_EVERY_S


async def test_a_flood_of_work_sends_few_presences_and_the_last(site: Site) -> None:
    async with started(site) as broker:
        watch, agent = Watch(site, site.address(broker)), Agent(site, site.login(broker))
        async with running(watch.feed.run, agent.link.run):
            await until(lambda: watch.feed.connected and agent.link.connected)
            began = time.monotonic()
            for number in range(1000):
                state = PeerState.TRAINING if number % 2 else PeerState.IDLE
                agent.link.set_presence(replace(IDLE, state=state, round=number))
                if number % 50 == 0:
                    await until(lambda: True)
            last = replace(IDLE, round=1000)
            agent.link.set_presence(last)
            await until(lambda: last in watch.bodies(Presence))
            paused = replace(IDLE, state=PeerState.PAUSED)
            agent.link.set_presence(paused)  # in the same quarter of a second
            await until(lambda: paused in watch.bodies(Presence))
            took = time.monotonic() - began
        assert len(watch.bodies(Presence)) <= 4 + took / PRESENCE_EVERY_S


async def test_little_is_kept_while_the_link_is_down(site: Site) -> None:
    broker = site.broker()
    await broker.start()
    watch, agent = Watch(site, site.address(broker)), Agent(site, site.login(broker))
    await broker.stop()
    async with running(agent.link.run):
        await until(lambda: agent.changes)
        for number in range(1000):
            agent.link.set_presence(replace(IDLE, round=number))
            agent.link.telemetry(Telemetry(step=number))
            agent.link.notice(Notice(level="info", text=str(number)))
    assert agent.changes == [(False, f"no broker listens at 127.0.0.1:{broker.port}")]
    await broker.start()
    try:
        async with running(watch.feed.run):
            await until(lambda: watch.feed.connected)
            async with running(agent.link.run):
                await until(lambda: len(watch.bodies(Notice)) == MAX_NOTICES)
        assert watch.bodies(Presence)[0] == replace(IDLE, round=999)
        assert watch.bodies(Notice)[-1] == Notice(level="info", text="999")
        assert watch.bodies(Telemetry) == []
    finally:
        await broker.stop()


async def test_a_refused_login_is_said_in_words(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocols.local.mqtt_connection.TIMEOUT_S", 1.0)
    async with started(site) as broker:
        address = site.login(broker)
        wrong = Agent(site, replace(address, password="wrong"))
        async with running(wrong.link.run):
            await until(lambda: wrong.changes)
        assert wrong.changes == [
            (False, f"{address.netloc} refused the MQTT login or does not answer")
        ]
        assert not wrong.link.connected
        stranger = Agent(site, replace(address, ca_pem=""))
        async with running(stranger.link.run):
            await until(lambda: stranger.changes)
        assert "certificate" in stranger.changes[0][1]


async def test_a_sign_of_life_is_given(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.transport.mqtt_client.PRESENCE_REFRESH_S", 0.1)
    async with started(site) as broker:
        watch, agent = Watch(site, site.address(broker)), Agent(site, site.login(broker))
        agent.link.set_presence(IDLE)
        async with running(watch.feed.run, agent.link.run):
            await until(lambda: len(watch.heard) >= 3)
    assert {one.epoch for one in watch.heard[:3]} == {watch.heard[0].epoch}


async def test_after_a_sleep_the_link_is_made_anew(stage: Stage) -> None:
    agent = stage.agent
    assert [up for up, _ in agent.changes] == [True]
    agent.link.reconnect()
    await until(lambda: [up for up, _ in agent.changes] == [True, False, True])
    await stage.send(stage.sealed(PAUSE))
    await until(lambda: agent.told == [PAUSE])


async def test_a_log_that_cannot_be_read_does_not_end_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is published is tried again; else the agent would end with its MQTT connection."""
    monkeypatch.setattr(mqtt_heads, "DRAW_EVERY_S", 0.01)
    peer = "ABCD-EFGH-IJKL-MNOP"
    tries: list[int] = []
    published: list[bytes] = []

    def own() -> bytes:
        tries.append(1)
        if len(tries) == 1:
            raise HomeError("log.db cannot be used: database is locked")
        return b"own"

    async def subscribe(filters: list[str]) -> bool:
        return True

    async def publish(topic: str, data: bytes) -> None:
        published.append(data)

    heads = HeadExchange("f" * 16, peer, own, lambda data: None, tuple)
    async with running(lambda: heads.run(subscribe, publish)):
        await until(lambda: published == [b"own"])


def test_statements_of_the_future_do_not_keep_an_agent_from_more_peers() -> None:
    """A peer whose clock is wrong can show nothing, so others are drawn in its place."""
    fleet, now = "f" * 16, time.time()
    heads = HeadExchange(fleet, "ABCD-EFGH-IJKL-MNOP", bytes, lambda data: None, tuple)

    def hear(at: float) -> None:
        for letter in "ABCD":
            peer = f"{letter * 4}-QQQQ"
            data = seen_heads.sign(SeenHead(peer, at, b"head"), b"", lambda signed: bytes(64))
            heads.receive(topics.head(fleet, peer), data)

    assert heads.new_filters(0.0)
    hear(now + 1e6)
    assert heads.new_filters(100.0)
    heads._read_at.clear()
    hear(now)
    assert not heads.new_filters(200.0)
