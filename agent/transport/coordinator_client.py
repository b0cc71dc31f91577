"""The agent's client for the coordinator: a Flower session and its messages.

The client opens and closes a session over Flower's Fleet routes. A message with its objects takes
about 14 requests there. Our exchange route needs one: it calls Flower's own handlers and counts as
a heartbeat, so a polling agent sends no other heartbeat.

This file, `coordinator/transport/flower.py`, `flower_sessions.py` there and
`commonweight/flower_apps/flower_names.py` are the only ones that use Flower's private names (1.41,
1.42). Blocking, for use from worker threads. Stock `http_request_response` is not used: it ends the
process on a failed start, sends SIGINT on HTTP 401 and makes a new identity each time.
"""

from __future__ import annotations

import logging
import os
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import cast

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import msgspec
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, DeactivateNodeRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.message import Message as ProtobufMessage

from agent.home.credentials import Credentials
from agent.transport.bandwidth import Bandwidth
from agent.transport.coordinator_requests import CoordinatorRequests
from agent.transport.http_client import Response
from agent.transport.weight_transfer import (
    map_parse_errors,
    raise_for_status,
    raise_for_upload,
)
from protocols.enrollment.identity import node_public_pem
from protocols.errors import Unreachable
from protocols.local.failpoints import failpoint
from protocols.messages import work as messages
from protocols.messages.version_log import LogNews
from protocols.messages.work import (
    FlowerMessage,
    OpenSum,
    PollRequest,
    PollResponse,
)

logging.getLogger("flwr").setLevel(logging.CRITICAL)

#: Flower marks a node offline after two missed heartbeats, so within 40 s.
HEARTBEAT_S = 20.0
#: Longer than an idle agent's poll interval, so that the poll is the heartbeat.
HEARTBEAT_EVERY_S = 0.8 * HEARTBEAT_S
_DEACTIVATE_TIMEOUT_S = 3.0


class CoordinatorClient(CoordinatorRequests):
    """One session with the coordinator.

    Every method raises Unreachable without an answer, and SessionLost when the coordinator no
    longer knows the session (it was restarted, or this machine was removed). `bandwidth` counts
    and limits the transfer of weights; other requests are small.
    """

    def __init__(self, credentials: Credentials, bandwidth: Bandwidth | None = None) -> None:
        super().__init__(credentials, bandwidth)
        self._node_public = node_public_pem(credentials.node_key)
        self._node: Node | None = None
        self._heard_at = 0.0
        #: Digest and file of a small update that travels with the next reply.
        self._attached: tuple[str, Path] | None = None
        #: True once the coordinator has written the result of the last reply to its ledger.
        self.acknowledged = False
        #: True if the answer to the last `pull` said that its open sum is over.
        self.sum_is_over = False
        #: The next poll says that work which was refused before may be sent again.
        self.owner_has_decided = False
        #: Returns the statement about the log of versions to send with a request; and gets its
        #: news.
        self.log_statement: Callable[[], bytes | None] = lambda: None
        self.on_log_news: Callable[[LogNews], None] = lambda news: None
        #: Returns the statement about the owner's charges to send with a request; and gets an
        #: earlier one.
        self.charged_statement: Callable[[], bytes] = bytes
        self.on_charged: Callable[[bytes], None] = lambda data: None
        #: The run that this machine works for, or empty; and what is called when it has ended.
        self.working_for: Callable[[], str] = str
        self.on_run_over: Callable[[str], None] = lambda run: None
        #: Gets each line that the coordinator has for the owner.
        self.on_notice: Callable[[str], None] = lambda text: None
        #: Gets the number of the newest list of offered tasks, with each answer.
        self.on_offers: Callable[[int], None] = lambda number: None

    def reconnect(self) -> None:
        """Closes all connections. New ones open on demand."""
        self._http_client.drop_connections()
        self.replicas.drop_connections()

    @property
    def peer_addresses(self) -> tuple[str, str]:
        """Local and remote IP address of the last connection; empty before the first."""
        return self._http_client.peer_addresses

    @property
    def places(self) -> tuple[str, ...]:
        """The coordinator's addresses, the one that worked last first."""
        return self._http_client.places

    def use(self, places: tuple[str, ...]) -> None:
        """Connects to these addresses from now on, in this order."""
        self._http_client.places = places

    def open(self) -> None:
        """Opens a session, so that the coordinator can send work."""
        status, body = self._activate(HEARTBEAT_S)
        raise_for_status(status)
        with map_parse_errors():
            self._node = Node(node_id=ActivateNodeResponse.FromString(body).node_id)
        self._heard_at = time.monotonic()

    def check(self) -> None:
        """Checks that Flower accepts the node key, without opening a session.

        Flower verifies signature and key first, then refuses the heartbeat of an unknown node.
        """
        if (status := self._activate(0).status) != 400:
            raise_for_status(status)

    def _activate(self, interval_s: float) -> Response:
        return self._fleet_call(
            "activate-node",
            ActivateNodeRequest(public_key=self._node_public, heartbeat_interval=interval_s),
        )

    def _fleet_call(self, route: str, request: ProtobufMessage) -> Response:
        """Calls a route of Flower's server, which requires a timestamp signed by the node key.

        Flower's own client costs more: its signer imports FastAPI, 20 MB in each idle agent, and
        it opens a second connection.
        """
        path, body, timestamp = f"/v1/fleet/{route}", request.SerializeToString(), now().isoformat()
        signature = sign_message(self._credentials.node_key, timestamp.encode())
        headers = {
            "content-type": PROTOBUF_MEDIA_TYPE,
            "accept": PROTOBUF_MEDIA_TYPE,
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self._node_public).decode(),
            TIMESTAMP_HEADER: timestamp,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
        }
        return self._send("POST", path, body, headers)

    def close(self) -> None:
        """Ends the session if the coordinator answers in time, and closes the connections."""
        self.replicas.close()
        if self._node is not None:
            self._http_client.timeout_s = _DEACTIVATE_TIMEOUT_S
            with suppress(Unreachable):  # Flower notices the missing heartbeats
                self._fleet_call(
                    "deactivate-node", DeactivateNodeRequest(node_id=self._node.node_id)
                )
        self._node = None
        self._http_client.close()

    def heartbeat(self) -> None:
        """Sends a heartbeat: an empty exchange."""
        self._exchange(None, want=False)

    @property
    def heartbeat_due_s(self) -> float:
        """Seconds until the next heartbeat is due. Every exchange counts as one."""
        return self._heard_at + HEARTBEAT_EVERY_S - time.monotonic()

    def pull(self, *, steps_only: bool = False, open_sum: OpenSum | None = None) -> Message | None:
        """Returns the next message for this agent, or None.

        `steps_only`: only one with a step of a secure sum, as this agent is paused. `open_sum`: one
        that this agent still has secrets of.
        """
        return self._exchange(None, want=True, steps_only=steps_only, open_sum=open_sum)

    def push(self, reply: Message) -> None:
        """Sends a reply. The coordinator drops a reply that it no longer waits for."""
        self._exchange(reply, want=False)

    def exchange(self, reply: Message, *, steps_only: bool = False) -> Message | None:
        """Sends a reply and receives the next message in one request; see `pull`."""
        return self._exchange(reply, want=True, steps_only=steps_only)

    def _exchange(
        self,
        reply: Message | None,
        *,
        want: bool,
        steps_only: bool = False,
        open_sum: OpenSum | None = None,
    ) -> Message | None:
        attached, update, packed = None, b"", None
        if reply is not None:  # a heartbeat may run in between
            attached, self._attached = self._attached, None
            packed = pack_message(reply)
            if attached is not None and not reply.has_error():
                update = attached[1].read_bytes()
        decided, seen = self.owner_has_decided, self.log_statement()
        run = self.working_for() if reply is None else ""
        request = PollRequest(
            reply=packed,
            wants_work=want,
            update=update,
            owner_has_decided=decided,
            steps_only=steps_only,
            seen=seen,
            charged=self.charged_statement(),
            open_sum=open_sum,
            run=run,
        )
        body = msgspec.msgpack.encode(request)
        sent_at = time.monotonic()
        status, answer = self._send(
            "POST", messages.POLL_PATH, body, max_bytes=messages.MAX_POLL_RESPONSE_BYTES
        )
        if attached is not None and status in (410, 413, 507):
            self.upload(*attached)  # raises the reason, or succeeds now
            return self._exchange(reply, want=want, steps_only=steps_only)
        if reply is not None:
            raise_for_upload(status, answer)
        raise_for_status(status, answer)
        self.bytes_up += len(update)
        if decided:
            self.owner_has_decided = False
        self._heard_at = sent_at
        with map_parse_errors():
            response = msgspec.msgpack.decode(answer, type=PollResponse)
        if open_sum is not None:
            self.sum_is_over = response.sum_is_over
        if response.log is not None:
            self.on_log_news(response.log)
        if run and response.run_is_over:
            self.on_run_over(run)
        if response.charged:
            self.on_charged(response.charged)
        for text in response.notices:
            self.on_notice(text)
        if response.offers:
            self.on_offers(response.offers)
        with map_parse_errors():
            if response.work is not None:
                self._inline_version = response.version
            if reply is not None:  # a heartbeat must not reset the result of a reply
                self.acknowledged = response.acknowledged
            if response.work is None:
                return None
            message = unpack_message(response.work)
            self._run = message.metadata.group_id
            return message

    def upload_update(self, digest: str, source: Path) -> None:
        """Uploads an update. A small one travels with the next reply instead."""
        if source.stat().st_size > messages.INLINE_MAX_BYTES:
            self.upload(digest, source)
            return
        self._attached = (digest, source)
        failpoint("agent.upload.piece")


def pack_message(reply: Message) -> FlowerMessage:
    """Serializes a reply with all its objects."""
    objects: dict[str, bytes] = {}
    with inflatable_object.no_object_id_recompute():
        tree = _deflate(reply, objects)
    reply.metadata.__dict__["_message_id"] = tree.object_id
    return FlowerMessage(
        message=message_to_proto(remove_content_from_message(reply)).SerializeToString(),
        tree=tree.SerializeToString(),
        objects=objects,
    )


def _deflate(part: InflatableObject, objects: dict[str, bytes]) -> ObjectTree:
    """Adds an object of a message and those in it to `objects`, by id; the tree of their ids.

    Flower's functions serialize each object twice, once only for its id.
    """
    if isinstance(part, Message):
        inner: Iterable[InflatableObject] = [part.content] if part.has_content() else []
    elif isinstance(part, RecordDict):
        inner = part.values()
    else:
        inner = (part.children or {}).values()
    trees = {tree.object_id: tree for tree in [_deflate(one, objects) for one in inner]}
    content = part.deflate()
    object_id = inflatable_object.get_object_id(content)
    # `deflate` of the object around this one asks for its id.
    part.__dict__["_object_id"] = object_id
    inflatable_object._get_computed_object_ids().add(object_id)
    objects[object_id] = content
    return ObjectTree(object_id=object_id, children=trees.values())


def unpack_message(work: FlowerMessage) -> Message:
    head = ProtoMessage()
    head.ParseFromString(work.message)
    message_id = head.metadata.message_id
    message = cast(Message, inflate_object_from_contents(message_id, dict(work.objects)))
    message.metadata.__dict__["_message_id"] = message_id
    return message
