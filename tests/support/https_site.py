"""The HTTPS part of a coordinator in a thread with a real TLS server, and enrolled machines."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.home.credentials import Credentials
from coordinator.api.app import make_app
from coordinator.api.fast_path import with_fast_path
from coordinator.api.service import Identity
from coordinator.fleet.auth import Auth
from coordinator.fleet.members import Peer
from coordinator.fleet.registry import Registry
from coordinator.fleet.state import Fleet
from coordinator.jobs.store import MAX_ANSWER_BYTES, JobStore
from coordinator.storage.fleet_cards import CardFile
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.storage.weight_store import WeightStore
from coordinator.transport.flower import Superlink
from coordinator.transport.flower_grid import InProcessGrid
from coordinator.transport.flower_sessions import FLEET_PREFIX, sessions_app
from coordinator.transport.http_server import Server, listen
from coordinator.transport.piece_sources import PieceSources
from coordinator.transport.sharing import SharingRoutes
from coordinator.transport.weights import WeightTransfer
from protocols.enrollment import certificates, identity, signed_requests, tickets
from protocols.enrollment.ca_chain import Transition, sign_transition
from protocols.enrollment.joining import JoinRequest, join_proof
from protocols.local.atomic_files import write_private
from protocols.messages.mqtt import MqttAddress
from protocols.messages.work import PollRequest, PollResponse

HOST = "127.0.0.1"


class Machine:
    """An agent's keys and its signed requests."""

    def __init__(self, name: str = "box") -> None:
        self.name = name
        self.sign_key, self.node_key = identity.new_signing_key(), identity.new_node_key()
        self.peer = identity.peer_id(identity.public_bytes(self.sign_key))
        self.fleet = ""

    def joining(self, ticket: tickets.Ticket, **changed: Any) -> JoinRequest:
        fields: dict[str, Any] = {
            "ticket": ticket.id,
            "secret": ticket.secret,
            "name": self.name,
            "sign_public": identity.public_bytes(self.sign_key),
            "node_public": identity.node_public_pem(self.node_key),
            "version": "0",
        }
        fields |= changed
        signed = join_proof(fields["ticket"], fields["secret"], fields["node_public"])
        return JoinRequest(**({"proof": self.sign_key.sign(signed)} | fields))

    def headers(
        self, method: str, path: str, body: bytes = b"", digest: str = ""
    ) -> dict[str, str]:
        sha256 = digest or hashlib.sha256(body).hexdigest()
        return signed_requests.sign_headers(
            self.peer, self.sign_key.sign, method, path, sha256, self.fleet
        )


class Site:
    """Registry, lane and our routes over one folder; Flower's too with `flower=True`.

    It is the `CoordinatorService` of the routes. `requests` lists method and path of each request.
    """

    def __init__(self, folder: Path, *, flower: bool = False, approve: bool = False) -> None:
        self.folder = folder
        self.ca_key, self.ca_pem = certificates.new_ca("test")
        self._certify()
        self.sign_key, self.operator_key = (identity.new_signing_key() for _ in range(2))
        self.fleet_id = certificates.fleet_id(self.ca_pem)
        public = identity.public_bytes(self.sign_key)
        self.identity = Identity(self.fleet_id, self.ca_pem, public)
        self.cards = CardFile(folder, self.ca_pem)
        self.ledger = SqliteLedger(folder / "ledger.db")
        self.registry = Registry(self.ledger, approve=approve)
        self.fleet = Fleet(fleet=self.fleet_id, name="test")
        self.lane, self.job_lane = WeightStore(folder), JobStore(folder / "jobs")
        self.transfer = WeightTransfer(self.lane)
        self.transfer.limits.max_bytes = 1 << 20
        self.job_transfer = WeightTransfer(self.job_lane, MAX_ANSWER_BYTES)
        self.auth = Auth(self.registry, identity.public_bytes(self.operator_key), self.fleet_id)
        self.holders = PieceSources()
        self.sharing = SharingRoutes(self.lane, self.registry, self.holders, self.sign_key.sign)
        #: There are none, also for an agent that asks for a run's version to compare.
        self.runs: Any = SimpleNamespace(all=list)
        self.requests: list[tuple[str, str]] = []
        self.heard: list[tuple[str, int]] = []
        self.nodes: dict[str, int] = {}
        self._sockets = [listen(HOST, 0)]
        self.address = f"{HOST}:{self._sockets[0].getsockname()[1]}"
        if flower:
            self.superlink = Superlink()
            self.superlink.on_request = lambda action, node: self.heard.append((action, node))
            self.grid = InProcessGrid(self.superlink)
            self.registry.on_change = self._admit

    def _certify(self) -> None:
        key, pem = certificates.new_server_certificate(
            self.ca_key, self.ca_pem, ["localhost", HOST]
        )
        write_private(self.folder / "server.key", identity.private_pem(key))
        (self.folder / "server.pem").write_bytes(pem)

    def replace_ca(self) -> None:
        """Replace the CA, as `keys rotate ca` does while the coordinator is stopped."""
        key, pem = certificates.new_ca("test")
        step = Transition(
            fleet=self.fleet_id,
            counter=len(self.identity.chain) + 1,
            old_ca=self.ca_pem,
            new_ca=pem,
            at=time.time(),
            old_until=time.time() + 60,
        )
        chain = (*self.identity.chain, sign_transition(self.ca_key, step))
        self.ca_key, self.ca_pem = key, pem
        self.identity = self.identity._replace(ca_pem=pem, chain=chain)
        self.cards = CardFile(self.folder, pem, chain)
        self.registry.record_key("ca", certificates.ca_fingerprint(pem).hex()[:16])
        self._certify()

    @classmethod
    def again(cls, stopped: Site) -> Site:
        """The site of a stopped one, with its keys and its registry."""
        site = cls(stopped.folder)
        site.ca_key, site.ca_pem, site.sign_key = stopped.ca_key, stopped.ca_pem, stopped.sign_key
        site.fleet_id, site.identity = stopped.fleet_id, stopped.identity
        public = identity.public_bytes(site.operator_key)
        site.auth = Auth(site.registry, public, site.fleet_id)
        return site

    def _admit(self, peer: Peer) -> None:
        if peer.standing == "enrolled" and peer.peer not in self.nodes:
            self.nodes[peer.peer] = self.superlink.register_node(peer.node_public)

    # --- CoordinatorService ---

    def addresses(self) -> tuple[str, ...]:
        return (self.address,)

    def mqtt_for(self, host: str, user: str) -> MqttAddress:
        return MqttAddress(host=host, port=1883, user=user, password="word")

    def fleet_card(self) -> bytes:
        public = identity.public_bytes(self.sign_key)
        return self.cards.current(self.ca_key, public, self.mqtt_for("", ""))

    async def poll(self, peer: str, asked: PollRequest) -> PollResponse:
        if asked.update:
            await self.transfer.receive_inline(peer, asked.update)
        answer = await asyncio.to_thread(self.superlink.poll, self.nodes[peer], asked)
        self.heard.append(("exchange", self.nodes[peer]))
        return answer

    def app(self) -> ASGIApp:
        ours = with_fast_path(
            make_app(self, self.auth, self.ca_key)  # type: ignore[arg-type]
        )
        flower = sessions_app(self.superlink, self.auth) if hasattr(self, "superlink") else ours

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self.requests.append((scope["method"], scope["path"]))
            inner = flower if scope["path"].startswith(FLEET_PREFIX) else ours
            await inner(scope, receive, send)

        return app

    # --- machines and tickets ---

    def ticket(self, *, ttl_s: float = 60.0, uses: int = 1) -> tickets.Ticket:
        made = tickets.new_ticket(self.addresses(), certificates.ca_fingerprint(self.ca_pem))
        self.registry.create_ticket(made, ttl_s=ttl_s, uses=uses)
        return made

    def enroll(self, name: str = "box") -> Machine:
        machine = Machine(name)
        machine.fleet = self.fleet_id
        self.registry.join(machine.joining(self.ticket()))
        return machine

    def credentials(self, machine: Machine) -> Credentials:
        return Credentials(
            self.address,
            self.ca_pem,
            machine.peer,
            machine.node_key,
            machine.sign_key,
            machine.fleet,
        )

    def operator(self, method: str, path: str, body: bytes = b"") -> dict[str, str]:
        digest = hashlib.sha256(body).hexdigest()
        return signed_requests.sign_headers(
            "operator", self.operator_key.sign, method, path, digest, self.fleet_id
        )

    def http(self) -> httpx.Client:
        context = ssl.create_default_context(cadata=self.ca_pem.decode())
        return httpx.Client(base_url=f"https://{self.address}", verify=context, timeout=20)

    @contextmanager
    def up(self) -> Iterator[Site]:
        """Serve from a thread with its own event loop."""
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        ready, loop = threading.Event(), asyncio.new_event_loop()
        server = Server(
            self.app(),
            self._sockets.pop(),
            self.folder / "server.pem",
            self.folder / "server.key",
        )

        async def serve() -> None:
            serving = asyncio.create_task(server.serve())
            await server.wait_started(serving)
            ready.set()
            await serving

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
        thread.start()
        try:
            assert ready.wait(30)
            yield self
        finally:
            server.should_exit = True
            thread.join()
            loop.close()
            self.ledger.close()
