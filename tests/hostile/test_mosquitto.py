"""The same attacks on MQTT, with a real Mosquitto and the files that the coordinator writes."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiomqtt
import pytest
from msgspec.structs import replace

from coordinator.daemon.brokers import mqtt_passwords
from coordinator.daemon.coordinator import Coordinator
from coordinator.storage import settings
from coordinator.storage.settings import Settings
from coordinator.transport.mosquitto import MosquittoFiles
from protocols.enrollment import tickets
from protocols.errors import UsageError
from protocols.messages import topics
from protocols.messages.mqtt import MqttAddress, tls_context
from tests.support.fleet_harness import COORDINATOR, environment, run_program, two_free_ports
from tests.support.https_site import HOST, Machine
from tests.support.mosquitto import mosquitto, needs_mosquitto
from tests.support.mqtt_fleet import rogue
from tests.support.waiting import until

pytestmark = pytest.mark.attack("20.7")


def join(hub: Coordinator, name: str) -> Machine:
    machine = Machine(name)
    ticket = tickets.new_ticket(hub.addresses(), bytes(32))
    hub.registry.create_ticket(ticket, ttl_s=60, uses=1)
    hub.registry.join(machine.joining(ticket))
    return machine


@asynccontextmanager
async def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Coordinator]:
    """A coordinator with Mosquitto."""
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(folder / "home"))
    home, _ = settings.init([HOST])
    keys = settings.open_keys(home)
    port = two_free_ports()[0]
    chosen = Settings(host=HOST, port=0, mqtt_port=port, mqtt_mosquitto=str(folder / "mosquitto"))
    files = MosquittoFiles(folder / "mosquitto", keys.fleet, mqtt_passwords(keys))
    config = files.write_config(HOST, port, home / "server.pem", home / "server.key")
    files.write_empty()
    with mosquitto(config):
        hub = Coordinator(home, keys, chosen)
        ready = asyncio.Event()
        serving = asyncio.create_task(hub.serve(ready.set))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        try:
            await until(lambda: hub.fleet.links.mqtt)
            yield hub
        finally:
            waiting.cancel()
            hub.stop()
            await serving


async def logs_in(address: MqttAddress) -> bool:
    try:
        async with rogue(address):
            return True
    except aiomqtt.MqttError:
        return False


async def heard(client: aiomqtt.Client, for_s: float) -> list[str]:
    """The topics of the messages that arrive."""
    found: list[str] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(for_s):
            async for message in client.messages:
                found.append(message.topic.value)
    return found


@needs_mosquitto
@pytest.mark.attack("20.7")
async def test_mosquitto_keeps_each_member_to_its_own_topics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: over Mosquitto, an agent and an observer listen to all, and publish as others."""
    async with served(tmp_path, monkeypatch) as hub:
        fleet = hub.identity.fleet
        eve, ada = join(hub, "eve"), join(hub, "ada")
        logins = [hub.mqtt_for(HOST, user) for user in (eve.peer, ada.peer, "monitor-operator")]
        for login in logins:
            await until_logged_in(login)
        as_eve, as_ada, as_monitor = map(rogue, logins)
        async with as_eve, as_ada, as_monitor:
            for client in (as_eve, as_monitor):
                await client.subscribe([("#", 1), (f"cw/{fleet}/peer/+/command", 1)])
            await as_ada.subscribe(topics.command(fleet, ada.peer))
            await as_eve.subscribe(topics.head(fleet, ada.peer))
            for client in (as_eve, as_monitor):
                for topic in (
                    topics.presence(fleet, ada.peer),
                    topics.command(fleet, ada.peer),
                    topics.head(fleet, ada.peer),
                    topics.event(fleet),
                    "spam/1",
                ):
                    await client.publish(topic, b"forged", qos=1, retain=True)
            await as_monitor.publish(topics.presence(fleet, "monitor-operator"), b"x", retain=True)
            await as_ada.publish(topics.notice(fleet, ada.peer), b"genuine", qos=1)
            await as_ada.publish(topics.head(fleet, ada.peer), b"seen", qos=1, retain=True)
            hub._publisher.ring_doorbells([ada.peer])
            found = await asyncio.gather(*(heard(c, 2) for c in (as_eve, as_ada, as_monitor)))
        own = topics.command(fleet, ada.peer)
        assert found[:2] == [[topics.head(fleet, ada.peer)], [own]], "heads are for all agents"
        assert set(found[2]) <= {topics.notice(fleet, ada.peer), topics.event(fleet)}
        assert topics.notice(fleet, ada.peer) in found[2]


async def until_logged_in(address: MqttAddress) -> None:
    """Wait for the reload that follows a change."""
    end = time.monotonic() + 20
    while not await logs_in(address):
        assert time.monotonic() < end, "the login was not admitted"


@needs_mosquitto
@pytest.mark.attack("20.7")
async def test_mosquitto_cuts_off_a_removed_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: over Mosquitto, a removed agent stays connected and logs in again; a stranger too."""
    async with served(tmp_path, monkeypatch) as hub:
        bad, good = join(hub, "bad"), join(hub, "good")
        login, other = hub.mqtt_for(HOST, bad.peer), hub.mqtt_for(HOST, good.peer)
        await until_logged_in(login)
        await until_logged_in(other)
        for wrong in (
            replace(login, password=other.password),
            replace(login, user="", password=""),
            replace(login, user="coordinator"),
        ):
            assert not await logs_in(wrong)
        await until(lambda: hub.fleet.links.mqtt)
        will = aiomqtt.Will(topics.presence(hub.identity.fleet, bad.peer), b"gone", retain=True)
        client = aiomqtt.Client(
            login.host,
            login.port,
            username=login.user,
            password=login.password,
            tls_context=tls_context(login),
            will=will,
        )
        await client.__aenter__()
        await client.publish(will.topic, b"here", qos=1, retain=True)
        began = time.monotonic()
        hub.registry.remove(bad.peer, "a test")
        await until(client._disconnected.done, within_s=60)
        print(f"cut after {time.monotonic() - began:.1f} s")
        await asyncio.gather(client.__aexit__(None, None, None), return_exceptions=True)
        client._disconnected.exception()
        assert not await logs_in(login)
        assert await logs_in(other)
        async with rogue(hub._broker.own_address()) as inside:
            await inside.subscribe(topics.all_peers(hub.identity.fleet, "presence"))
            assert await heard(inside, 1) == [], "it keeps nothing of the removed agent"


@pytest.mark.attack("20.7", by="thief")
def test_the_command_writes_private_files_and_names_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: another account reads the passwords of Mosquitto in the files that we write."""
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    settings.init([HOST])
    folder = tmp_path / "broker"
    env = environment(tmp_path, COMMONWEIGHT_HOME=str(tmp_path / "home"))
    done = run_program([COORDINATOR, "mqtt", "mosquitto", str(folder)], env)
    told = done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    assert f"mosquitto -c {folder}/mosquitto.conf" in told
    assert f"commonweight up --mosquitto {folder}" in told
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == ["acl", "mosquitto.conf", "passwords"]
    if sys.platform != "win32":
        assert {path.stat().st_mode & 0o077 for path in [folder, *files]} == {0}
    password = mqtt_passwords(settings.open_keys(tmp_path / "home")).of("coordinator")
    assert not any(password in path.read_text() for path in files)


def test_two_brokers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: two brokers in the settings are refused."""
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="two brokers"):
        settings.read(mqtt_url="mqtts://x", mqtt_mosquitto="/somewhere")
