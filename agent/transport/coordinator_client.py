"""The agent's link to the coordinator: a Flower session, messages, and the weight lane.

A session is opened and closed over Flower's Fleet routes; a message with its objects, about 14
requests there, is one request on our exchange route, which calls Flower's own handlers and counts
as a heartbeat: who asks for work often enough sends no other.

With `coordinator/transport/flower.py` the only file that uses Flower's private names (1.41).
Blocking, for use from worker threads. Stock `http_request_response` is not used: it ends the
process on a failed start, sends SIGINT to it on HTTP 401 and makes a new identity each time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from base64 import b64encode
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import httpx
import msgspec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from agent.home.credentials import Credentials
from agent.transport.bandwidth import Bandwidth
from agent.transport.http_client import HttpxTransport
from agent.transport.weight_transfer import WeightTransfer, map_errors, raise_for_status
from protocols.enrollment.identity import node_public_pem
from protocols.enrollment.joining import (
    ENROLLMENT_STATUS_PATH,
    LEAVE_PATH,
    MQTT_PATH,
    RENEW_PATH,
    EnrollmentStatus,
)
from protocols.errors import Refused, Unreachable
from protocols.failpoints import failpoint
from protocols.messages.envelope import LOGS_PATH, LogResponse
from protocols.messages.mqtt import MqttAddress
from protocols.messages.work import (
    INLINE_MAX_BYTES,
    POLL_PATH,
    FlowerMessage,
    PollRequest,
    PollResponse,
)
from protocols.network import addresses
from protocols.p2p.gossip import NEIGHBORS_PATH, NeighborsResponse
from protocols.p2p.swarm import (
    DOWNLOAD_REPORT_PATH,
    PLAN_PATH,
    DownloadPlan,
    DownloadPlanRequest,
    DownloadReport,
)

T = TypeVar("T")

logging.getLogger("flwr").setLevel(logging.CRITICAL)

#: Flower calls a node offline after two missed heartbeats: a lost agent is seen within 40 s.
HEARTBEAT_S = 20.0
#: Longer than an idle agent's poll, so that the poll is its heartbeat.
HEARTBEAT_EVERY_S = 0.8 * HEARTBEAT_S
_DEACTIVATE_TIMEOUT_S = 3.0


class _InlineUpdate(NamedTuple):
    """A small update in a file."""

    digest: str
    source: Path


class _RequestSigner:
    """Signs Flower's requests twice: with the node key, as its server asks, and as ours.

    Flower's own NodeAuthHttpInterceptor would bring FastAPI along: 20 MB in each idle agent. What
    it signs is a timestamp alone.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._public = b64encode(node_public_pem(credentials.node_key)).decode()

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        request, timestamp = context.request, now().isoformat()
        signature = sign_message(self._credentials.node_key, timestamp.encode())
        request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._public
        request.headers[TIMESTAMP_HEADER] = timestamp
        request.headers[FLEET_HTTP_SIGNATURE_HEADER] = b64encode(signature).decode()
        digest = hashlib.sha256(request.content).hexdigest()
        request.headers.update(self._credentials.sign_request("POST", request.url.path, digest))
        return call_next(context)


class CoordinatorClient(WeightTransfer):
    """One session with the coordinator.

    Every method raises Unreachable when nobody answers and SessionLost when the coordinator no
    longer knows the session (it was restarted, or this machine was removed). `bandwidth` counts and
    slows the weight lane alone; the rest is small.
    """

    def __init__(self, credentials: Credentials, bandwidth: Bandwidth | None = None) -> None:
        super().__init__(credentials, bandwidth)
        # Without the address's path: it is no part of what is signed, and the wire puts it before.
        base = f"https://{addresses.parse(credentials.address).netloc}"
        self._http = httpx.Client(base_url=base, transport=HttpxTransport(self._http_client))
        self._fleet = FleetHttpClient(base, interceptors=[_RequestSigner(credentials)])
        # Flower's client gives no way to say so, and a second pool is a second connection.
        self._fleet._client = self._http
        self._node: Node | None = None
        self._heard_at = 0.0
        #: Goes with the next answer.
        self._attached: _InlineUpdate | None = None
        #: The coordinator has written down what became of the last reply.
        self.settled = False

    def reconnect(self) -> None:
        """Let go of all connections, and make others when they are needed."""
        self._http_client.drop_connections()

    @property
    def ends(self) -> tuple[str, str]:
        """The last connection's IP addresses, ours and the other's; empty before the first."""
        return self._http_client.peer_addresses

    def open(self) -> None:
        """Open a session: from now on the coordinator may send work."""
        with map_errors():
            answer = self._fleet.ActivateNode(
                ActivateNodeRequest(
                    public_key=node_public_pem(self._credentials.node_key),
                    heartbeat_interval=HEARTBEAT_S,
                )
            )
        self._node = Node(node_id=answer.node_id)
        self._heard_at = time.monotonic()

    def check(self) -> None:
        """Prove the node key on Flower's side without a session: nothing changes there.

        Flower looks at signature and key first, and then refuses the heartbeat that no node has.
        """
        with map_errors():
            try:
                self._fleet.ActivateNode(
                    ActivateNodeRequest(
                        public_key=node_public_pem(self._credentials.node_key), heartbeat_interval=0
                    )
                )
            except httpx.HTTPStatusError as err:
                if err.response.status_code != 400:
                    raise

    def close(self) -> None:
        """Say goodbye if anybody listens, and drop the connections."""
        if self._node is not None:
            self._http_client.timeout_s = _DEACTIVATE_TIMEOUT_S
            try:
                with map_errors():
                    self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
            except (Unreachable, Refused):
                pass  # it will see the missing heartbeat
        self._node = None
        self._http.close()

    def beat(self) -> None:
        """One heartbeat: an exchange of nothing."""
        self._exchange(None, want=False)

    @property
    def beat_due_s(self) -> float:
        """Seconds until a heartbeat is due; every exchange is one."""
        return self._heard_at + HEARTBEAT_EVERY_S - time.monotonic()

    def mqtt(self) -> MqttAddress:
        """The broker and the login for it, as they are now: the password changes now and then."""
        with map_errors():
            answer = self._http.get(MQTT_PATH, headers=self._signed("GET", MQTT_PATH))
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=MqttAddress)

    def standing(self) -> EnrollmentStatus:
        """How this machine stands with the coordinator; needs no session."""
        with map_errors():
            answer = self._http.get(
                ENROLLMENT_STATUS_PATH, headers=self._signed("GET", ENROLLMENT_STATUS_PATH)
            )
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=EnrollmentStatus)

    def leave(self) -> None:
        """Ask the coordinator to refuse this machine's key from now on; needs no session."""
        with map_errors():
            self._http.post(LEAVE_PATH, headers=self._signed("POST", LEAVE_PATH)).raise_for_status()

    def tell_logs(self, told: LogResponse) -> None:
        """Answer the operator's question for log lines."""
        self._post(LOGS_PATH, msgspec.json.encode(told))

    def renew(self) -> bytes:
        """A new node certificate for the same keys."""
        with map_errors():
            answer = self._http.post(RENEW_PATH, headers=self._signed("POST", RENEW_PATH))
            answer.raise_for_status()
        return answer.content

    def pull(self) -> Message | None:
        """The next message for this agent, or None."""
        return self._exchange(None, want=True)

    def push(self, reply: Message) -> None:
        """Send a reply. One that nobody waits for any more is taken and dropped."""
        self._exchange(reply, want=False)

    def exchange(self, reply: Message) -> Message | None:
        """Send a reply and take the next message in the same request."""
        return self._exchange(reply, want=True)

    def _exchange(self, reply: Message | None, *, want: bool) -> Message | None:
        attached, update = None, b""
        if reply is not None:  # a heartbeat may come in between
            attached, self._attached = self._attached, None
        if attached is not None and reply is not None and not reply.has_error():
            update = attached.source.read_bytes()
        packed = _pack(reply) if reply is not None else None
        body = msgspec.msgpack.encode(PollRequest(reply=packed, wants_work=want, update=update))
        headers = self._signed("POST", POLL_PATH, hashlib.sha256(body).hexdigest())
        with map_errors():
            asked_at = time.monotonic()
            answer = self._http_client.request("POST", POLL_PATH, headers, body)
            if attached is not None and answer.status in (413, 507):
                self.upload(attached.digest, attached.source)  # says why, or succeeds now
                return self._exchange(reply, want=want)
            raise_for_status(answer.status)
            self.bytes_up += len(update)
            self._heard_at = asked_at
            told = msgspec.msgpack.decode(answer.body, type=PollResponse)
            if told.work is not None:
                self._inline_version = told.version
            if reply is not None:  # a heartbeat may come between a reply and the look at this
                self.settled = told.acknowledged
            return _unpack(told.work) if told.work is not None else None

    def plan(self, digest: str, asked: DownloadPlanRequest) -> DownloadPlan:
        """Where a version can be had from, piece by piece."""
        return self._post_json(PLAN_PATH.format(digest=digest), asked, DownloadPlan)

    def announce_version(self, digest: str, held: DownloadReport) -> None:
        """Say that a version is here now, and who helped."""
        self._post(DOWNLOAD_REPORT_PATH.format(digest=digest), msgspec.json.encode(held))

    def neighbours(self, asked: DownloadPlanRequest) -> NeighborsResponse:
        """Whom to ask while the coordinator is away; it hears where this agent serves."""
        return self._post_json(NEIGHBORS_PATH, asked, NeighborsResponse)

    def _post_json(self, path: str, asked: DownloadPlanRequest, kind: type[T]) -> T:
        with map_errors():
            return msgspec.json.decode(self._post(path, msgspec.json.encode(asked)), type=kind)

    def _post(self, path: str, body: bytes) -> bytes:
        headers = self._signed("POST", path, hashlib.sha256(body).hexdigest())
        with map_errors():
            answer = self._http.post(path, content=body, headers=headers)
            answer.raise_for_status()
            return answer.content

    def upload_update(self, digest: str, source: Path) -> None:
        """Send an update's bytes: few of them with the answer that is pushed next."""
        if source.stat().st_size > INLINE_MAX_BYTES:
            self.upload(digest, source)
            return
        self._attached = _InlineUpdate(digest, source)
        failpoint("agent.upload.piece")


def _pack(reply: Message) -> FlowerMessage:
    """A reply with all its objects."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        return FlowerMessage(
            message=message_to_proto(remove_content_from_message(reply)).SerializeToString(),
            tree=get_object_tree(reply).SerializeToString(),
            objects={object_id: part.deflate() for object_id, part in objects.items()},
        )


def _unpack(work: FlowerMessage) -> Message:
    head = ProtoMessage()
    head.ParseFromString(work.message)
    message_id = head.metadata.message_id
    message = cast(Message, inflate_object_from_contents(message_id, dict(work.objects)))
    message.metadata.__dict__["_message_id"] = message_id
    return message
