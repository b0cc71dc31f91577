"""The agent's link to the coordinator: a Flower session, messages, and the weight lane.

A session is opened and closed over Flower's Fleet routes; a message with its objects, about 14
requests there, is one request on our exchange route, which calls Flower's own handlers and counts
as a heartbeat: who asks for work often enough sends no other.

With `coordinator/superlink.py` the only file that uses Flower's private names (1.41). Blocking, for
use from worker threads. Stock `http_request_response` is not used: it ends the process on a failed
start, sends SIGINT to it on HTTP 401 and makes a new identity each time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

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
from google.protobuf.message import DecodeError

from agent.bandwidth import Bandwidth
from agent.settings import Enrolment
from agent.wire import OverWire, Wire
from protocols import identity, requests
from protocols.errors import BadWeights, Refused, Unreachable
from protocols.failpoints import failpoint
from protocols.gossip import NEIGHBOURS_PATH, Neighbours
from protocols.identity import NodeKey, SigningKey, node_public
from protocols.joining import LEAVE_PATH, MQTT_PATH, RENEW_PATH, STANDING_PATH, StandingAnswer
from protocols.messages import (
    EXCHANGE_PATH,
    FEW_BYTES,
    LOGS_PATH,
    Exchange,
    Exchanged,
    LogsTold,
    Parcel,
)
from protocols.mqtt import MqttAddress
from protocols.sharing import HELD_PATH, PLAN_PATH, Held, Plan, PlanAsked
from protocols.weights import file_digest, write_all

logging.getLogger("flwr").setLevel(logging.CRITICAL)

#: Flower calls a node offline after two missed heartbeats: a lost agent is seen within 40 s.
HEARTBEAT_S = 20.0
#: Longer than an idle agent's poll, so that the poll is its heartbeat.
BEAT_EVERY_S = 0.8 * HEARTBEAT_S
_TIMEOUT_S = 30.0
_GOODBYE_S = 3.0
#: A heartbeat must find the last one's connection: a TLS handshake costs more than it does. The
#: coordinator keeps one for 75 s.
CONNECTION_S = 60.0
_PIECE_BYTES = 1 << 20
VERSION_PATH = "/cw/v1/weights/{digest}"
UPDATE_PATH = "/cw/v1/updates/{digest}"


class Credentials(NamedTuple):
    """Who this agent is, and whom it trusts."""

    address: str
    ca_pem: bytes
    peer: str
    node_key: NodeKey
    sign_key: SigningKey

    @classmethod
    def of(cls, home: Path, enrolment: Enrolment) -> Credentials:
        """Those of the machine that joined in this home. Raises HomeFault."""
        return cls(
            address=enrolment.addresses[0],
            ca_pem=enrolment.ca_pem.encode(),
            peer=enrolment.peer,
            node_key=identity.load_node_key(home / "node.key"),
            sign_key=identity.load_signing_key(home / "sign.key"),
        )

    def signed(
        self, method: str, path: str, body_sha256: str = requests.EMPTY_SHA256
    ) -> dict[str, str]:
        """The headers of one request."""
        return requests.headers(self.peer, self.sign_key.sign, method, path, body_sha256)


class SessionLost(Refused):
    """The coordinator does not know this session: open a new one."""

    code = "session_lost"


class NoRoom(Unreachable):
    """The coordinator's disk is full: it takes the bytes when there is room again."""

    code = "no_room"


class _Attached(NamedTuple):
    """A small update in a file."""

    digest: str
    source: Path


class _Signed:
    """Signs Flower's requests twice: with the node key, as its server asks, and as ours.

    Flower's own NodeAuthHttpInterceptor would bring FastAPI along: 20 MB in each idle agent. What
    it signs is a timestamp alone.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._public = b64encode(node_public(credentials.node_key)).decode()

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        request, timestamp = context.request, now().isoformat()
        signature = sign_message(self._credentials.node_key, timestamp.encode())
        request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._public
        request.headers[TIMESTAMP_HEADER] = timestamp
        request.headers[FLEET_HTTP_SIGNATURE_HEADER] = b64encode(signature).decode()
        digest = hashlib.sha256(request.content).hexdigest()
        request.headers.update(self._credentials.signed("POST", request.url.path, digest))
        return call_next(context)


class Link:
    """One session with the coordinator.

    Every method raises Unreachable when nobody answers and SessionLost when the coordinator no
    longer knows the session (it was restarted, or this machine was removed). `bandwidth` counts and
    slows the weight lane; the rest is small.
    """

    def __init__(self, credentials: Credentials, bandwidth: Bandwidth | None = None) -> None:
        self._credentials, self._bandwidth = credentials, bandwidth
        self._wire = Wire(
            credentials.address,
            ssl.create_default_context(cadata=credentials.ca_pem.decode()),
            timeout_s=_TIMEOUT_S,
            kept_s=CONNECTION_S,
        )
        self._http = httpx.Client(
            base_url=f"https://{credentials.address}", transport=OverWire(self._wire)
        )
        self._fleet = FleetHttpClient(
            f"https://{credentials.address}", interceptors=[_Signed(credentials)]
        )
        # Flower's client gives no way to say so, and a second pool is a second connection.
        self._fleet._client = self._http
        self._node: Node | None = None
        self._heard_at = 0.0
        self._cut_off = ""
        #: Goes with the next answer; came with the last work.
        self._attached: _Attached | None = None
        self._brought = b""
        #: The coordinator has written down what became of the last reply.
        self.settled = False
        self.bytes_up = self.bytes_down = 0

    def reconnect(self) -> None:
        """Let go of all connections, and make others when they are needed."""
        self._wire.drop()

    def open(self) -> None:
        """Open a session: from now on the coordinator may send work."""
        with _translated():
            answer = self._fleet.ActivateNode(
                ActivateNodeRequest(
                    public_key=node_public(self._credentials.node_key),
                    heartbeat_interval=HEARTBEAT_S,
                )
            )
        self._node = Node(node_id=answer.node_id)
        self._heard_at = time.monotonic()

    def check(self) -> None:
        """Prove the node key on Flower's side without a session: nothing changes there.

        Flower looks at signature and key first, and then refuses the heartbeat that no node has.
        """
        with _translated():
            try:
                self._fleet.ActivateNode(
                    ActivateNodeRequest(
                        public_key=node_public(self._credentials.node_key), heartbeat_interval=0
                    )
                )
            except httpx.HTTPStatusError as err:
                if err.response.status_code != 400:
                    raise

    def close(self) -> None:
        """Say goodbye if anybody listens, and drop the connections."""
        if self._node is not None:
            self._wire.timeout_s = _GOODBYE_S
            try:
                with _translated():
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
        return self._heard_at + BEAT_EVERY_S - time.monotonic()

    def mqtt(self) -> MqttAddress:
        """The broker and the login for it, as they are now: the password changes now and then."""
        with _translated():
            answer = self._http.get(MQTT_PATH, headers=self._signed("GET", MQTT_PATH))
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=MqttAddress)

    def standing(self) -> StandingAnswer:
        """How this machine stands with the coordinator; needs no session."""
        with _translated():
            answer = self._http.get(STANDING_PATH, headers=self._signed("GET", STANDING_PATH))
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=StandingAnswer)

    def leave(self) -> None:
        """Ask the coordinator to refuse this machine's key from now on; needs no session."""
        with _translated():
            self._http.post(LEAVE_PATH, headers=self._signed("POST", LEAVE_PATH)).raise_for_status()

    def tell_logs(self, told: LogsTold) -> None:
        """Answer the operator's question for log lines."""
        self._post(LOGS_PATH, msgspec.json.encode(told))

    def renew(self) -> bytes:
        """A new node certificate for the same keys."""
        with _translated():
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
        body = msgspec.msgpack.encode(Exchange(reply=packed, want=want, update=update))
        headers = self._signed("POST", EXCHANGE_PATH, hashlib.sha256(body).hexdigest())
        with _translated():
            asked_at = time.monotonic()
            answer = self._wire.ask("POST", EXCHANGE_PATH, headers, body)
            if attached is not None and answer.status in (413, 507):
                self.upload(attached.digest, attached.source)  # says why, or succeeds now
                return self._exchange(reply, want=want)
            _check(answer.status)
            self.bytes_up += len(update)
            self._heard_at = asked_at
            told = msgspec.msgpack.decode(answer.body, type=Exchanged)
            if told.work is not None:
                self._brought = told.version
            if reply is not None:  # a heartbeat may come between a reply and the look at this
                self.settled = told.settled
            return _unpack(told.work) if told.work is not None else None

    # --- the weight lane ---

    def download(self, digest: str, nbytes: int, target: Path, at: str = VERSION_PATH) -> None:
        """Fetch a version, or what else is `at` this path, going on where an earlier try was cut.

        Raises BadWeights when the bytes are not those of `digest`.
        """
        part = target.with_suffix(".part")
        brought, self._brought = self._brought, b""
        if brought and hashlib.sha256(brought).hexdigest() == digest:
            self.bytes_down += len(brought)
            part.write_bytes(brought)
            failpoint("agent.download.piece")
            part.replace(target)
            return
        have = part.stat().st_size if part.exists() else 0
        if have < nbytes:
            have, found = self._fetch(at.format(digest=digest), nbytes, part, have)
        else:  # cut off after the last byte: there is nothing left to ask for
            found = file_digest(part)
        if have < nbytes:
            raise Unreachable(f"the version came only in part: {have} of {nbytes} bytes")
        if found != digest:
            part.unlink()
            raise BadWeights("the version's bytes are not those of its digest")
        part.replace(target)

    def download_patch(self, digest: str, nbytes: int, target: Path) -> None:
        """Fetch the patch to a version. What it makes of the parent is for the caller to check."""
        have, _ = self._fetch(f"/cw/v1/patches/{digest}", nbytes, target, 0)
        if have != nbytes:
            raise BadWeights(f"a patch of another size than the {nbytes} bytes announced")

    def plan(self, digest: str, asked: PlanAsked) -> Plan:
        """Where a version can be had from, piece by piece."""
        body, path = msgspec.json.encode(asked), PLAN_PATH.format(digest=digest)
        return msgspec.json.decode(self._post(path, body), type=Plan)

    def tell_held(self, digest: str, held: Held) -> None:
        """Say that a version is here now, and who helped."""
        self._post(HELD_PATH.format(digest=digest), msgspec.json.encode(held))

    def neighbours(self, asked: PlanAsked) -> Neighbours:
        """Whom to ask while the coordinator is away; it hears where this agent serves."""
        answer = self._post(NEIGHBOURS_PATH, msgspec.json.encode(asked))
        return msgspec.json.decode(answer, type=Neighbours)

    def stream(self, digest: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` of a version, as they come."""
        path = f"/cw/v1/weights/{digest}"
        headers = self._signed("GET", path) | {"range": f"bytes={start}-{stop - 1}"}
        buffer = memoryview(bytearray(_PIECE_BYTES))
        left = stop - start
        with self._wire.stream("GET", path, headers) as answer:
            _check(answer.status)
            while left > 0 and (got := answer.read_into(buffer[: min(left, len(buffer))])):
                self.bytes_down += got
                left -= got
                yield bytes(buffer[:got])

    def _post(self, path: str, body: bytes) -> bytes:
        headers = self._signed("POST", path, hashlib.sha256(body).hexdigest())
        with _translated():
            answer = self._http.post(path, content=body, headers=headers)
            answer.raise_for_status()
            return answer.content

    def _fetch(self, path: str, nbytes: int, part: Path, have: int) -> tuple[int, str]:
        """Add what is missing to `part`, at most a piece beyond `nbytes`; its size and digest."""
        sha = hashlib.sha256()
        if have:
            for piece in _pieces(part):
                sha.update(piece)
        headers = self._signed("GET", path) | ({"range": f"bytes={have}-"} if have else {})
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with self._wire.stream("GET", path, headers) as answer:
            _check(answer.status)
            if have and answer.status != 206:
                have, sha = 0, hashlib.sha256()
            # Not synced: after a power cut whatever is there is looked at before it is used.
            with part.open("ab" if have else "wb", buffering=0) as file:
                while have <= nbytes and (got := answer.read_into(buffer)):
                    have += got
                    self.bytes_down += got
                    if self._bandwidth is not None:
                        self._bandwidth.received(got)
                    if have > nbytes:
                        break
                    sha.update(buffer[:got])
                    write_all(file, buffer[:got])
                    failpoint("agent.download.piece")
        return have, sha.hexdigest()

    def hand_in(self, digest: str, source: Path) -> None:
        """Send an update's bytes: few of them with the answer that is pushed next."""
        if source.stat().st_size > FEW_BYTES:
            self.upload(digest, source)
            return
        self._attached = _Attached(digest, source)
        failpoint("agent.upload.piece")

    def upload(self, digest: str, source: Path, at: str = UPDATE_PATH) -> None:
        """Send an update's bytes, or an answer's; does nothing when the coordinator has them.

        Raises Refused when it does not take them.
        """
        path = at.format(digest=digest)
        size = source.stat().st_size
        # After a cut: an offset at the end sends nothing and asks how much has arrived.
        offset = size if digest == self._cut_off else 0
        self._cut_off = digest
        for _ in range(3):
            headers = self._signed("PUT", path, digest)
            headers["content-length"] = str(size - offset)
            headers["x-cw-offset"] = str(offset)
            with _translated():
                answer = self._wire.ask("PUT", path, headers, self._metered(source, offset))
                if answer.status == 409:
                    offset = min(int(msgspec.json.decode(answer.body)["have"]), size)
                elif answer.status == 422 and offset:
                    offset = 0  # what was there already was not the beginning of this
                else:
                    _check(answer.status)
                    self.bytes_up += size - offset
                    self._cut_off = ""
                    return
        raise Unreachable("the upload could not be resumed")

    def _metered(self, path: Path, offset: int) -> Iterator[bytes]:
        for piece in _pieces(path, offset):
            if self._bandwidth is not None:
                self._bandwidth.sent(len(piece))
            yield piece

    def _signed(
        self, method: str, path: str, body_sha256: str = requests.EMPTY_SHA256
    ) -> dict[str, str]:
        return self._credentials.signed(method, path, body_sha256)


def _pack(reply: Message) -> Parcel:
    """A reply with all its objects."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        return Parcel(
            message=message_to_proto(remove_content_from_message(reply)).SerializeToString(),
            tree=get_object_tree(reply).SerializeToString(),
            objects={object_id: part.deflate() for object_id, part in objects.items()},
        )


def _unpack(work: Parcel) -> Message:
    head = ProtoMessage()
    head.ParseFromString(work.message)
    message_id = head.metadata.message_id
    message = cast(Message, inflate_object_from_contents(message_id, dict(work.objects)))
    message.metadata.__dict__["_message_id"] = message_id
    return message


#: What parsing an answer raises that no coordinator of this version gives.
_NONSENSE = (msgspec.DecodeError, DecodeError, ValueError, LookupError, TypeError)


class _translated:
    """Turns the transport's errors into ours, and those of parsing what it brought."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, _: object
    ) -> None:
        if isinstance(err, httpx.HTTPStatusError):
            raise _refused(err.response.status_code) from err
        if isinstance(err, _NONSENSE):
            raise Unreachable(f"the coordinator's answer is not understood: {err}") from err
        if isinstance(err, httpx.HTTPError):
            why = str(err) or type(err).__name__
            raise Unreachable(f"the coordinator does not answer: {why}") from err


def _check(status: int) -> None:
    """Raise the error of ours that an answer's status amounts to."""
    if status >= 300:
        raise _refused(status)


def _refused(status: int) -> Unreachable | Refused:
    if status in (401, 403, 404, 412):
        return SessionLost(f"the coordinator answered {status}")
    if status == 507:
        return NoRoom("the coordinator has no room on its disk")
    if status in (413, 422):  # it will say the same the next time
        return Refused(f"the coordinator does not take it ({status})")
    return Unreachable(f"the coordinator answered {status}")


def _pieces(path: Path, offset: int = 0) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(_PIECE_BYTES):
            yield piece
            failpoint("agent.upload.piece")
