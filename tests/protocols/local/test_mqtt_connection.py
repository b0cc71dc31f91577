"""Connections to the broker that end badly: no traceback in a log, no socket and no task left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import psutil
import pytest
from msgspec.structs import replace

from coordinator.transport.mqtt_broker import EmbeddedBroker
from protocols.local import mqtt_connection
from protocols.messages.envelope import Telemetry
from protocols.messages.mqtt import MqttAddress
from tests.support.fault_proxy import BLACKHOLE, CLEAR, Fault, Proxy
from tests.support.mqtt_fleet import HOST, IDLE, Agent, Site, Watch, running, started
from tests.support.waiting import until


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails a test that logs an error: asyncio logs exceptions of callbacks and lost futures."""
    with caplog.at_level(logging.DEBUG):
        yield
    for when in ("setup", "call", "teardown"):
        bad = [one for one in caplog.get_records(when) if one.exc_info]
        assert not bad, [(one.getMessage(), one.exc_info) for one in bad]


@asynccontextmanager
async def nothing_left(port: int) -> AsyncIterator[None]:
    """The block leaves no connection to `port`, no task and no watched socket behind."""
    loop = asyncio.get_running_loop()
    tasks, watched = asyncio.all_tasks(), _num_watched(loop)
    yield
    await until(lambda: not _connections_to(port), within_s=3)
    await until(lambda: not asyncio.all_tasks() - tasks, within_s=3)
    await until(lambda: _num_watched(loop) == watched, within_s=3)


def _connections_to(port: int) -> list[object]:
    found = psutil.Process().net_connections("tcp")
    return [one for one in found if one.raddr and one.raddr.port == port]


def _num_watched(loop: asyncio.AbstractEventLoop) -> int:
    return len(loop._selector.get_map())  # type: ignore[attr-defined]


def kill_and_wait(broker: EmbeddedBroker) -> None:
    """Kill the broker. The kernel has closed its connections before this returns."""
    assert broker.pid is not None
    process = psutil.Process(broker.pid)
    process.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)


async def test_a_link_that_ends_while_something_is_sent_logs_no_traceback(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the link and the message reach the event loop in the same turn."""
    monkeypatch.setattr(mqtt_connection, "TIMEOUT_S", 1.0)
    async with started(site) as broker, nothing_left(broker.port):
        watch = Watch(site, site.address(broker), sign=site.coordinator_key.sign)
        agent = Agent(site, site.login(broker))
        async with running(watch.feed.run, agent.link.run):
            await until(lambda: watch.feed.connected and agent.link.connected)
            ringing = asyncio.create_task(watch.feed.ring_doorbell(site.peer))
            kill_and_wait(broker)  # the loop does not run meanwhile
            agent.link.set_presence(IDLE)
            await until(lambda: not (watch.feed.connected or agent.link.connected))
            await ringing


class _Server:
    """A server in a thread that handles each connection with `serve(socket)` and keeps it open."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self._serve = serve
        self._listening = socket.create_server((HOST, 0))
        self._connections: list[socket.socket] = []
        self.num_served = 0
        self.address = MqttAddress(host=HOST, port=self._listening.getsockname()[1], tls=False)

    def __enter__(self) -> _Server:
        threading.Thread(target=self._run, name="bad broker", daemon=True).start()
        return self

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._connections.append(connection)
                with contextlib.suppress(OSError):
                    self._serve(connection)
                self.num_served += 1

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        for one in (self._listening, *self._connections):
            one.close()


def _reset(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _say(data: bytes) -> Callable[[socket.socket], object]:
    return lambda connection: (connection.recv(4096), connection.sendall(data))


_ACCEPTED = b"\x20\x02\x00\x00"


@pytest.mark.parametrize(
    "serve",
    [
        pytest.param(lambda connection: None, id="silent"),
        pytest.param(lambda connection: connection.close(), id="closes"),
        pytest.param(_reset, id="resets"),
        pytest.param(_say(b"\x20\x02\x00\x05"), id="refuses the login"),
        pytest.param(_say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), id="another protocol"),
    ],
)
async def test_a_failed_attempt_leaves_nothing(
    serve: Callable[[socket.socket], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_connection, "TIMEOUT_S", 0.2)
    # A silent broker's connection would be closed after this many seconds anyway.
    monkeypatch.setattr(mqtt_connection, "KEEPALIVE_S", 60)
    with _Server(serve) as server:
        async with nothing_left(server.address.port):
            for _ in range(2):
                with pytest.raises(aiomqtt.MqttError):
                    async with mqtt_connection.connect(server.address, None):
                        pass


async def test_a_failed_tls_handshake_closes_its_socket() -> None:
    with _Server(lambda connection: connection.close()) as server:
        gc.collect()  # what other tests have left must not be closed meanwhile
        before = psutil.Process().num_fds()
        # The exception keeps its frames, and they keep what they did not close.
        with pytest.raises(aiomqtt.MqttError) as failed:
            async with mqtt_connection.connect(server.address, ssl.create_default_context()):
                pass
        assert psutil.Process().num_fds() == before, failed


@pytest.mark.parametrize("serve", [lambda connection: None, _say(_ACCEPTED)])
@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.02, 0.2])
async def test_a_cancelled_attempt_leaves_nothing(
    serve: Callable[[socket.socket], object], after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_connection, "KEEPALIVE_S", 60)
    monkeypatch.setattr(mqtt_connection, "CANCEL_TIMEOUT_S", 0.1)

    async def stay() -> None:
        async with mqtt_connection.connect(server.address, None):
            await asyncio.Event().wait()

    with _Server(serve) as server:
        async with nothing_left(server.address.port):
            staying = asyncio.create_task(stay())
            await asyncio.sleep(after_s)
            staying.cancel()
            await asyncio.wait({staying})
            assert staying.cancelled()


async def test_an_attempt_that_connects_after_its_end_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name server may take long: then the thread connects when nobody waits any more."""
    monkeypatch.setattr(mqtt_connection, "CANCEL_TIMEOUT_S", 0.1)
    looking_up, answer = threading.Event(), threading.Event()
    look_up = socket.getaddrinfo

    def slow(*arguments: Any, **options: Any) -> Any:
        looking_up.set()
        answer.wait(30)
        return look_up(*arguments, **options)

    async def stay() -> None:
        async with mqtt_connection.connect(server.address, None):
            await asyncio.Event().wait()

    with _Server(_say(_ACCEPTED)) as server:
        async with nothing_left(server.address.port):
            monkeypatch.setattr(socket, "getaddrinfo", slow)
            staying = asyncio.create_task(stay())
            await asyncio.to_thread(looking_up.wait, 30)
            staying.cancel()
            await asyncio.wait({staying})
            before = server.num_served
            answer.set()
            await until(lambda: server.num_served > before)


async def test_a_link_that_hangs_at_its_end_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half-open, with more to send than fits into the socket: a goodbye cannot be sent either."""
    monkeypatch.setattr(mqtt_connection, "TIMEOUT_S", 0.5)
    with _Server(_say(_ACCEPTED)) as server:
        async with nothing_left(server.address.port):
            with pytest.raises(aiomqtt.MqttError):
                async with mqtt_connection.connect(server.address, None) as client:
                    await client.publish("t", bytes(8 << 20), qos=1)


async def test_a_cancel_that_comes_with_the_brokers_answer_is_not_lost() -> None:
    def serve(connection: socket.socket) -> None:
        for answer in (_ACCEPTED, b"\x90\x03\x00\x01\x00"):  # CONNACK, SUBACK
            connection.recv(4096)
            connection.sendall(answer)

    with _Server(serve) as server:
        async with mqtt_connection.connect(server.address, None) as client:
            on_answer = client._on_subscribe

            def cancel(*arguments: Any) -> None:
                on_answer(*arguments)
                subscribing.cancel()

            client._client.on_subscribe = cancel
            subscribing = asyncio.create_task(client.subscribe("t"))
            await asyncio.wait({subscribing})
            assert subscribing.cancelled()


async def test_resets_of_a_tls_link_log_no_traceback(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_connection, "KEEPALIVE_S", 1)
    monkeypatch.setattr(mqtt_connection, "TIMEOUT_S", 2.0)
    async with started(site) as broker:
        with Proxy(broker.port) as proxy:
            async with nothing_left(proxy.port):
                watch, agent = (
                    kind(site, replace(site.login(broker, user), port=proxy.port))
                    for kind, user in ((Watch, "monitor"), (Agent, site.peer))
                )
                async with running(watch.feed.run, agent.link.run):
                    for fault in (CLEAR, BLACKHOLE, Fault(refuse=True)):
                        proxy.fault = CLEAR
                        await until(lambda: watch.feed.connected and agent.link.connected)
                        agent.link.telemetry(Telemetry(step=1))
                        proxy.fault = fault
                        if fault is not BLACKHOLE:
                            proxy.reset()
                        agent.link.set_presence(IDLE)
                        await until(lambda: not (watch.feed.connected or agent.link.connected))
