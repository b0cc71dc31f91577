"""A connection to the MQTT broker, for agents, the coordinator and monitors."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiomqtt

from protocols.messages.mqtt import KEEPALIVE_S, TIMEOUT_S, MqttAddress

_log = logging.getLogger("commonweight.mqtt")
_log.addHandler(logging.NullHandler())


@asynccontextmanager
async def connect(
    address: MqttAddress, tls: ssl.SSLContext | None, **options: Any
) -> AsyncIterator[aiomqtt.Client]:
    """Connects with a login and a clean session; `options` are those of `aiomqtt.Client`.

    Raises MqttError. Waits for a cancelled attempt to end, so that its socket is closed.
    """
    client = aiomqtt.Client(
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
    entering = asyncio.ensure_future(client.__aenter__())
    try:
        await asyncio.shield(entering)
    except asyncio.CancelledError:
        done, _ = await asyncio.wait({entering}, timeout=2)
        if not done:
            entering.cancel()
        elif entering.exception() is None:
            with suppress(aiomqtt.MqttError):
                await client.__aexit__(None, None, None)
        raise
    except UnicodeError as err:
        raise aiomqtt.MqttError("invalid host name") from err
    try:
        yield client
    finally:
        await client.__aexit__(None, None, None)
