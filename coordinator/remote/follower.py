"""Keeps a fleet current from a Source: a snapshot, then live messages; polls when they stop.

A lost connection is retried forever, with a jittered back-off of at most 10 s.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable

from coordinator.fleet.reducer import reduce
from coordinator.fleet.state import Fleet, rebase_times
from coordinator.remote.source import Source
from protocols.errors import CommonweightError
from protocols.local.timed_wait import wait_at_most
from protocols.messages.envelope import Envelope
from protocols.messages.topics import COORDINATOR

POLL_S = 2.0
RESYNC_S = 60.0
#: A fleet may send nothing: a connection without an error for this long counts as up.
GRACE_S = 5.0
LINK_ERRORS = (CommonweightError, OSError, TimeoutError)


def jittered(attempt: int) -> float:
    """Seconds before the next attempt: 1, 2, 4, 8, 10 and 10 again, each up to a third less."""
    return float(min(2 ** min(attempt, 4), 10)) * random.uniform(0.67, 1.0)


class FleetFollower:
    """The fleet as it is known here, and the state of the connections to it.

    `changed_peers` holds the peers that changed since `mark_drawn()`; `all_changed` is True if
    anything else may have changed.
    """

    def __init__(
        self,
        source: Source,
        clock: Callable[[], float],
        back_off: Callable[[int], float] = jittered,
    ) -> None:
        self.source = source
        self.fleet: Fleet | None = None
        self.stream = False
        self.http = False
        self.fresh_at = 0.0
        self.error: CommonweightError | None = None
        self.changed_peers: set[str] = set()
        self.all_changed = True
        self._clock = clock
        self._back_off = back_off
        self._fetching = False
        self._since_fetch: deque[Envelope] = deque(maxlen=20_000)
        self._next_try: dict[str, float] = {}
        self._hurry = {"stream": asyncio.Event(), "http": asyncio.Event()}

    @property
    def connected(self) -> bool:
        """True while at least one connection works."""
        return self.stream or self.http

    @property
    def retry_at(self) -> float | None:
        """The time of the next attempt, by the clock; None during an attempt."""
        return min(self._next_try.values(), default=None)

    def mark_drawn(self) -> None:
        """Forget the changes so far: they are drawn."""
        self.changed_peers.clear()
        self.all_changed = False

    def reconnect(self) -> None:
        """Retry now."""
        for event in self._hurry.values():
            event.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_messages(), name="monitor messages")
            group.create_task(self._follow_snapshots(), name="monitor snapshots")

    # --- live messages ---

    async def _follow_messages(self) -> None:
        attempt = 0
        while True:
            grace = asyncio.get_running_loop().call_later(GRACE_S, self._stream_up)
            try:
                async for envelope in self.source.messages():
                    attempt = 0
                    self._stream_up()
                    self._take(envelope)
            except LINK_ERRORS as err:
                self._lost(err)
            finally:
                grace.cancel()
            if self.stream:
                self._hurry["http"].set()
            self.stream, self.all_changed = False, True
            await self._wait("stream", self._back_off(attempt), retrying=True)
            attempt += 1

    def _stream_up(self) -> None:
        if not self.stream:
            self.stream, self.all_changed = True, True

    def _take(self, envelope: Envelope) -> None:
        now = self._clock()
        self.fresh_at = now
        if self._fetching or self.fleet is None:
            self._since_fetch.append(envelope)
        if self.fleet is None:
            return
        reduce(self.fleet, envelope, now)
        if envelope.sender == COORDINATOR:
            self.all_changed = True
        else:
            self.changed_peers.add(envelope.sender)
        if self.fleet.gap and not self._fetching:
            self._hurry["http"].set()

    # --- snapshots ---

    async def _follow_snapshots(self) -> None:
        attempt = 0
        while True:
            self._fetching = True
            try:
                fleet = await self.source.snapshot()
            except LINK_ERRORS as err:
                self._lost(err)
                self.http, self.all_changed = False, True
                await self._wait("http", self._back_off(attempt), retrying=True)
                attempt += 1
            else:
                attempt = 0
                self._replace(fleet)
                await self._until_needed()
            finally:
                self._fetching = False

    def _replace(self, fleet: Fleet) -> None:
        now = self._clock()
        fleet.gap = False
        rebase_times(fleet, now)
        # Messages that arrived during the request may be newer than the snapshot; older ones are
        # ignored.
        for envelope in self._since_fetch:
            reduce(fleet, envelope, now)
        self._since_fetch.clear()
        if self.fleet is None:
            self.fleet = fleet
        else:  # change the object in place, so that no widget keeps an old one in memory
            for name in fleet.__struct_fields__:
                setattr(self.fleet, name, getattr(fleet, name))
        self.fresh_at = now
        self.http, self.all_changed, self.error = True, True, None
        self._fetching = False

    async def _until_needed(self) -> None:
        """Wait until a snapshot is needed: at once after a gap, but every 2 s at most."""
        loop = asyncio.get_running_loop()
        fetched = loop.time()
        live = self.stream and self.fleet is not None and not self.fleet.gap
        await self._wait("http", RESYNC_S if live else POLL_S)
        if loop.time() - fetched < POLL_S and self.fleet is not None and self.fleet.gap:
            await self._wait("http", POLL_S - (loop.time() - fetched))

    # --- both ---

    def _lost(self, err: BaseException) -> None:
        if not isinstance(err, CommonweightError):
            err = CommonweightError(str(err) or type(err).__name__)
        self.error = err

    async def _wait(self, link: str, seconds: float, *, retrying: bool = False) -> None:
        event = self._hurry[link]
        event.clear()
        if retrying:
            self._next_try[link] = self._clock() + seconds
        try:
            await wait_at_most(event, seconds)
        finally:
            self._next_try.pop(link, None)
