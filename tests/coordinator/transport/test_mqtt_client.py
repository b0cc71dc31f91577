"""Feed and agents over the real broker: what gets through, what does not, and what comes back."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import aiomqtt
import psutil
import pytest

from coordinator.transport.mqtt_client import _IncomingQueue
from protocols.enrollment import identity
from protocols.errors import BadMessage
from protocols.local.atomic_files import write_private
from protocols.messages import topics
from protocols.messages.envelope import (
    MAX_PAYLOAD_BYTES,
    Body,
    Command,
    Doorbell,
    Envelope,
    EventLine,
    Links,
    Notice,
    Presence,
    RoundClosed,
    Telemetry,
    seal,
)
from protocols.messages.mqtt import MqttAddress, SequencedSigner
from protocols.messages.states import PeerState
from tests.support.mqtt_fleet import IDLE, Agent, Site, Watch, rogue, running, started
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def test_presence_telemetry_and_notices_arrive_and_a_clean_stop_says_so(site: Site) -> None:
    async with started(site) as broker:
        watch, agent = Watch(site, site.address(broker)), Agent(site, site.login(broker))
        agent.link.set_presence(IDLE)
        agent.link.notice(Notice(level="info", text="hello \x1b[31m"))
        async with running(watch.feed.run):
            await until(lambda: watch.feed.connected)
            async with running(agent.link.run):
                await until(lambda: agent.link.connected and len(watch.heard) == 2)
                agent.link.telemetry(Telemetry(step=3))
                await until(lambda: len(watch.heard) == 3)
            await until(lambda: len(watch.heard) == 4)
        assert watch.kinds == ["presence", "notice", "telemetry", "presence"]
        assert [one.seq for one in watch.heard] == [1, 2, 3, 4]  # 0 is the will, unspoken
        assert len({one.epoch for one in watch.heard}) == 1
        assert watch.heard[1].body == Notice(level="info", text="hello ·[31m")
        last = watch.heard[3].body
        assert last == Presence(state=PeerState.OFFLINE, reason="stopped", name="box")
        assert watch.refused == []
        late = Watch(site, site.address(broker))  # the last word is retained
        async with running(late.feed.run):
            await until(lambda: late.heard)
        assert late.heard[0].body == last


_AGENT = """
import asyncio, json, sys
import msgspec
from agent.transport.mqtt_client import MqttClient
from protocols.enrollment.identity import load_signing_key
from protocols.messages.envelope import (Presence)
from protocols.messages.mqtt import MqttAddress
from protocols.messages.states import PeerState
from pathlib import Path

async def main():
    address, fleet, peer, key = json.loads(sys.stdin.readline())
    link = MqttClient(
        msgspec.convert(address, MqttAddress), fleet, peer, load_signing_key(Path(key)).sign,
        bytes(32), lambda _: None, lambda *_: None,
    )
    link.set_presence(Presence(state=PeerState.TRAINING, name="box", run="r1", round=3))
    await link.run()

asyncio.run(main())
"""


async def test_the_will_of_a_killed_agent_arrives_signed(site: Site) -> None:
    key = site.folder / "agent.key"
    write_private(key, identity.private_pem(site.agent_key))
    async with started(site) as broker:
        address = site.address(broker)
        watch = Watch(site, address)
        async with running(watch.feed.run):
            await until(lambda: watch.feed.connected)
            with subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-c", _AGENT], stdin=subprocess.PIPE, cwd=ROOT, text=True
            ) as agent:
                assert agent.stdin is not None
                fields = {name: getattr(address, name) for name in address.__struct_fields__}
                line = json.dumps([fields, site.fleet, site.peer, str(key)])
                agent.stdin.write(line + "\n")
                agent.stdin.flush()
                await until(lambda: watch.heard)
                agent.kill()
            await until(lambda: len(watch.heard) == 2)
        alive, will = watch.heard
        assert isinstance(alive.body, Presence)
        assert alive.body.state is PeerState.TRAINING
        assert isinstance(will.body, Presence)
        assert will.body.will
        assert will.body.state is PeerState.OFFLINE
        assert will.body.reason == "connection lost"
        assert will.epoch == alive.epoch
        assert watch.refused == []


async def test_both_links_come_back_after_the_broker_was_killed(site: Site) -> None:
    async with started(site) as broker:
        watch = Watch(site, site.address(broker), sign=site.coordinator_key.sign)
        agent = Agent(site, site.login(broker))
        agent.link.set_presence(IDLE)
        async with running(
            lambda: broker.supervise(lambda *_: None), watch.feed.run, agent.link.run
        ):
            await until(lambda: watch.heard and agent.link.connected)
            assert broker.pid is not None
            psutil.Process(broker.pid).kill()
            await until(lambda: not (watch.feed.connected or agent.link.connected))
            assert not await watch.feed.ring_doorbell(site.peer)
            before = len(watch.heard)
            await until(lambda: watch.feed.connected and agent.link.connected)
            await until(lambda: len(watch.heard) > before)  # nobody asked: it was said again
            assert watch.heard[-1].body == IDLE
            assert watch.heard[-1].epoch != watch.heard[0].epoch
            assert await watch.feed.ring_doorbell(site.peer)
            await until(lambda: Doorbell() in agent.told)
        for changes in (watch.changes, agent.changes):
            assert changes[0] == changes[-1] == (True, "")
            assert "lost" in changes[1][1]
            assert all(one != two for one, two in itertools.pairwise(changes))


@asynccontextmanager
async def _watched(site: Site, **options: object):  # type: ignore[no-untyped-def]
    async with started(site) as broker:
        watch = Watch(site, site.address(broker), **options)
        async with running(watch.feed.run), rogue(site.address(broker)) as client:
            await until(lambda: watch.feed.connected)
            yield watch, client


async def test_forged_and_misplaced_messages_are_counted_not_heard(site: Site) -> None:
    other_key = identity.new_signing_key()
    other = identity.peer_id(identity.public_bytes(other_key))
    site.known[other] = identity.public_bytes(other_key)
    mine, theirs = topics.presence(site.fleet, site.peer), topics.presence(site.fleet, other)
    event = topics.event(site.fleet)
    notice = topics.notice(site.fleet, site.peer)
    happened = EventLine(level="info", text="x")

    def forge(topic: str, sender: str, body: Body, signed_for: str = "") -> tuple[str, bytes]:
        envelope = Envelope(sender=sender, epoch="e", seq=1, at=0.0, body=body)
        return topic, seal(signed_for or topic, envelope, other_key.sign)

    forged = [
        forge(mine, site.peer, IDLE),  # in another's name
        forge(mine, other, IDLE),  # own name, another's topic
        forge(theirs, other, IDLE, signed_for=mine),  # signed for another topic
        forge(theirs, other, Telemetry()),  # telemetry in place of presence
        forge(theirs, other, happened),  # the coordinator's words
        forge(event, topics.COORDINATOR, happened),
        forge(event, other, happened),
        forge(notice, topics.COORDINATOR, Notice(level="info", text="x")),
        (mine, b"x" * (MAX_PAYLOAD_BYTES + 1)),
    ]
    async with _watched(site, listen_to_coordinator=True) as (watch, client):
        for topic, payload in forged:
            await client.publish(topic, payload, qos=1)
        await client.publish(mine, b"", retain=True)  # cleared: neither heard nor refused
        await client.publish(*forge(theirs, other, IDLE))  # and a good one at last
        await until(lambda: len(watch.refused) == len(forged) and watch.heard)
        assert [one.sender for one in watch.heard] == [other]
        assert sorted(topic for topic, _ in watch.refused) == sorted(topic for topic, _ in forged)
        assert all(isinstance(why, BadMessage) for _, why in watch.refused)


async def test_any_bytes_are_counted_and_ignored(site: Site) -> None:
    rng = random.Random(1)
    good = SequencedSigner(site.peer, site.agent_key.sign)
    topic = topics.presence(site.fleet, site.peer)
    payload = good.seal(topic, IDLE)
    bad = [rng.randbytes(rng.randrange(1, 400)) for _ in range(100)]
    for _ in range(100):  # one byte of a good message changed, or its end cut off
        at = rng.randrange(len(payload))
        changed = bytes([payload[at] ^ (1 << rng.randrange(8))])
        bad.append(payload[:at] + (changed + payload[at + 1 :] if rng.random() < 0.8 else b"."))
    async with _watched(site) as (watch, client):
        for one in bad:
            await client.publish(topic, one, qos=1)
        await client.publish(topic, payload, qos=1)
        await until(lambda: watch.heard)
        await until(lambda: len(watch.refused) >= len(bad))
        assert len(watch.refused) == len(bad)
        assert len(watch.heard) == 1


async def test_more_retained_presences_than_a_qos_1_subscription_gets(site: Site) -> None:
    keys = [identity.new_signing_key() for _ in range(300)]
    peers = [identity.peer_id(identity.public_bytes(key)) for key in keys]
    site.known |= {peer: identity.public_bytes(key) for peer, key in zip(peers, keys, strict=True)}
    async with started(site) as broker:
        async with rogue(site.address(broker)) as client:
            for peer, key in zip(peers, keys, strict=True):
                topic = topics.presence(site.fleet, peer)
                await client.publish(
                    topic, SequencedSigner(peer, key.sign).seal(topic, IDLE), 1, True
                )
        watch = Watch(site, site.address(broker))
        async with running(watch.feed.run):
            await until(lambda: len(watch.heard) == 300)
    assert {one.sender for one in watch.heard} == set(peers)


async def test_monitors_hear_events_without_gaps_in_their_numbers(site: Site) -> None:
    async with started(site) as broker:
        address = site.address(broker)
        coordinator = Watch(site, address, sign=site.coordinator_key.sign)
        monitor = Watch(site, address, listen_to_coordinator=True)
        norms = {identity.peer_id(bytes([n % 256, n // 256])): 1.0 for n in range(1000)}
        large = RoundClosed(run="r", round=1, digest="0" * 64, seconds=1.0, peers=1, norms=norms)
        async with running(coordinator.feed.run, monitor.feed.run):
            await until(lambda: coordinator.feed.connected and monitor.feed.connected)
            assert await coordinator.tell(Links(mqtt=True, flower=True))
            assert await coordinator.feed.ring_doorbell(site.peer)
            assert await coordinator.feed.send_to(site.peer, Command(action="pause"))
            assert await coordinator.tell(large)
            await until(lambda: len(monitor.heard) == 2)
        assert [one.seq for one in monitor.heard] == [0, 1]
        assert monitor.kinds == ["event", "event"]
        closed = monitor.heard[1].body
        assert isinstance(closed, RoundClosed)
        assert closed.norms == {}
        assert coordinator.heard == []
        assert monitor.refused == []


async def test_a_removed_peer_is_forgotten(site: Site) -> None:
    async with started(site) as broker:
        watch = Watch(site, site.address(broker), sign=site.coordinator_key.sign)
        agent = Agent(site, site.login(broker))
        agent.link.set_presence(IDLE)
        async with running(watch.feed.run):
            async with running(agent.link.run):
                await until(lambda: watch.heard)
            assert await watch.feed.clear_presence(site.peer)
        late = Watch(site, site.address(broker), sign=site.coordinator_key.sign)
        async with running(late.feed.run):
            await until(lambda: late.feed.connected)
            # Retained messages come before whatever is published after the subscription.
            async with rogue(site.address(broker)) as client:
                await client.publish(topics.presence(site.fleet, site.peer), b"mark", qos=1)
            await until(lambda: late.refused)
        assert late.heard == []


async def test_nothing_is_sent_while_down_too_large_or_without_a_key(site: Site) -> None:
    nobody = MqttAddress(host="127.0.0.1", port=9, tls=False)
    down = Watch(site, nobody, sign=site.coordinator_key.sign)
    assert not await down.feed.ring_doorbell(site.peer)
    assert not await down.feed.send_to(site.peer, Command(action="pause"))
    assert not await down.tell(Links(mqtt=False, flower=False))
    assert not await down.feed.clear_presence(site.peer)
    with pytest.raises(RuntimeError):
        await Watch(site, nobody).feed.ring_doorbell(site.peer)
    async with running(down.feed.run):
        await until(lambda: down.changes)
    assert down.changes == [(False, "no broker listens at 127.0.0.1:9")]

    async with started(site) as broker:
        watch = Watch(site, site.address(broker), sign=site.coordinator_key.sign)
        async with running(watch.feed.run):
            await until(lambda: watch.feed.connected)
            large = EventLine(level="info", text="x" * MAX_PAYLOAD_BYTES)
            assert not await watch.tell(large)
            assert watch.feed.connected


def _message(payload: bytes) -> aiomqtt.Message:
    return aiomqtt.Message("t", payload, 0, False, 0, None)


@pytest.mark.parametrize(
    ("payload", "count", "most"),
    [(b"x" * 16_384, 5_000, 2048), (b"x", 20_500, 20_000)],
)
async def test_the_waiting_messages_are_bounded(payload: bytes, count: int, most: int) -> None:
    queue = _IncomingQueue()
    for number in range(count):
        queue.put_nowait(_message(b"%08d" % number + payload))
    assert queue.qsize() <= most
    dropped = count - queue.qsize()
    first = await asyncio.wait_for(queue.get(), 1)
    assert first.payload == b"%08d" % dropped + payload  # the oldest were dropped
    while queue.qsize():
        queue.get_nowait()
    queue.put_nowait(_message(payload))
    assert queue.qsize() == 1
