"""What hostile strangers and members need: signatures, raw sockets, a look at the state."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import sign_message

from agent.home.credentials import Credentials
from coordinator.daemon.coordinator import Coordinator
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.enrollment import certificates, identity, signed_requests, tickets
from tests.support.https_site import HOST, Machine
from tests.support.in_process_fleet import Fleet

#: All that a refusal may say.
BARE = {b"", b"Unauthorized", b"Forbidden", b"Not Found", b"Precondition Failed"}
REFUSED = {401, 403, 404, 412}
PROTOBUF = {"content-type": "application/protobuf"}


class State(NamedTuple):
    """What no refused request may change."""

    ledger: int
    questions: int
    replies: int
    objects: int
    sessions: frozenset[str]
    standings: tuple[tuple[str, str], ...]
    tickets: int
    spool: tuple[str, ...]


def state_of(fleet: Fleet) -> State:
    hub = fleet.hub
    ledger = SqliteLedger(fleet.home / "ledger.db")
    entries = len(list(ledger.entries()))
    ledger.close()
    linkstate = hub._superlink.state
    return State(
        ledger=entries,
        questions=linkstate.num_message_ins(),
        replies=linkstate.num_message_res(),
        objects=len(linkstate.object_store),
        sessions=hub._sessions._online,
        standings=tuple((p.peer, p.standing) for p in hub.registry.peers.values()),
        tickets=sum(ticket.uses_left for ticket in hub.registry.tickets.values()),
        spool=tuple(sorted(path.name for path in (fleet.home / "spool").iterdir())),
    )


def enroll(hub: Coordinator, name: str) -> Machine:
    """A machine that has joined and runs no agent."""
    machine = Machine(name)
    ticket = tickets.new_ticket(hub.addresses(), bytes(32))
    hub.registry.create_ticket(ticket, ttl_s=60, uses=1)
    machine.fleet = hub.identity.fleet
    hub.registry.join(machine.joining(ticket))
    return machine


def client(fleet: Fleet) -> httpx.Client:
    context = ssl.create_default_context(cadata=fleet.keys.ca_pem.decode())
    return httpx.Client(base_url=f"https://{HOST}:{fleet.port}", verify=context, timeout=20)


def ours(
    machine: Machine, method: str, path: str, body: bytes = b"", sender: str = ""
) -> dict[str, str]:
    """Our signature by this machine's key, in its own name or in another's."""
    digest = hashlib.sha256(body).hexdigest()
    return signed_requests.sign_headers(
        sender or machine.peer, machine.sign_key.sign, method, path, digest, machine.fleet
    )


def flowers(machine: Machine, claimed: bytes = b"") -> dict[str, str]:
    """Flower's signature by this machine's key, for its own key or for another's."""
    timestamp = now().isoformat()
    public = claimed or identity.node_public_pem(machine.node_key)
    signature = sign_message(machine.node_key, timestamp.encode())
    return PROTOBUF | {
        "flwr-public-key": b64encode(public).decode(),
        TIMESTAMP_HEADER: timestamp,
        "flwr-signature": b64encode(signature).decode(),
    }


def fleet_bodies(node_id: int, node_public: bytes, run_id: int) -> dict[str, bytes]:
    """A well-formed request for each of Flower's Fleet routes, in the name of this node."""
    node = Node(node_id=node_id)
    made: dict[str, Any] = {
        "register-node": fleet_pb2.RegisterNodeFleetRequest(public_key=node_public),
        "activate-node": fleet_pb2.ActivateNodeRequest(
            public_key=node_public, heartbeat_interval=30
        ),
        "deactivate-node": fleet_pb2.DeactivateNodeRequest(node_id=node_id),
        "unregister-node": fleet_pb2.UnregisterNodeFleetRequest(node_id=node_id),
        "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(
            node=node, heartbeat_interval=30
        ),
        "pull-messages": fleet_pb2.PullMessagesRequest(node=node),
        "push-messages": fleet_pb2.PushMessagesRequest(node=node),
        "get-run": GetRunRequest(node=node, run_id=run_id),
        "get-fab": GetFabRequest(node=node, run_id=run_id, hash_str="0" * 64),
        "push-object": message_pb2.PushObjectRequest(
            node=node, run_id=run_id, object_id="0" * 64, object_content=b"x"
        ),
        "pull-object": message_pb2.PullObjectRequest(node=node, run_id=run_id, object_id="0" * 64),
        "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest(
            node=node, run_id=run_id, message_object_id="0" * 64
        ),
    }
    return {action: message.SerializeToString() for action, message in made.items()}


def plain(port: int, timeout_s: float = 20.0) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=timeout_s)


def secure(port: int, ca_pem: str, timeout_s: float = 20.0) -> ssl.SSLSocket:
    context = ssl.create_default_context(cadata=ca_pem)
    return context.wrap_socket(plain(port, timeout_s), server_hostname=HOST)


def answer_to(sock: socket.socket, sent: bytes) -> bytes:
    """What comes back until the other side closes or says nothing more; empty for a reset."""
    got = bytearray()
    try:
        sock.sendall(sent)
    except OSError:
        pass
    try:
        while piece := sock.recv(65536):
            got += piece
    except OSError:
        pass
    return bytes(got)


@contextmanager
def bounded_growth(pid: int, most_mb: float, what: str) -> Iterator[None]:
    """Fail if the process is more than this larger at the end of the block; prints the figure."""
    process = psutil.Process(pid)
    before = process.memory_info().rss
    yield
    grown = (process.memory_info().rss - before) / 1e6
    print(f"{what}: resident memory {before / 1e6:.0f} MB, grown by {grown:.1f} MB")
    assert grown < most_mb


def files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


class LyingCoordinator:
    """An HTTPS server with the fleet's certificate that answers each request as `answer` does.

    `answer(head, send)` gets the request's head and sends raw bytes. Its keys sign work.
    """

    def __init__(self, folder: Path, answer: Callable[[bytes, Callable[[bytes], None]], None]):
        folder.mkdir(parents=True, exist_ok=True)
        ca_key, self.ca_pem = certificates.new_ca("test")
        key, pem = certificates.new_server_certificate(ca_key, self.ca_pem, ["localhost", HOST])
        (folder / "server.key").write_bytes(identity.private_pem(key))
        (folder / "server.pem").write_bytes(pem)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(folder / "server.pem", folder / "server.key")
        self.sign_key = identity.new_signing_key()
        self.public = identity.public_bytes(self.sign_key)
        self.answer, self.requests = answer, 0
        self._listener = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"
        self.fleet = certificates.ca_fingerprint(self.ca_pem).hex()[:16]

    def credentials(self, machine: Machine) -> Credentials:
        return Credentials(
            self.address, self.ca_pem, machine.peer, machine.node_key, machine.sign_key
        )

    @contextmanager
    def up(self) -> Iterator[LyingCoordinator]:
        thread = threading.Thread(target=self._accept)
        thread.start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            self._tls.wrap_socket(accepted, server_side=True) as sock,
        ):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (piece := sock.recv(65536)):
                    return
                head += piece
            self.requests += 1
            self.answer(head, sock.sendall)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1)
