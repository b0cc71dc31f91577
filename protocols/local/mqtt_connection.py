"""A connection to the MQTT broker, for agents, the coordinator and monitors."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any, TypeVar

import aiomqtt

from protocols.local.timed_wait import wait_at_most
from protocols.messages.mqtt import (
    KEEPALIVE_S,
    TIMEOUT_S,
    MqttAddress,
    describe_failure,
    tls_context,
)
from protocols.network.backoff import delays

#: How long a cancelled attempt may take to end.
CANCEL_TIMEOUT_S = 2.0
_STABLE_S = 10.0  # a connection that lasted this long resets the backoff

T = TypeVar("T")

_log = logging.getLogger("commonweight.mqtt")
_log.addHandler(logging.NullHandler())


class MqttLink:
    """A link to the broker that reconnects forever; a subclass has the session.

    `on_change` gets (connected, reason) whenever either changes, on the event loop.
    """

    def __init__(self, address: MqttAddress, on_change: Callable[[bool, str], None]) -> None:
        self.connected = False
        self._address, self._on_change = address, on_change
        self._reported: tuple[bool, str] | None = None
        self._rng = Random()
        #: Ends the wait before the next attempt.
        self._reconnect = asyncio.Event()

    async def run(self) -> None:
        """Keep the link up until cancelled. Raises UsageError for an invalid CA."""
        address: MqttAddress | None = None
        waits = delays(self._rng)
        while True:
            if address is not self._address:
                address = self._address
                tls = await asyncio.to_thread(tls_context, address)
            began = time.monotonic()
            self._reconnect.clear()
            reason = f"the link to {address.netloc} was lost"
            try:
                await self._session(tls)
            except* aiomqtt.MqttError as group:
                if not self.connected:
                    cause = group.exceptions[0]
                    reason = describe_failure(cause.__cause__ or cause.__context__, address)
            self.connected = False
            self._report_link(False, reason)
            if time.monotonic() - began > _STABLE_S:
                waits = delays(self._rng)
            await wait_at_most(self._reconnect, next(waits))

    async def _session(self, tls: ssl.SSLContext | None) -> None:
        """One connection, until it is lost; sets `connected`. Raises MqttError."""
        raise NotImplementedError

    def _report_link(self, up: bool, reason: str) -> None:
        if self._reported != (up, reason):
            self._reported = (up, reason)
            self._on_change(up, reason)


@asynccontextmanager
async def connect(
    address: MqttAddress, tls: ssl.SSLContext | None, **options: Any
) -> AsyncIterator[aiomqtt.Client]:
    """Connects with a login and a clean session; `options` are those of `aiomqtt.Client`.

    Raises MqttError. However it ends, its socket is closed then.
    """
    if tls is not None:
        tls.sslsocket_class = _TlsSocket
    client = _Client(
        address.host,
        address.port,
        username=address.user or None,
        password=address.password or None,
        # A second client with the same id would disconnect this one, so the id is a secret.
        identifier=f"cw{secrets.token_hex(10)}",
        clean_session=True,
        tls_context=tls,
        keepalive=KEEPALIVE_S,
        timeout=TIMEOUT_S,
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        logger=_log,
        **options,
    )
    try:
        await _enter(client)
        try:
            yield client
        finally:
            await client.__aexit__(None, None, None)
    finally:
        client.close()


async def _enter(client: _Client) -> None:
    """Connects. A cancelled attempt gets some time to end, so that it says goodbye."""
    entering = asyncio.ensure_future(client.__aenter__())
    try:
        await asyncio.shield(entering)
    except asyncio.CancelledError:
        done, _ = await asyncio.wait({entering}, timeout=CANCEL_TIMEOUT_S)
        if not done:
            entering.cancel()
        elif entering.exception() is None:
            with suppress(aiomqtt.MqttError):
                await client.__aexit__(None, None, None)
        raise
    except UnicodeError as err:
        raise aiomqtt.MqttError("invalid host name") from err


class _TlsSocket(ssl.SSLSocket):
    """Closes itself when its handshake fails: paho drops it then, and keeps no reference."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class _Client(aiomqtt.Client):
    """An aiomqtt client that does not use a socket after its end, and that can be closed.

    It can also be cancelled at any time: before Python 3.12, `asyncio.wait_for` loses a cancel that
    comes together with the result.

    paho closes the socket as soon as it notices a lost connection. aiomqtt 2.5.1 registers the
    socket's number with the event loop one turn after paho asks for it. The number may be closed
    then, or belong to another connection. And aiomqtt keeps the socket of an attempt that timed
    out or was cancelled, and of a connection that hangs at its end.
    """

    _closed = False

    def close(self) -> None:
        """Closes the socket if it is open, also one that a thread still connects."""
        self._closed = True
        self._client._sock_close()
        for future in (self._connected, self._disconnected):
            if future.done() and not future.cancelled():
                future.exception()  # otherwise asyncio logs it as never retrieved

    async def _wait_for(self, fut: Awaitable[T], timeout: float | None) -> T:
        try:
            async with asyncio.timeout(self.timeout if timeout is None else timeout):
                return await fut
        except TimeoutError:
            raise aiomqtt.MqttError("the broker does not answer in time") from None

    def _on_socket_open(self, client: Any, userdata: Any, sock: Any) -> None:
        """Called in the thread that connects."""
        self._loop.call_soon_threadsafe(self._watch, sock)

    def _watch(self, sock: Any) -> None:
        if self._closed:
            self._client._sock_close()
        elif self._is_open(sock):
            self._loop.add_reader(sock, self._guard, self._read)
            self._misc_task = self._loop.create_task(self._misc_loop())

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch_writable, sock)

    def _watch_writable(self, sock: Any) -> None:
        if self._is_open(sock):
            self._loop.add_writer(sock, self._guard, self._client.loop_write)

    def _is_open(self, sock: Any) -> bool:
        return sock is not None and self._client.socket() is sock

    def _read(self) -> None:
        """Reads, also what TLS has decrypted already."""
        self._client.loop_read()
        while (pending := getattr(self._client.socket(), "pending", None)) and pending() > 0:
            self._client.loop_read()

    def _guard(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as err:  # a lost connection, or a packet that paho cannot parse
            if not self._disconnected.done():
                self._disconnected.set_exception(err)
