"""A member with all rights on the broker: it hears and sends all, with keys of its own.

It has no effect, because the broker is not trusted. What the broker's gate keeps a member from is
in `test_broker_logins`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from agent.home import enrollment_file
from agent.home.credentials import Credentials
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.mqtt_client import MqttClient
from coordinator.remote.api_client import Remote
from protocols.messages import topics
from protocols.messages.envelope import (
    Body,
    Command,
    Doorbell,
    EventLine,
    Notice,
    PeerChanged,
    Presence,
    RunChanged,
    Telemetry,
    seal,
)
from protocols.messages.mqtt import MqttAddress, SequencedSigner
from protocols.messages.states import PeerState, RunState
from tests.support.fleet_harness import Fleet, fleet
from tests.support.waiting import until as soon

pytestmark = pytest.mark.attack("20.7", by="broker")

FLOOD = 5000
IDLE = Presence(state=PeerState.IDLE, name="victim", tasks=("ping", "mnist"))
#: What of a peer's row only the peer itself may change.
KEPT = (
    *("peer", "name", "labels", "standing", "public_key", "state", "reason", "version", "task"),
    *("run", "round", "telemetry", "losses", "diverged", "epoch", "past_epochs"),
)


class Victim:
    """An enrolled agent's session and MQTT link in this process, under names that we can know."""

    def __init__(self, home: Path) -> None:
        self.enrollment = enrollment_file.read_enrollment(home)
        self.mine = Credentials.load(home, self.enrollment)
        self.link = CoordinatorClient(self.mine)
        self.obeyed: list[Doorbell | Command] = []
        self.mqtt = MqttClient(
            self.enrollment.mqtt,
            self.enrollment.fleet,
            self.enrollment.peer,
            self.mine.sign_key.sign,
            self.enrollment.coordinator_public,
            self.obeyed.append,
            lambda up, why: None,
        )
        self.mqtt.set_presence(IDLE)

    @property
    def peer(self) -> str:
        return self.enrollment.peer

    @asynccontextmanager
    async def online(self) -> AsyncIterator[None]:
        running = asyncio.create_task(self.mqtt.run())
        try:
            await soon(lambda: self.mqtt.connected)
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


class Rogue:
    """The coordinator's login, past the gate, and a voice of its own key in anybody's name."""

    def __init__(self, home: Path) -> None:
        self.enrollment = enrollment_file.read_enrollment(home)
        self.sign = Credentials.load(home, self.enrollment).sign_key.sign
        gate = json.loads((home.parent / "coordinator" / "broker" / "gate.json").read_bytes())
        self.address = MqttAddress(
            host="127.0.0.1",
            port=gate["broker_port"],
            tls=False,
            user=gate["broker_user"],
            password=gate["broker_password"],
        )
        self.captured: list[tuple[str, bytes]] = []

    def has_heard(self, words: bytes) -> bool:
        return any(words in payload for _, payload in self.captured)

    @asynccontextmanager
    async def connected(self, identifier: str | None = None) -> AsyncIterator[aiomqtt.Client]:
        address = self.address
        client = aiomqtt.Client(
            address.host,
            address.port,
            username=address.user,
            password=address.password,
            identifier=identifier,
            max_inflight_messages=100,
        )
        async with client:
            await client.subscribe("cw/#", qos=1)
            listening = asyncio.create_task(self._listen(client))
            try:
                yield client
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            assert isinstance(message.payload, bytes)
            self.captured.append((message.topic.value, message.payload))

    def forged(self, sender: str, topic: str, body: Body) -> bytes:
        return seal(topic, SequencedSigner(sender, self.sign).next_envelope(body), self.sign)


def told(site: Fleet) -> Any:
    """The coordinator's snapshot of its fleet."""
    remote = Remote(site.home)
    try:
        return remote.fleet()
    finally:
        remote.close()


def row(site: Fleet, peer: str) -> dict[str, Any]:
    return {name: getattr(told(site).peers[peer], name) for name in KEPT}


def events_of(site: Fleet) -> list[str]:
    """All that happened, but for the words on what was ignored."""
    return [event.text for event in told(site).events if "malformed" not in event.text]


async def row_when(
    site: Fleet, peer: str, what: str, condition: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    for _ in range(400):
        found = await asyncio.to_thread(row, site, peer)
        if condition(found):
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"never {what}: {found}")


async def rejected_is(site: Fleet, least: int) -> int:
    for _ in range(400):
        found = int((await asyncio.to_thread(told, site)).links.rejected)
        if found >= least:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"only {found} of {least} messages were counted as rejected")


@pytest.fixture
def site(tmp_path: Path) -> Any:
    with fleet(tmp_path) as made:
        made.up()
        made.join("victim", "eve")
        yield made


@pytest.mark.long
async def test_whatever_a_rogue_publishes_moves_nothing(site: Fleet, tmp_path: Path) -> None:
    """Attack: with all rights on the broker, replay, forge and mix up the messages of others."""
    victim, rogue = Victim(tmp_path / "victim"), Rogue(tmp_path / "eve")
    peer, here = victim.peer, rogue.enrollment.fleet
    await asyncio.to_thread(victim.link.open)
    async with rogue.connected() as client, victim.online():
        await row_when(site, peer, "idle", lambda r: r["state"] == "idle")
        # Genuine words, to be captured: a pause, its end, and what the victim says of itself.
        for action in ("pause", "resume"):
            await asyncio.to_thread(site.ask, "peers", action, "victim")
        await soon(lambda: len([c for c in victim.obeyed if isinstance(c, Command)]) == 2)
        victim.mqtt.set_presence(Presence(state=PeerState.PAUSED, reason="battery", name="victim"))
        await row_when(site, peer, "paused", lambda r: r["state"] == "paused")
        victim.mqtt.notice(Notice(level="error", text="genuine"))
        victim.mqtt.set_presence(IDLE)
        before = await row_when(site, peer, "idle again", lambda r: r["state"] == "idle")
        await asyncio.to_thread(site.join, "bob")
        await soon(lambda: any(topic == topics.event(here) for topic, _ in rogue.captured))
        events = await asyncio.to_thread(events_of, site)
        obeyed, refused = len(victim.obeyed), victim.mqtt.rejected
        captured = list(rogue.captured)
        assert {topics.parse(topic).kind for topic, _ in captured} >= {  # type: ignore[union-attr]
            "presence",
            "notice",
            "command",
            "event",
        }
        forgeries = forged_by(rogue, peer, here)
        for topic, payload in forgeries:
            await client.publish(topic, payload, qos=1)
        number = sum(
            topics.parse(t) is not None and topics.parse(t).kind in COUNTED for t, _ in forgeries
        )  # type: ignore[union-attr]
        count = await rejected_is(site, number)
        for _ in range(3):  # replays of all that was heard
            for topic, payload in captured:
                await client.publish(topic, payload, qos=1, retain=False)
        print(f"{len(forgeries)} forgeries, {3 * len(captured)} replays; {count} counted")
        sending = [
            client.publish(topics.telemetry(here, peer), os.urandom(200), qos=1)
            for _ in range(FLOOD)
        ]
        await asyncio.gather(*sending)
        count = await rejected_is(site, number + FLOOD * 9 // 10)
        print(f"a flood of {FLOOD}: {count} counted as rejected")
        assert await asyncio.to_thread(row, site, peer) == before
        now = await asyncio.to_thread(told, site)
        assert len(now.peers) == 3
        assert now.runs == {}
        assert await asyncio.to_thread(events_of, site) == events
        assert len(victim.obeyed) == obeyed, "no forged or replayed command is obeyed"
        assert victim.mqtt.rejected > refused
        assert victim.mqtt.connected
        assert await asyncio.to_thread(victim.link.pull) is None
    await asyncio.to_thread(victim.link.close)


COUNTED = ("presence", "telemetry", "notice")


def forged_by(rogue: Rogue, peer: str, here: str) -> list[tuple[str, bytes]]:
    """Words that are not the rogue's to say, in other names and in its own on others' topics."""
    mine = rogue.enrollment.peer
    gone = Presence(state=PeerState.OFFLINE, reason="forged", will=True)
    paused = Presence(state=PeerState.PAUSED, reason="forged", tasks=("forged",))
    bodies: list[tuple[Callable[[str, str], str], Body]] = [
        (topics.presence, paused),
        (topics.presence, gone),
        (topics.presence, Presence(state=PeerState.ERROR, reason="forged")),
        (topics.telemetry, Telemetry(run="forged", loss=float("1e9"))),
        (topics.notice, Notice(level="error", text="forged")),
    ]
    orders: list[Body] = [Command(action="pause"), Command(action="finish"), Doorbell()]
    made = []
    for topic_of, body in bodies:
        for sender in (peer, mine, topics.COORDINATOR):
            topic = topic_of(here, peer)
            made.append((topic, rogue.forged(sender, topic, body)))
            # Signed for its own topic, and sent on the victim's.
            made.append((topic, rogue.forged(sender, topic_of(here, mine), body)))
    for order in orders:
        for sender in (topics.COORDINATOR, peer, mine):
            topic = topics.command(here, peer)
            made.append((topic, rogue.forged(sender, topic, order)))
    known = PeerChanged(peer=peer, name="forged", enrollment="removed", public_key=bytes(32))
    run = RunChanged(
        run="forged", task="x", state=RunState.FAILED, round=1, rounds=1, quorum=1, head="forged"
    )
    for event in (known, run, EventLine(level="error", text="forged", subject=peer)):
        for sender in (topics.COORDINATOR, mine):
            for topic in (
                topics.event(here),
                topics.notice(here, peer),
                topics.presence(here, mine),
            ):
                made.append((topic, rogue.forged(sender, topic, event)))
    for spoofed in (
        f"cw/{here}/peer/{peer}/presence/",
        f"cw/{here}/peer/{peer.lower()}/presence",
        f"cw/{'0' * 16}/peer/{peer}/presence",
        f"cw/{here}/peer/../{peer}/presence",
        f"cw/{here}/peer/coordinator/presence",
        f"cw/{here}/peer//presence",
        "$SYS/cw",
    ):
        made.append((spoofed, rogue.forged(peer, topics.presence(here, peer), paused)))
    return made


async def test_old_sessions_cannot_be_played_again(site: Fleet, tmp_path: Path) -> None:
    """Attack: replay what an agent said in earlier sessions, also after a restart.

    Not even when more sessions have passed than anybody remembers.
    """
    victim, rogue = Victim(tmp_path / "victim"), Rogue(tmp_path / "eve")
    peer = victim.peer
    await asyncio.to_thread(victim.link.open)
    async with rogue.connected() as client:
        for number in range(12):
            former = Victim(tmp_path / "victim")
            reason = f"session {number}."
            former.mqtt.set_presence(Presence(state=PeerState.PAUSED, reason=reason))
            async with former.online():
                await soon(lambda said=reason.encode(): rogue.has_heard(said))
        # Each session said at least its presence and its farewell.
        said = topics.presence(victim.enrollment.fleet, peer)
        await soon(lambda: sum(topic == said for topic, _ in rogue.captured) >= 24)
        old = [(topic, payload) for topic, payload in rogue.captured if topic == said]
        async with victim.online():
            victim.mqtt.set_presence(IDLE)
            before = await row_when(site, peer, "idle", lambda r: r["state"] == "idle")
            for topic, payload in old:
                await client.publish(topic, payload, qos=1)
            await client.publish(old[0][0], b"a mark", qos=1)
            await rejected_is(site, 1)
            assert await asyncio.to_thread(row, site, peer) == before
            victim.mqtt.notice(Notice(level="info", text="still heard"))
            for _ in range(200):
                if "victim: still heard" in await asyncio.to_thread(events_of, site):
                    break
                await asyncio.sleep(0.05)
            else:
                raise AssertionError("the live session was silenced")
    await asyncio.to_thread(victim.link.close)


async def test_who_takes_over_a_client_id_takes_nobody_offline_for_good(
    site: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: take over an agent's client id on the broker, to keep it offline.

    Ids cannot be guessed. With one that was, the victim is thrown out, and is back at once.
    """
    named: list[str] = []
    real = secrets.token_hex

    def noted(nbytes: int | None = None) -> str:
        text = real(nbytes)
        if nbytes == 10:
            named.append(f"cw{text}")
        return text

    monkeypatch.setattr(secrets, "token_hex", noted)
    victim, rogue = Victim(tmp_path / "victim"), Rogue(tmp_path / "eve")
    await asyncio.to_thread(victim.link.open)
    async with victim.online():
        await row_when(site, victim.peer, "idle", lambda r: r["state"] == "idle")
        first = await asyncio.to_thread(row, site, victim.peer)
        for number in range(3):
            assert len(set(named)) == number + 1, "a new id for each session"
            digest = hashlib.sha256(named[-1].encode()).hexdigest()  # as the gate passes it on
            async with rogue.connected(identifier=f"{victim.peer}.{digest[:20]}"):
                await soon(lambda before=number + 1: len(named) > before)
                await soon(lambda: victim.mqtt.connected)
        last = await row_when(
            site,
            victim.peer,
            "idle in a new session",
            lambda r: r["state"] == "idle" and r["epoch"] != first["epoch"],
        )
        assert last["standing"] == "enrolled"
        # A will was sent each time: the peer has asked for work since, so it is given some.
        assert await asyncio.to_thread(victim.link.pull) is None
        run = site.start_run("ping", "--rounds", "1", "--quorum", "1")
        for _ in range(100):
            message = await asyncio.to_thread(victim.link.pull)
            if message is not None:
                break
            await asyncio.sleep(0.05)
        assert message is not None, "it is still given work"
        site.ask("run", "stop", run)
    await asyncio.to_thread(victim.link.close)
