"""Sends versions to members, at an address of its own, while a replica waits.

It reads the members from the ledger, and the versions from the store. All other requests go to the
coordinator that leads; this port refuses them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import threading
import time
from pathlib import Path

from msgspec.structs import replace
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.daemon.listener import Listener
from coordinator.daemon.tasks import supervised
from coordinator.fleet.auth import Auth
from coordinator.fleet.registry import Registry
from coordinator.storage import ledger_place
from coordinator.storage.ledger import Entry, Ledger
from coordinator.storage.object_store import ObjectStore
from coordinator.storage.settings import Keys, Settings
from coordinator.storage.version_cache import VersionCache
from coordinator.transport.downloads import downloads_app
from protocols.errors import CommonweightError, HomeError, UsageError

log = logging.getLogger("commonweight.hub")

FOLDER = "downloads"
#: After this time without the ledger nothing is sent: a member may have been removed.
STALE_S = 15.0
_READ_EVERY_S, _COMPARE_EVERY_S = 1.0, 30.0


def check_settings(chosen: Settings) -> None:
    """Raise UsageError if a replica cannot work with these settings."""
    if not chosen.versions:
        raise UsageError(
            "a replica needs versions that others can reach, and these are in the home alone",
            'write versions = "s3://bucket/prefix" to the settings of each replica',
        )
    if chosen.download_port and chosen.download_port == chosen.port:
        raise UsageError(
            f"download_port is {chosen.port}, the port of the coordinator that leads",
            "choose another: agents could not distinguish this replica from it",
        )


class Follower(threading.Thread):
    """A server on `download_port`, in a thread. Raises PortInUse, UsageError."""

    def __init__(self, home: Path, keys: Keys, chosen: Settings) -> None:
        super().__init__(name="downloads", daemon=True)
        self._home, self._keys, self._settings = home, keys, chosen
        self._listener = Listener(home, keys, replace(chosen, port=chosen.download_port))
        self._ending = threading.Event()
        self._ledger: Ledger
        self._registry: Registry | None = None
        self._cache: VersionCache | None = None
        self._app: ASGIApp | None = None
        self._read_at = 0.0
        #: The newest entry of the ledger at the last reading.
        self._newest: Entry | None = None

    def end(self) -> None:
        """Stop sending soon: downloads are cut, and agents continue at the coordinator."""
        self._ending.set()

    def run(self) -> None:
        """Called in the thread."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        server = self._listener.server(self._answer)
        work = {
            "members": self._follow_members(),
            "deleted versions": self._drop_deleted(),
            "certificate": self._listener.renew_certificate(server),
        }
        try:
            async with supervised(work, self._ending.set):
                serving = asyncio.create_task(server.serve())
                await server.wait_started(serving)
                log.info(
                    "sending versions on port %d while this replica waits", self._listener.port
                )
                await asyncio.to_thread(self._ending.wait)
                server.should_exit = True
                await serving
        finally:
            shutil.rmtree(self._home / FOLDER, ignore_errors=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if app is None or time.monotonic() - self._read_at > STALE_S:
            app = PlainTextResponse("this replica does not reach the ledger or the store", 503)
        await app(scope, receive, send)

    async def _follow_members(self) -> None:
        is_told = False
        while True:
            began = time.monotonic()
            try:
                await asyncio.to_thread(self._read_members)
                self._read_at, is_told = began, False
            except CommonweightError as err:
                if not is_told:
                    log.warning("this replica sends no versions for now: %s; %s", err, err.hint)
                is_told = True
            await asyncio.sleep(_READ_EVERY_S)

    def _read_members(self) -> None:
        if self._registry is not None:
            self._check_continues()
            self._registry.follow()
            return
        fleet = self._keys.fleet
        if self._cache is None:
            self._cache = VersionCache(
                self._home / FOLDER, ObjectStore(self._settings.versions, fleet)
            )
        self._ledger = ledger_place.open_ledger(self._home, read_only=True)
        self._newest = self._ledger.newest()
        registry = Registry(self._ledger)
        # No operator may ask anything here.
        self._app = downloads_app(Auth(registry, b"", fleet), self._cache)
        self._registry = registry

    def _check_continues(self) -> None:
        """Raise HomeError if the ledger was set back: what follows there, `follow` could miss."""
        last = self._newest
        if last is not None and self._ledger.entry(last.seq) != last:
            self._app = None
            raise HomeError(
                f"the ledger has lost entries: it no longer has entry {last.seq}, which was read, "
                "so a member may have been removed",
                "it was replaced by an older copy; continue with the right one, and restart this "
                "replica",
            )
        self._newest = self._ledger.newest()

    async def _drop_deleted(self) -> None:
        while True:
            await asyncio.sleep(_COMPARE_EVERY_S)
            if self._cache is not None:
                with contextlib.suppress(CommonweightError):  # a download says it
                    await self._cache.drop_deleted()
