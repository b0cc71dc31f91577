"""The live source of fleet state for the monitor: snapshots by HTTPS, messages by MQTT."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from coordinator.fleet.state import Fleet
from coordinator.remote import peer_source
from coordinator.remote.api_client import Remote
from coordinator.transport.mqtt_client import FleetMqttClient
from protocols.enrollment import identity
from protocols.errors import CommonweightError, NotRunning, Unreachable
from protocols.messages.envelope import Envelope, PeerChanged
from protocols.messages.topics import COORDINATOR, Kind

T = TypeVar("T")

#: Live messages that wait for their reader.
MAX_WAITING = 20_000
#: How often the peers to ask while the coordinator is away are saved.
_SAVE_NEIGHBORS_EVERY_S = 600.0


class LiveSource:
    """A `Source` over a home: snapshots by HTTPS, messages by MQTT.

    The coordinator may stop and start again: each call looks up its address.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._remote: Remote | None = None
        self._keys: dict[str, bytes] = {}
        self._keep_at = 0.0

    async def snapshot(self) -> Fleet:
        fleet = await self.ask(lambda remote: remote.fleet())
        self._keys |= {peer.peer: peer.public_key for peer in fleet.peers.values()}
        if time.monotonic() >= self._keep_at:
            self._keep_at = time.monotonic() + _SAVE_NEIGHBORS_EVERY_S
            with contextlib.suppress(CommonweightError, OSError):  # these are only of use later
                peer_source.save_neighbors(
                    self._home, await self.ask(lambda remote: remote.neighbours())
                )
        return fleet

    async def messages(self) -> AsyncIterator[Envelope]:
        watch = await self.ask(lambda remote: remote.watch())
        self._keys[COORDINATOR] = watch.coordinator_public
        arrived: asyncio.Queue[Envelope | str] = asyncio.Queue(MAX_WAITING)

        is_lost = False

        def put(item: Envelope | str) -> None:
            nonlocal is_lost
            if is_lost:  # the reader stops there
                return
            is_lost = isinstance(item, str)
            if arrived.full():
                arrived.get_nowait()
            arrived.put_nowait(item)

        def on_envelope(_: Kind, envelope: Envelope) -> None:
            body = envelope.body
            if isinstance(body, PeerChanged):  # signed by the coordinator, so its key is trusted
                self._keys[body.peer] = body.public_key
            put(envelope)

        feed = FleetMqttClient(
            watch.mqtt,
            watch.fleet,
            self._verify,
            on_envelope,
            lambda up, why: None if up else put(why or "the connection was lost"),
            lambda topic, err: None,
            listen_to_coordinator=True,
        )
        running = asyncio.create_task(feed.run())
        try:
            while True:
                item = await arrived.get()
                if isinstance(item, str):
                    raise Unreachable(f"MQTT: {item}")
                yield item
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _verify(self, sender: str, signature: bytes, signed: bytes) -> bool:
        public = self._keys.get(sender)
        return public is not None and identity.verify(public, signature, signed)

    async def ask(self, request: Callable[[Remote], T]) -> T:
        try:
            if self._remote is None:
                self._remote = await asyncio.to_thread(Remote, self._home)
            return await asyncio.to_thread(request, self._remote)
        except NotRunning as err:
            raise Unreachable(err.message, err.hint) from err
        except Unreachable:
            self._remote = None
            raise
