"""Attacks on the embedded broker by strangers, agents, observers and removed ones."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiomqtt
import msgspec
import psutil
import pytest
from msgspec.structs import replace

from coordinator.daemon.coordinator import Coordinator
from coordinator.storage import settings
from coordinator.storage.settings import Settings
from coordinator.transport import gate_connection, mqtt_gate, mqtt_packets
from coordinator.transport.mqtt_packets import Connect, Will
from protocols.enrollment import identity, joining, signed_requests, tickets
from protocols.messages import topics
from protocols.messages.envelope import MAX_PAYLOAD_BYTES, Presence
from protocols.messages.mqtt import MqttAddress, tls_context
from protocols.messages.states import PeerState
from tests.hostile.tools import ours
from tests.support.https_site import HOST, Machine
from tests.support.mqtt_fleet import Agent, Site, Watch, rogue, running, started
from tests.support.waiting import until


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def _talk(address: MqttAddress, data: bytes, will: Will | None = None) -> bool | None:
    """Log in, send `data`, and ask for a sign of life: None if the login is refused, else whether
    the sign comes."""
    connect = Connect("x", 5, address.user, address.password.encode(), will)
    plain = socket.create_connection((address.host, address.port), timeout=20)
    context = tls_context(address)
    with context.wrap_socket(plain, server_hostname=HOST) if context else plain as sock:
        try:
            sock.sendall(mqtt_packets.encode_connect(connect))
            if sock.recv(4)[3:] != b"\0":
                return None
            sock.sendall(data + b"\xc0\0")
            received = b""
            while not received.endswith(b"\xd0\0"):
                piece = sock.recv(65536)
                if not piece:
                    return False
                received += piece
        except (ConnectionError, ssl.SSLError):
            return False
        sock.sendall(mqtt_packets.DISCONNECT_BYTES)
        return True


async def refused_login(address: MqttAddress, will: Will | None = None) -> bool:
    return await asyncio.to_thread(_talk, address, b"", will) is not True


async def are_known(*addresses: MqttAddress) -> None:
    """Wait until the broker has these logins: it hears of new members a moment later."""
    for address in addresses:
        for _ in range(400):
            if not await refused_login(address):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"the broker never admitted {address.user}")


async def is_cut_after(address: MqttAddress, *published: tuple[str, bytes, bool]) -> bool:
    """Whether the broker ends the connection after these messages (topic, payload, retain)."""
    data = b""
    for topic, payload, retain in published:
        body = len(topic.encode()).to_bytes(2) + topic.encode() + payload
        data += bytes([0x30 | retain]) + mqtt_packets._length(len(body)) + body
    answer = await asyncio.to_thread(_talk, address, data)
    assert answer is not None, "the login is good"
    return not answer


async def kept_topics(client: aiomqtt.Client) -> list[str]:
    """The topics of all messages that the broker keeps."""
    await client.subscribe("#")
    found: list[str] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            async for message in client.messages:
                if message.retain:  # the coordinator may tell of an event just now
                    found.append(message.topic.value)
    return found


async def subscribed(client: aiomqtt.Client, topic: str) -> bool:
    return not any(
        not isinstance(code, int) and code.is_failure for code in await client.subscribe(topic)
    )


@pytest.mark.attack("20.7")
async def test_an_agent_reads_and_sends_its_own_topics_only(site: Site) -> None:
    """Attack: an enrolled agent listens to all, and publishes as others and as the coordinator."""
    fleet, own, other = site.fleet, site.peer, "ABCD-EFGH-IJKL-MNOP"
    told: list[tuple[str, str]] = []
    async with started(site) as broker:
        broker.on_refused = lambda user, why: told.append((user, why))
        address = site.login(broker)
        async with rogue(address) as client:
            for topic in (
                "#",
                "cw/#",
                "+/+/+/+/+",
                "$SYS/#",
                f"cw/{fleet}/peer/+/command",
                f"cw/{fleet}/peer/+/presence",
                topics.command(fleet, other),
                topics.command(fleet, own) + "/#",
                topics.event(fleet),
                f"$share/x/{topics.command(fleet, other)}",
                topics.command("0" * 16, own),
            ):
                assert not await subscribed(client, topic), topic
            assert await subscribed(client, topics.command(fleet, own))
        for topic in (
            topics.presence(fleet, other),
            topics.command(fleet, other),
            topics.command(fleet, own),
            topics.event(fleet),
            topics.presence("0" * 16, own),
            topics.presence(fleet, own) + "/x",
            topics.presence(fleet, own).upper(),
            topics.presence(fleet, own.lower()),
            "spam/1",
            "$SYS/x",
        ):
            assert await is_cut_after(address, (topic, b"x", False)), topic
        for kept in (topics.telemetry(fleet, own), topics.notice(fleet, own)):
            assert await is_cut_after(address, (kept, b"x", True)), kept
            assert not await is_cut_after(address, (kept, b"x", False)), kept
        assert not await is_cut_after(address, (topics.presence(fleet, own), b"x", True))
        await until(lambda: len(told) == 2)
        assert {user for user, _ in told} == {own}, "once for each kind"


@pytest.mark.attack("20.7")
async def test_nobody_fills_the_broker_with_retained_messages(site: Site) -> None:
    """Attack: an agent leaves thousands of retained messages of 16 KB, which the broker keeps."""
    async with started(site) as broker:
        assert broker.pid is not None
        child = psutil.Process(broker.pid)
        assert await is_cut_after(site.login(broker), ("spam/first", b"x", True))
        before = child.memory_info().rss
        large = b"x" * MAX_PAYLOAD_BYTES
        for number in range(40):
            spam = [(f"spam/{number}/{n}", large, True) for n in range(50)]
            assert await is_cut_after(site.login(broker), *spam)
        own = topics.presence(site.fleet, site.peer)
        assert not await is_cut_after(site.login(broker), *[(own, large, True)] * 30)
        assert child.memory_info().rss - before < 25e6
        async with rogue(site.address(broker)) as inside:
            assert await kept_topics(inside) == [own]


@pytest.mark.attack("20.7", by="observer")
async def test_an_observer_publishes_nothing(site: Site) -> None:
    """Attack: an observer uses its login to publish, to leave a will, and to read commands."""
    async with started(site) as broker:
        address = site.login(broker, "monitor")
        for topic in (
            topics.presence(site.fleet, site.peer),
            topics.event(site.fleet),
            topics.command(site.fleet, site.peer),
            topics.presence(site.fleet, "monitor"),
        ):
            assert await is_cut_after(address, (topic, b"", True)), topic
        async with rogue(address) as client:
            assert not await subscribed(client, topics.command(site.fleet, site.peer))
            assert not await subscribed(client, f"cw/{site.fleet}/peer/+/command")
            assert await subscribed(client, topics.all_peers(site.fleet, "presence"))
            assert await subscribed(client, topics.event(site.fleet))
        will = Will(topics.presence(site.fleet, site.peer), b"x", 0, True)
        assert await refused_login(address, will)
        assert not await refused_login(address)


@pytest.mark.attack("20.7")
async def test_a_login_is_its_owners_alone(site: Site) -> None:
    """Attack: passwords of others, of earlier versions and of none, and other users' names."""
    async with started(site) as broker:
        own = site.login(broker)
        for user, password in (
            (site.peer, ""),
            (site.peer, "x" * 16_000),
            (site.peer.lower(), own.password),
            (site.peer + "\u200b", own.password),
            ("monitor", own.password),
            ("fleet", own.password),
            ("gate", own.password),
            ("", own.password),
            (site.peer, hashlib.sha256(own.password.encode()).hexdigest()),
        ):
            assert await refused_login(replace(own, user=user, password=password)), user
        assert not await refused_login(own)
        inner = site.address(broker)
        assert await refused_login(replace(own, user=inner.user, password=inner.password))
        assert await refused_login(replace(inner, password=own.password)), "past the gate"


@asynccontextmanager
async def idle_clients(site: Site, port: int) -> AsyncIterator[list[socket.socket]]:
    """Connections that send nothing, half a handshake, and no or half a CONNECT after it."""
    idle = [socket.create_connection((HOST, port)) for _ in range(50)]
    for sock in idle[:25]:
        sock.sendall(b"\x16\x03\x01")
    context = ssl.create_default_context(cadata=site.ca_pem)
    for number in range(10):
        plain = socket.create_connection((HOST, port))
        sock = await asyncio.to_thread(context.wrap_socket, plain, server_hostname=HOST)
        sock.sendall((b"", b"\x10", b"\x10\xff\xff\x01")[number % 3])
        idle.append(sock)
    try:
        yield idle
    finally:
        for sock in idle:
            sock.close()


@pytest.mark.attack("20.7", by="stranger")
async def test_idle_connections_keep_nobody_out(site: Site) -> None:
    """Attack: connections that stall before, in and after their TLS handshake.

    One of them kept everybody else out for 26 s.
    """
    async with started(site) as broker, idle_clients(site, broker.port):
        for _ in range(3):
            assert not await refused_login(site.login(broker))


@pytest.mark.long
@pytest.mark.attack("20.7", by="stranger")
async def test_idle_connections_are_ended(site: Site) -> None:
    """Attack: connections that stall forever, to use up the broker's files and memory."""
    async with started(site) as broker, idle_clients(site, broker.port) as idle:
        for sock in idle:
            sock.settimeout(mqtt_gate.HANDSHAKE_TIMEOUT_S + gate_connection.CONNECT_TIMEOUT_S + 20)
        ended = await asyncio.gather(*(asyncio.to_thread(_ended, sock) for sock in idle))
        assert all(ended)


def _ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.attack("20.7")
async def test_a_client_id_takes_over_no_other_users_connection(site: Site) -> None:
    """Attack: an enrolled agent connects with the client id of another."""
    async with started(site) as broker:
        broker.admit("EVES-EVES-EVES-EVES", "agent")
        victim, eve = site.login(broker), site.login(broker, "EVES-EVES-EVES-EVES")

        def client(address: MqttAddress) -> aiomqtt.Client:
            return aiomqtt.Client(
                address.host,
                address.port,
                username=address.user,
                password=address.password,
                tls_context=tls_context(address),
                identifier="the-same",
            )

        await are_known(victim, eve)
        async with client(victim) as first, client(eve):
            await first.publish(topics.notice(site.fleet, site.peer), b"still here", qos=1)


@pytest.mark.attack("20.7", by="stranger")
async def test_packets_that_are_none_reach_no_broker(site: Site) -> None:
    """Attack: malformed and forbidden packets before and after a login, and a second CONNECT."""
    async with started(site) as broker:
        address, pid = site.login(broker), broker.pid
        context = ssl.create_default_context(cadata=site.ca_pem)
        will = Will(topics.command(site.fleet, site.peer), b"x", 0, False)
        connect = Connect("x", 0, address.user, address.password.encode(), None)
        good = mqtt_packets.encode_connect(connect)
        bad = [
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x30\xff\xff\xff\x7f",
            b"\xc0\x00",
            b"\x10\x00",
            mqtt_packets.encode_connect(connect._replace(will=will)),
            good.replace(b"MQTT\x04", b"MQTT\x05"),
            good + good,
            good + b"\x34\x05\x00\x01a\x00\x01",
            good + b"\x82\x02\x00\x00",
            good + b"\x82\x05\x00\x01\x00\x00\x00",
            good + b"\xe0\x01\x00",
            good + b"\x32\x04\x00\x01a\x00",
        ]

        def ends(data: bytes) -> bool:
            plain = socket.create_connection((HOST, broker.port), timeout=20)
            with context.wrap_socket(plain, server_hostname=HOST) as sock:
                try:
                    sock.sendall(data)
                    while piece := sock.recv(4096):
                        assert piece[0] >> 4 == mqtt_packets.CONNACK
                except TimeoutError:
                    return False
                except OSError:
                    return True
                return True

        for data in bad:
            assert await asyncio.to_thread(ends, data), data[:40]
        assert broker.running
        assert broker.pid == pid
        assert not await refused_login(address)


@pytest.mark.attack("20.7")
async def test_a_flood_is_slowed_down_and_stops_nobody(site: Site) -> None:
    """Attack: an agent floods its own topics, and opens hundreds of connections with its login."""
    async with started(site) as broker:
        broker.admit("EVES-EVES-EVES-EVES", "agent")
        eve = site.login(broker, "EVES-EVES-EVES-EVES")
        watch, agent = Watch(site, site.login(broker, "monitor")), Agent(site, site.login(broker))
        topic, payload = topics.telemetry(site.fleet, eve.user), b"x" * 10_000
        await are_known(eve)
        async with running(watch.feed.run, agent.link.run), rogue(eve) as client:
            await until(lambda: watch.feed.connected and agent.link.connected)
            with suppress(TimeoutError, aiomqtt.MqttError):
                async with asyncio.timeout(2):
                    for _ in range(1000):  # 10 MB
                        await client.publish(topic, payload, qos=1)
            agent.link.set_presence(Presence(state=PeerState.PAUSED, name="box"))
            await until(lambda: any(body.state == PeerState.PAUSED for body in _presence(watch)))
            heard = len(watch.refused)
            assert heard < 200, "512 KB at once, then 64 KB/s"
        many = [rogue(eve) for _ in range(mqtt_gate.MAX_PER_USER + 4)]
        for one in many:
            await one.__aenter__()
        await until(lambda: sum(one._disconnected.done() for one in many) == 4)
        await asyncio.gather(
            *(one.__aexit__(None, None, None) for one in many), return_exceptions=True
        )


def _presence(watch: Watch) -> list[Any]:
    return watch.bodies(Presence)


@pytest.mark.attack("20.7")
async def test_a_removal_while_the_broker_is_down_holds(site: Site) -> None:
    """Attack: a member is removed while the broker is down, and logs in once it is back."""
    changes: list[bool] = []
    async with (
        started(site) as broker,
        running(lambda: broker.supervise(lambda up, _: changes.append(up))),
    ):
        broker.admit("EVES-EVES-EVES-EVES", "agent")
        assert broker.pid is not None
        psutil.Process(broker.pid).kill()
        broker.drop("EVES-EVES-EVES-EVES")
        await until(lambda: changes[-2:] == [False, True])
        assert await refused_login(site.login(broker, "EVES-EVES-EVES-EVES"))
        assert not await refused_login(site.login(broker))


@pytest.mark.attack("20.7", by="observer")
async def test_an_agent_that_reads_nothing_stops_nobody(site: Site) -> None:
    """Attack: a monitor subscribes to all that it may, sends pings, and never reads."""
    async with started(site) as broker:
        address = site.login(broker, "monitor")
        context = ssl.create_default_context(cadata=site.ca_pem)
        plain = socket.create_connection((HOST, broker.port))
        stuck = await asyncio.to_thread(context.wrap_socket, plain, server_hostname=HOST)
        connect = Connect("x", 60, address.user, address.password.encode(), None)
        wanted = topics.all_peers(site.fleet, "telemetry").encode()
        body = b"\0\1" + len(wanted).to_bytes(2) + wanted + b"\0"
        stuck.sendall(mqtt_packets.encode_connect(connect) + bytes([0x82, len(body)]) + body)
        assert broker.pid is not None
        child, payload = psutil.Process(broker.pid), b"x" * 10_000
        before = child.memory_info().rss
        watch = Watch(site, address)
        async with running(watch.feed.run), rogue(site.address(broker)) as inside:
            await until(lambda: watch.feed.connected)
            for _ in range(2000):  # 20 MB
                await inside.publish(topics.telemetry(site.fleet, site.peer), payload)
            agent = Agent(site, site.login(broker))
            agent.link.set_presence(Presence(state=PeerState.PAUSED, name="box"))
            async with running(agent.link.run):
                await until(lambda: watch.bodies(Presence))
        assert child.memory_info().rss - before < 60e6
        stuck.close()


# --- removal, over a whole coordinator -----------------------------------------------------------


class Hub(NamedTuple):
    coordinator: Coordinator
    keys: settings.Keys

    def login(self, machine: Machine) -> MqttAddress:
        return self.coordinator.mqtt_for(HOST, machine.peer)

    def join(self, name: str) -> Machine:
        machine = Machine(name)
        ticket = tickets.new_ticket(self.coordinator.addresses(), bytes(32))
        self.coordinator.registry.create_ticket(ticket, ttl_s=60, uses=1)
        self.coordinator.registry.join(machine.joining(ticket))
        return machine


@asynccontextmanager
async def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(folder / "home"))
    home, _ = settings.init([HOST])
    keys = settings.open_keys(home)
    coordinator = Coordinator(home, keys, Settings(host=HOST, port=0))
    ready = asyncio.Event()
    serving = asyncio.create_task(coordinator.serve(ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    try:
        yield Hub(coordinator, keys)
    finally:
        waiting.cancel()
        coordinator.stop()
        await serving


@pytest.mark.attack("20.7")
async def test_a_removed_member_is_cut_off_and_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a removed agent and a removed observer stay connected, and log in again.

    Also after a restart, and with the will of the removed agent.
    """
    async with hub(tmp_path, monkeypatch) as site:
        registry = site.coordinator.registry
        bad, good = site.join("bad"), site.join("good")
        ticket, key = tickets.new_ticket(("x:1",), bytes(32)), identity.new_signing_key()
        registry.create_ticket(ticket, ttl_s=60, uses=1, role="observer")
        public = identity.public_bytes(key)
        proof = key.sign(joining.operator_join_proof(ticket.id, ticket.secret, public))
        joined = registry.join_operator(
            joining.OperatorJoinRequest(
                ticket=ticket.id,
                secret=ticket.secret,
                name="eve",
                sign_public=public,
                proof=proof,
                version="0",
            )
        )
        logins = [site.login(bad), site.coordinator.mqtt_for(HOST, f"monitor-{joined.operator}")]
        will = aiomqtt.Will(topics.presence(site.keys.fleet, bad.peer), b"gone", retain=True)
        clients = [
            aiomqtt.Client(
                login.host,
                login.port,
                username=login.user,
                password=login.password,
                tls_context=tls_context(login),
                will=will if login is logins[0] else None,
            )
            for login in logins
        ]
        await are_known(*logins)
        for client in clients:
            await client.__aenter__()
        registry.remove(bad.peer, "a test")
        registry.remove_operator(joined.operator)
        await until(lambda: all(client._disconnected.done() for client in clients), within_s=10)
        for client in clients:
            await asyncio.gather(client.__aexit__(None, None, None), return_exceptions=True)
            client._disconnected.exception()
        assert [await refused_login(login) for login in logins] == [True, True]
        assert not await refused_login(site.login(good))
        inside = site.coordinator._broker.own_address()
        async with rogue(inside) as client:
            assert await kept_topics(client) == []
        kept = site.login(good)
    async with hub(tmp_path, monkeypatch) as site:
        port = site.login(good).port
        assert site.login(good).password == kept.password, "an agent need not ask again"
        for login in logins:
            assert await refused_login(replace(login, port=port))
        assert not await refused_login(replace(kept, port=port))


@pytest.mark.attack("20.7")
async def test_each_member_is_given_its_own_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: an agent asks for a login in another's name, and a home of an earlier version.

    The password in that home's `mqtt.json` was known to all members.
    """
    import httpx

    async with hub(tmp_path, monkeypatch) as site:
        ada, bob = site.join("ada"), site.join("bob")
        base = f"https://{HOST}:{site.coordinator.port}"
        found = {}
        async with httpx.AsyncClient(base_url=base, verify=False) as http:
            for machine in (ada, bob):
                headers = ours(machine, "GET", "/cw/v1/mqtt")
                answer = await http.get("/cw/v1/mqtt", headers=headers)
                found[machine.peer] = msgspec.json.decode(answer.content, type=MqttAddress)
            forged = ours(bob, "GET", "/cw/v1/mqtt", sender=ada.peer)
            assert (await http.get("/cw/v1/mqtt", headers=forged)).status_code == 401
            path, digest = "/cw/v1/watch", hashlib.sha256(b"").hexdigest()
            headers = signed_requests.sign_headers(
                "operator", site.keys.operator_key.sign, "GET", path, digest
            )
            watch = json.loads((await http.get(path, headers=headers)).content)["mqtt"]
        assert [address.user for address in found.values()] == [ada.peer, bob.peer]
        passwords = {address.password for address in found.values()} | {watch["password"]}
        assert len(passwords) == 3
        assert min(map(len, passwords)) >= 22
        assert watch["user"] == "monitor-operator"
        assert not await refused_login(found[ada.peer])
        crossed = replace(found[ada.peer], password=found[bob.peer].password)
        assert await refused_login(crossed)
