"""The coordinator in one process: makes its parts, connects them, and supervises them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.api.app import make_app
from coordinator.api.fast_path import with_fast_path
from coordinator.api.log_requests import LogRequests
from coordinator.api.polls import LongPolls, OwnerNotices, PollHandler
from coordinator.api.service import Identity
from coordinator.daemon import upstream
from coordinator.daemon.brokers import make_broker
from coordinator.daemon.listener import Listener
from coordinator.daemon.peer_events import PeerEvents
from coordinator.daemon.tasks import supervised
from coordinator.fleet.auth import Auth
from coordinator.fleet.registry import Registry
from coordinator.fleet.sessions import Sessions
from coordinator.fleet.state import Fleet
from coordinator.fleet.task_offers import TaskOffers
from coordinator.fleet.witnesses import Witnesses
from coordinator.jobs.manager import JobManager
from coordinator.jobs.store import MAX_ANSWER_BYTES, JobStore
from coordinator.runs.context import RunContext
from coordinator.runs.manager import RunManager
from coordinator.storage.fleet_cards import CardFile
from coordinator.storage.ledger import Ledger
from coordinator.storage.ledger_place import open_ledger
from coordinator.storage.object_store import ObjectStore
from coordinator.storage.seen_heads import SeenHeads
from coordinator.storage.settings import UP_FILE, Keys, Settings
from coordinator.storage.version_log import VersionLog
from coordinator.storage.weight_store import WeightStore
from coordinator.transport.flower import Superlink
from coordinator.transport.flower_grid import InProcessGrid
from coordinator.transport.flower_sessions import FLEET_PREFIX, sessions_app
from coordinator.transport.http_server import Server
from coordinator.transport.piece_sources import PieceSources
from coordinator.transport.publisher import EventPublisher
from coordinator.transport.sharing import SharingRoutes
from coordinator.transport.weights import WeightTransfer
from protocols.enrollment import ca_chain, identity
from protocols.errors import Awaited, LeadershipLost, StorageUnreachable
from protocols.local import heap
from protocols.messages.envelope import Command, EventLine, strip_controls
from protocols.messages.fleet_names import FleetNames
from protocols.messages.mqtt import MqttAddress

log = logging.getLogger("commonweight.hub")

HEARTBEAT_S = 5.0
_LEAD_POLL_S = 0.5


class Coordinator:
    """A coordinator on an open home. `serve` runs it until `stop`.

    `ledger`: the home's, if it is open already. Each part gets only parts that were made before it.
    Calls in the other direction go through hooks, which `_connect` sets.
    """

    def __init__(
        self, home: Path, keys: Keys, chosen: Settings, ledger: Ledger | None = None
    ) -> None:
        self._home, self._keys, self._settings = home, keys, chosen
        heap.limit_arenas()
        public = identity.public_bytes(keys.sign_key)
        self.identity = Identity(keys.fleet, keys.ca_pem, public, keys.chain)
        self._stopping = asyncio.Event()
        self._listener = Listener(home, keys, chosen)
        # On disk.
        self._ledger = ledger or open_ledger(home)
        self.registry = Registry(self._ledger, approve=chosen.approve)
        self.offers = TaskOffers(self._ledger, keys.fleet, keys.sign_key.sign)
        self.version_log = VersionLog(self._ledger, keys.fleet, keys.sign_key.sign)
        self._mirror = ObjectStore(chosen.versions, keys.fleet) if chosen.versions else None
        self.weight_store = WeightStore(home, self._mirror)
        self.job_store = JobStore(home / "jobs")
        self.transfer = WeightTransfer(self.weight_store)
        self.job_transfer = WeightTransfer(self.job_store, MAX_ANSWER_BYTES)
        self._seen_heads = SeenHeads(home)
        self._witnesses = Witnesses(
            self._seen_heads,
            self.version_log,
            self._ledger,
            self.registry,
            self.identity.public,
        )
        # Peers, and the ways to reach them.
        self._superlink = Superlink()
        self.fleet = Fleet(fleet=keys.fleet, name=socket.gethostname())
        self._sessions = Sessions(self.fleet)
        self._broker = make_broker(home, chosen, self.port, keys)
        self._steps = ca_chain.read_chain(keys.chain)
        self._card = CardFile(home, keys.ca_pem, keys.chain, self._ledger.term)
        self._publisher = EventPublisher(self.fleet, self._sessions, keys)
        self.log_requests = LogRequests(self._publisher.request_logs)
        sources = PieceSources(self._sessions.is_open)
        self.sharing = SharingRoutes(self.weight_store, self.registry, sources, keys.sign_key.sign)
        long_polls = LongPolls()
        self._peers = PeerEvents(
            self.registry,
            self._superlink,
            self._sessions,
            self._publisher,
            self.sharing,
            long_polls,
            self._broker,
        )
        self._peers.admit_all()
        # Runs and jobs.
        self._grid = InProcessGrid(self._superlink)
        self._refused: Counter[str] = Counter()
        self._notices = OwnerNotices()
        context = self._run_context()
        self.runs = RunManager(context, self.registry, self._sessions.tasks)
        self.jobs = JobManager(context, self.job_store, self.registry)
        self._polls = PollHandler(
            self._superlink,
            self._sessions,
            self.transfer,
            self.runs,
            self.jobs,
            long_polls,
            self._witnesses,
            self._notices,
        )
        self.addresses, self.poll = self._listener.addresses, self._polls.poll
        self._connect()

    def _connect(self) -> None:
        self._peers.queues = (self.runs, self.jobs)
        self.registry.on_change = self._peers.on_change
        self.registry.on_operator_change = self._peers.on_operator_change
        self._broker.on_refused = self._peers.on_mqtt_refused
        self._superlink.on_request = self._peers.on_request
        self._polls.on_request = self._peers.on_request
        self._publisher.on_eligibility_change = self._peers.wake_queues
        self._publisher.on_up = self.runs.resend_doorbells
        self._publisher.awaits = self._awaits
        self._publisher.fetched_from = self.sharing.fetched_from
        self.sharing.on_fetched = self._peers.publish
        self.transfer.limits.on_shortage = self.runs.wake
        self.transfer.limits.is_expected = lambda: self.runs.current is not None
        self.job_transfer.limits.is_expected = lambda: self.jobs.is_working
        self.job_transfer.limits.max_bytes_of = self.jobs.max_answer_bytes
        self._peers.on_removed = self._forget_peer
        self._witnesses.report = self._report_contradiction
        self.offers.on_change = self._announce_offers
        self._polls.offers_number = lambda: self.offers.number

    @property
    def port(self) -> int:
        return self._listener.port

    # --- serving ---

    async def serve(self, on_ready: Callable[[], None], *, resume: bool = True) -> None:
        """Run until `stop`, SIGINT or SIGTERM. Raises PortInUse and errors of the parts."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
                loop.add_signal_handler(name, self.stop)
        server = self._listener.server(self._app())
        await self._broker.start()
        try:
            async with supervised(self._work(server, resume), self.stop):
                serving = asyncio.create_task(server.serve())
                await server.wait_started(serving)
                self._listener.write_up_file()
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
            if self._mirror is not None:
                self._mirror.close()
            self._seen_heads.close()

    def stop(self) -> None:
        self._stopping.set()

    def _work(self, server: Server, resume: bool) -> dict[str, Coroutine[Any, Any, None]]:
        """The background tasks, by name."""
        work = {
            "broker": self._broker.supervise(self._on_broker),
            "feed": self._publisher.listen(self._broker.own_address(), self.registry.verify),
            "publisher": self._publisher.relay(),
            "heartbeat": self._send_heartbeats(),
            "ledger": self._watch_lead(),
            "sessions": self._peers.watch(),
            "certificate": self._listener.renew_certificate(server),
            "runs": self.runs.work(resume),
            "jobs": self.jobs.work(resume),
        }
        if port := self._settings.metrics_port:
            work["metrics"] = self._serve_metrics(port)
        if (self._home / "upstream" / "enrolled.json").exists():
            work["upstream"] = upstream.run(self._home)
        if self._settings.announce:
            work["announcement"] = self._announce()
        return work

    async def _announce(self) -> None:
        from coordinator.daemon.mdns import announce, ip_addresses

        ca = self.identity.ca_sha256
        await announce(self.fleet.name, self.port, ca, ip_addresses(self._listener.names))

    def _app(self) -> ASGIApp:
        """Flower's Fleet routes under their prefix, and our own routes."""
        auth = Auth(
            self.registry, identity.public_bytes(self._keys.operator_key), self.identity.fleet
        )
        flower = sessions_app(self._superlink, auth)
        ours = with_fast_path(make_app(self, auth, self._keys.ca_key, self._keys.issuer))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            inner = flower if scope["path"].startswith(FLEET_PREFIX) else ours
            try:
                self._ledger.check_leads()
                await inner(scope, receive, send)
            # Before anything was sent. The client tries again, here or at another address.
            except (StorageUnreachable, LeadershipLost) as err:
                await PlainTextResponse(err.message, 503)(scope, receive, send)

        return app

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.to_thread(self._superlink.heartbeat)
            await asyncio.sleep(HEARTBEAT_S)

    async def _watch_lead(self) -> None:
        """End this process if another one has taken over the ledger, or may have."""
        while True:
            self._ledger.check_leads()
            await asyncio.sleep(_LEAD_POLL_S)

    async def _serve_metrics(self, port: int) -> None:
        from coordinator.fleet import prometheus  # imported here to save memory without metrics

        def text() -> bytes:
            transfer = self.transfer
            totals = prometheus.Totals(self._refused, transfer.bytes_up, transfer.bytes_down)
            return prometheus.exposition(self.fleet, time.time(), totals)

        await prometheus.serve(port, text, self._settings.metrics_host)

    # --- for the HTTP routes (CoordinatorService) ---

    def mqtt_for(self, host: str, user: str) -> MqttAddress:
        return self._broker.address(host, self._keys.ca_pem.decode(), user)

    def fleet_card(self) -> bytes:
        """The coordinator's key and broker, signed by the CA."""
        broker = self._broker.address("", self._keys.ca_pem.decode())
        return self._card.current(
            self._keys.ca_key,
            self.identity.public,
            broker,
            self._keys.issuer,
            self._old_ca_until(),
            *(self._settings.public_addresses, self._settings.download_addresses),
        )

    def _old_ca_until(self) -> float:
        """Until when certificates of the CA before count: 0 once all peers have new ones."""
        behind = self.registry.behind & self.registry.peers.keys()
        return self._steps[-1].old_until if self._steps and behind else 0.0

    async def command(self, peer: str, command: Command) -> str:
        """Send an operator's command. Returns a sentence about it. Raises Unreachable."""
        await self._publisher.command(peer, command)
        return f"{command.action} sent to {self._peers.name_of(peer)}"

    def _run_context(self) -> RunContext:
        return RunContext(
            ledger=self._ledger,
            store=self.weight_store,
            transfer=self.transfer,
            grid=self._grid,
            sign=self._keys.sign_key.sign,
            verify=self.registry.verify,
            is_own_signature=partial(identity.verify, self.identity.public),
            eligible=self._sessions.eligible,
            node_of=self._sessions.node_of,
            peer_of=self._sessions.peer_of,
            name_of=self._peers.name_of,
            ring=self._peers.announce_work,
            publish=self._publisher.publish,
            refused=self._refused,
            enrolled=lambda: frozenset(peer.peer for peer in self.registry.enrolled()),
            online=self._sessions.online,
            refresh_online=self._peers.refresh_online,
            ticket_of=self.registry.ticket_of,
            fleet=self.identity.fleet,
            check_fleet=FleetNames(self.identity.fleet).check,
            log_head=self.version_log.head,
            tell_owner=self._tell_owner,
        )

    def _tell_owner(self, peer: str, text: str) -> None:
        self._notices.put(peer, text)
        self._peers.announce_work([peer])

    def _awaits(self, peer: str) -> tuple[str, Awaited]:
        return self.runs.awaits(peer) or self.jobs.awaits(peer) or ("", "consent")

    def _forget_peer(self, peer: str) -> None:
        self.transfer.forget(peer)
        self.job_transfer.forget(peer)
        self._witnesses.forget(peer)
        self._notices.forget(peer)

    def _announce_offers(self, text: str) -> None:
        self._publisher.publish(EventLine(level="info", text=strip_controls(text)))
        self._peers.announce_work([peer.peer for peer in self.registry.enrolled()])

    def _report_contradiction(self, text: str, peer: str) -> None:
        log.error("%s", text)
        self._publisher.publish(EventLine(level="error", text=strip_controls(text), subject=peer))

    def _on_broker(self, up: bool, reason: str) -> None:
        if not up:
            log.warning("the MQTT broker is down: %s", reason)
