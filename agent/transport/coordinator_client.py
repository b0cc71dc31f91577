"""The agent's client for the coordinator: a Flower session, messages and weight transfer.

The client opens and closes a session over Flower's Fleet routes. A message with its objects takes
about 14 requests there. Our exchange route needs one: it calls Flower's own handlers and counts as
a heartbeat, so a polling agent sends no other heartbeat.

This file and `coordinator/transport/flower.py` are the only ones that use Flower's private names
(1.41). Blocking, for use from worker threads. Stock `http_request_response` is not used: it ends
the process on a failed start, sends SIGINT on HTTP 401 and makes a new identity each time.
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

#: Flower marks a node offline after two missed heartbeats, so within 40 s.
HEARTBEAT_S = 20.0
#: Longer than an idle agent's poll interval, so that the poll is the heartbeat.
HEARTBEAT_EVERY_S = 0.8 * HEARTBEAT_S
_DEACTIVATE_TIMEOUT_S = 3.0


class _InlineUpdate(NamedTuple):
    """A small update that travels inside the next exchange."""

    digest: str
    source: Path


class _RequestSigner:
    """Signs Flower's requests twice: with the node key as its server requires, and as ours.

    Flower's own NodeAuthHttpInterceptor imports FastAPI, which costs each idle agent 20 MB. It
    signs a timestamp only.
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
    longer knows the session (it was restarted, or this machine was removed). `bandwidth` counts
    and limits the transfer of weights; other requests are small.
    """

    def __init__(self, credentials: Credentials, bandwidth: Bandwidth | None = None) -> None:
        super().__init__(credentials, bandwidth)
        # Without the path of the address: it is not signed, and the HTTP client adds it.
        base = f"https://{addresses.parse(credentials.address).netloc}"
        self._http = httpx.Client(base_url=base, transport=HttpxTransport(self._http_client))
        self._fleet = FleetHttpClient(base, interceptors=[_RequestSigner(credentials)])
        # Flower's client has no parameter for its transport; a second pool would connect twice.
        self._fleet._client = self._http
        self._node: Node | None = None
        self._heard_at = 0.0
        #: Travels with the next reply.
        self._attached: _InlineUpdate | None = None
        #: True once the coordinator has written the result of the last reply to its ledger.
        self.settled = False

    def reconnect(self) -> None:
        """Closes all connections. New ones open on demand."""
        self._http_client.drop_connections()

    @property
    def ends(self) -> tuple[str, str]:
        """Local and remote IP address of the last connection; empty before the first."""
        return self._http_client.peer_addresses

    def open(self) -> None:
        """Opens a session, so that the coordinator can send work."""
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
        """Checks that Flower accepts the node key, without opening a session.

        Flower verifies signature and key first, then refuses the heartbeat of an unknown node.
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
        """Ends the session if the coordinator answers in time, and closes the connections."""
        if self._node is not None:
            self._http_client.timeout_s = _DEACTIVATE_TIMEOUT_S
            try:
                with map_errors():
                    self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
            except (Unreachable, Refused):
                pass  # Flower notices the missing heartbeats
        self._node = None
        self._http.close()

    def beat(self) -> None:
        """Sends a heartbeat: an empty exchange."""
        self._exchange(None, want=False)

    @property
    def beat_due_s(self) -> float:
        """Seconds until the next heartbeat is due. Every exchange counts as one."""
        return self._heard_at + HEARTBEAT_EVERY_S - time.monotonic()

    def mqtt(self) -> MqttAddress:
        """Requests the broker's address and login. The password changes from time to time."""
        with map_errors():
            answer = self._http.get(MQTT_PATH, headers=self._signed("GET", MQTT_PATH))
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=MqttAddress)

    def standing(self) -> EnrollmentStatus:
        """Requests this machine's enrollment status. Needs no session."""
        with map_errors():
            answer = self._http.get(
                ENROLLMENT_STATUS_PATH, headers=self._signed("GET", ENROLLMENT_STATUS_PATH)
            )
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=EnrollmentStatus)

    def leave(self) -> None:
        """Asks the coordinator to revoke this machine's key. Needs no session."""
        with map_errors():
            self._http.post(LEAVE_PATH, headers=self._signed("POST", LEAVE_PATH)).raise_for_status()

    def tell_logs(self, told: LogResponse) -> None:
        """Sends the log lines that an operator requested."""
        self._post(LOGS_PATH, msgspec.json.encode(told))

    def renew(self) -> bytes:
        """Requests a new node certificate for the same keys."""
        with map_errors():
            answer = self._http.post(RENEW_PATH, headers=self._signed("POST", RENEW_PATH))
            answer.raise_for_status()
        return answer.content

    def pull(self) -> Message | None:
        """Returns the next message for this agent, or None."""
        return self._exchange(None, want=True)

    def push(self, reply: Message) -> None:
        """Sends a reply. The coordinator drops a reply that it no longer waits for."""
        self._exchange(reply, want=False)

    def exchange(self, reply: Message) -> Message | None:
        """Sends a reply and receives the next message in one request."""
        return self._exchange(reply, want=True)

    def _exchange(self, reply: Message | None, *, want: bool) -> Message | None:
        attached, update = None, b""
        if reply is not None:  # a heartbeat may run in between
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
                self.upload(attached.digest, attached.source)  # raises the reason, or succeeds now
                return self._exchange(reply, want=want)
            raise_for_status(answer.status)
            self.bytes_up += len(update)
            self._heard_at = asked_at
            told = msgspec.msgpack.decode(answer.body, type=PollResponse)
            if told.work is not None:
                self._inline_version = told.version
            if reply is not None:  # a heartbeat must not reset the result of a reply
                self.settled = told.acknowledged
            return _unpack(told.work) if told.work is not None else None

    def plan(self, digest: str, asked: DownloadPlanRequest) -> DownloadPlan:
        """Requests a download plan: which peers hold which pieces of a version."""
        return self._post_json(PLAN_PATH.format(digest=digest), asked, DownloadPlan)

    def announce_version(self, digest: str, held: DownloadReport) -> None:
        """Reports that this agent holds a version, and which peers sent pieces."""
        self._post(DOWNLOAD_REPORT_PATH.format(digest=digest), msgspec.json.encode(held))

    def neighbours(self, asked: DownloadPlanRequest) -> NeighborsResponse:
        """Requests the peers to contact while the coordinator is away; reports our address."""
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
        """Uploads an update. A small one travels with the next reply instead."""
        if source.stat().st_size > INLINE_MAX_BYTES:
            self.upload(digest, source)
            return
        self._attached = _InlineUpdate(digest, source)
        failpoint("agent.upload.piece")


def _pack(reply: Message) -> FlowerMessage:
    """Serializes a reply with all its objects."""
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
