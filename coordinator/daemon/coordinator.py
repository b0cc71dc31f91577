"""The coordinator in one process: starts and supervises server, broker, feed and the runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.api.app import make_app
from coordinator.api.exchange import Exchanges, Lingering
from coordinator.api.fast_path import with_fast_path
from coordinator.api.log_requests import LogDesk
from coordinator.daemon import upstream
from coordinator.daemon.tasks import supervised
from coordinator.fleet.auth import Auth
from coordinator.fleet.reducer import Fleet
from coordinator.fleet.registry import Peer, Registry
from coordinator.fleet.sessions import Sessions
from coordinator.jobs.manager import JobQueue
from coordinator.jobs.store import JobLane
from coordinator.runs.context import Fleetwork
from coordinator.runs.manager import RunQueue
from coordinator.storage import settings
from coordinator.storage.ledger import Ledger
from coordinator.storage.settings import UP_FILE, Keys, Settings
from coordinator.transport.flower import ARRIVALS, FLEET_PREFIX, Superlink
from coordinator.transport.flower_records import LaneGrid
from coordinator.transport.holders import Holders
from coordinator.transport.http_server import Server, listen, raise_open_file_limit
from coordinator.transport.mqtt_broker import EmbeddedBroker, ExternalBroker
from coordinator.transport.publisher import Mirror
from coordinator.transport.sharing import SharingDesk
from coordinator.transport.weights import Lane
from protocols.enrollment import identity
from protocols.local import heap
from protocols.local.atomic_files import write_private
from protocols.messages.envelope import Command, Happened
from protocols.messages.mqtt import MqttAddress
from protocols.messages.work import Exchange, Exchanged
from protocols.network import addresses

log = logging.getLogger("commonweight.hub")

BEAT_S = 5.0
ONLINE_EVERY_S = 2.0
CERTIFICATE_EVERY_S = 6 * 3600.0


class Hub:
    """A coordinator over an open home. `serve` runs it until it is told to stop."""

    def __init__(self, home: Path, keys: Keys, chosen: Settings) -> None:
        self._home, self._keys, self._settings = home, keys, chosen
        heap.share()
        self._stopping = asyncio.Event()
        self._names = chosen.names or settings.reachable_names(chosen.host)
        self._public = chosen.public_addresses
        public_names = [addresses.parse(address).host for address in self._public]
        self._certified = [*self._names, *public_names]
        settings.certify(home, keys.ca_key, keys.ca_pem, self._certified)
        self._socket = listen(chosen.host, chosen.port)
        self.port: int = self._socket.getsockname()[1]
        self._ledger = Ledger(home / "ledger.db")
        self.registry = Registry(self._ledger, approve=chosen.approve)
        removed = sum(peer.standing == "removed" for peer in self.registry.peers.values())
        removed += sum(operator.removed for operator in self.registry.operators.values())
        self._login = keys.login
        if removed != keys.login.removed:
            self._login = settings.new_login(home, removed)
        self.lane = Lane(home)
        self.job_lane = JobLane(home / "jobs")
        self._superlink = Superlink(self._on_request)
        self._grid = LaneGrid(self._superlink, self.lane)
        self.fleet = Fleet(fleet=keys.fleet, name=socket.gethostname())
        self._sessions = Sessions(self.fleet)
        self._mirror = Mirror(self.fleet, self._sessions, keys, self._nudge, self._on_mqtt_up)
        self.logs = LogDesk(self._mirror.ask_logs)
        self._lingering = Lingering()
        self._holders = Holders(self._sessions.is_open)
        self.sharing = SharingDesk(self.lane, self.registry, self._holders, keys.sign_key.sign)
        self._broker = self._make_broker()
        self._refused: Counter[str] = Counter()
        for peer in self.registry.peers.values():
            self._admit(peer)
        self.registry.on_change = self._on_peer
        self.runs = RunQueue(self._fleetwork(), self.registry, self._sessions.tasks)
        self.lane.on_short = self.runs.nudge
        self.jobs = JobQueue(self._fleetwork(), self.job_lane, self.registry)
        self._exchanges = Exchanges(
            self._superlink,
            self._sessions,
            self.lane,
            self.runs,
            self.jobs,
            self._lingering,
            self._on_request,
        )

    def _make_broker(self) -> EmbeddedBroker | ExternalBroker:
        chosen = self._settings
        if chosen.mqtt_url:
            return ExternalBroker(chosen.mqtt_url, Path(chosen.mqtt_ca) if chosen.mqtt_ca else None)
        port = chosen.mqtt_port or (self.port + 1 if chosen.port else 0)
        return EmbeddedBroker(
            self._home / "broker",
            chosen.host,
            port,
            self._home / "server.pem",
            self._home / "server.key",
            self._login.user,
            self._login.password,
        )

    # --- serving ---

    async def serve(self, on_ready: Callable[[], None], *, resume: bool = True) -> None:
        """Run until `stop`, SIGINT or SIGTERM. Raises PortInUse and what the parts raise."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
                loop.add_signal_handler(name, self.stop)
        raise_open_file_limit()
        server = Server(
            self._app(), self._socket, self._home / "server.pem", self._home / "server.key"
        )
        await self._broker.start()
        try:
            async with supervised(self._work(server, resume), self.stop):
                serving = asyncio.create_task(server.serve())
                await server.wait_started(serving)
                self._write_up_file()
                on_ready()
                stopping = asyncio.create_task(self._stopping.wait())
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                server.should_exit = True
                await serving
        finally:
            (self._home / UP_FILE).unlink(missing_ok=True)
            await self._broker.stop()
            self._ledger.close()

    def stop(self) -> None:
        self._stopping.set()

    def _work(self, server: Server, resume: bool) -> dict[str, Coroutine[Any, Any, None]]:
        """The background tasks, by name."""
        broker = self._broker.address("127.0.0.1", self._keys.ca_pem.decode())
        work = {
            "broker": self._broker.supervise(self._on_broker),
            "feed": self._mirror.listen(broker, self.registry.verify),
            "publisher": self._mirror.relay(),
            "heartbeat": self._beat(),
            "sessions": self._watch_sessions(),
            "certificate": self._keep_certificate(server),
            "runs": self.runs.work(resume),
            "jobs": self.jobs.work(resume),
        }
        if port := self._settings.metrics_port:
            work["metrics"] = self._serve_metrics(port)
        if (self._home / "upstream" / "enrolled.json").exists():
            work["upstream"] = upstream.keep(self._home)
        if self._settings.announce:
            work["announcement"] = self._announce()
        return work

    async def _announce(self) -> None:
        from coordinator.daemon.mdns import announce, own_addresses

        ca = identity.ca_fingerprint(self._keys.ca_pem)
        await announce(self.fleet.name, self.port, ca, own_addresses(self._names))

    def _app(self) -> ASGIApp:
        """Flower's Fleet routes under their prefix, ours everywhere else."""
        auth = Auth(self.registry, identity.raw_public(self._keys.operator_key))
        flower = self._superlink.app(auth)
        public = identity.raw_public(self._keys.sign_key)
        ours = with_fast_path(
            make_app(self, auth, self._keys.fleet, self._keys.ca_key, self._keys.ca_pem, public)
        )

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            inner = flower if scope["path"].startswith(FLEET_PREFIX) else ours
            await inner(scope, receive, send)

        return app

    def _write_up_file(self) -> None:
        host = self._settings.host
        local = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
        up = {
            "pid": os.getpid(),
            "address": f"{local}:{self.port}",
            "host": host,
            "since": time.time(),
        }
        write_private(self._home / UP_FILE, json.dumps(up).encode())

    async def _beat(self) -> None:
        while True:
            await asyncio.to_thread(self._superlink.beat)
            await asyncio.sleep(BEAT_S)

    async def _keep_certificate(self, server: Server) -> None:
        """Renew the TLS certificate long before it ends; agents notice nothing."""
        while True:
            await asyncio.sleep(CERTIFICATE_EVERY_S)
            keys = self._keys
            if settings.certify(self._home, keys.ca_key, keys.ca_pem, self._certified):
                server.renew()
                log.info("renewed the TLS certificate")

    async def _serve_metrics(self, port: int) -> None:
        from coordinator.fleet import prometheus  # only now: it brings a library that few need

        def text() -> bytes:
            totals = prometheus.Totals(self._refused, self.lane.bytes_up, self.lane.bytes_down)
            return prometheus.exposition(self.fleet, time.time(), totals)

        await prometheus.serve(port, text)

    # --- what the HTTP routes ask (desk.Desk) ---

    def addresses(self) -> tuple[str, ...]:
        hosts = (f"[{name}]" if ":" in name else name for name in self._names)
        return (*self._public, *(f"{host}:{self.port}" for host in hosts))[:8]

    def mqtt_for(self, host: str) -> MqttAddress:
        return self._broker.address(host, self._keys.ca_pem.decode())

    async def command(self, peer: str, command: Command) -> str:
        """Send an operator's command; words of the outcome. Raises Unreachable."""
        await self._mirror.command(peer, command)
        return f"{command.action} sent to {self._name_of(peer)}"

    async def exchange(self, peer: str, asked: Exchange) -> Exchanged:
        """A peer hands in a reply and takes its next message. Raises BadMessage, NoSession."""
        return await self._exchanges.exchange(peer, asked)

    # --- runs ---

    def _fleetwork(self) -> Fleetwork:
        return Fleetwork(
            ledger=self._ledger,
            lane=self.lane,
            grid=self._grid,
            sign=self._keys.sign_key.sign,
            verify=self.registry.verify,
            is_own=partial(identity.verify, identity.raw_public(self._keys.sign_key)),
            eligible=self._sessions.eligible,
            node_of=self._sessions.node_of,
            peer_of=self._sessions.peer_of,
            name_of=self._name_of,
            ring=self._ring,
            publish=self._mirror.publish,
            refused=self._refused,
            look=self._look,
        )

    def _ring(self, peers: Sequence[str]) -> None:
        self._mirror.ring([peer for peer in peers if not self._lingering.wake(peer)])

    # --- peers ---

    def _name_of(self, peer: str) -> str:
        known = self.registry.peers.get(peer)
        return known.name if known else peer

    def _admit(self, peer: Peer) -> None:
        """Let an enrolled peer's Flower key in, and tell the fold of it."""
        if peer.standing == "enrolled" and self._sessions.node_of(peer.peer) is None:
            self._sessions.admit(peer.peer, self._superlink.register(peer.node_public))
        if peer.standing != "removed":
            self._mirror.tell_of(peer)

    def _on_peer(self, peer: Peer) -> None:
        words = {"enrolled": "joined", "awaiting": "asks to join", "removed": "was removed"}
        if peer.standing == "removed":
            if (node := self._sessions.dismiss(peer.peer)) is not None:
                self._superlink.forget(node)
            self._holders.gone(peer.peer)
            self.sharing.neighbours.book.gone(peer.peer)
            self._mirror.forget(peer.peer)
            self._mirror.tell_of(peer)
            self._nudge()
        else:
            self._admit(peer)
        text = f"{peer.name} {words[peer.standing]}"
        self._mirror.publish(Happened(level="info", text=text, subject=peer.peer))

    def _nudge(self) -> None:
        """Something changed that runs and jobs may care for."""
        self.runs.nudge()
        self.jobs.nudge()

    def _on_request(self, action: str, node_id: int) -> None:
        """A Fleet request of this node succeeded."""
        if action in ARRIVALS:
            self._nudge()
        peer = self._sessions.peer_of(node_id)
        if self._sessions.node_of(peer) is None:
            return
        news = self._sessions.heard(peer)
        if action == "activate-node":
            self._sessions.opened(peer)
            self._holders.forgive(peer)
            if self.runs.current is not None:
                self.runs.current.session_opened(peer)
            self.jobs.session_opened(peer)
            self._mirror.tell_links([self.registry.peers[peer]])
        elif action == "deactivate-node":
            self._sessions.closed(peer)
            self._nudge()
            self._mirror.tell_links([self.registry.peers[peer]])
        elif news:
            self._nudge()

    async def _watch_sessions(self) -> None:
        """Notice, without a broker, the peers whose heartbeat has run out."""
        while True:
            if self._look():
                self._nudge()
            # Also how many messages were rejected: not one by one.
            self._mirror.tell_links(self.registry.peers.values())
            await asyncio.sleep(ONLINE_EVERY_S)

    def _look(self) -> bool:
        """Take over from Flower whose heartbeats hold; True if that is news."""
        # In this thread: a session that opens meanwhile must not be overlooked.
        return self._sessions.set_online(self._superlink.online())

    def _on_broker(self, up: bool, why: str) -> None:
        if not up:
            log.warning("the MQTT broker is down: %s", why)

    def _on_mqtt_up(self) -> None:
        if self.runs.current is not None:
            self.runs.current.questions.ring_again()
