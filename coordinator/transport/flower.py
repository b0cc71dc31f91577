"""Flower in this process: LinkState and ObjectStore, the Fleet routes, nodes, and the Grid.

With `agent/transport/coordinator_client.py` the only file that uses Flower's private names (1.41;
see the contract tests). No Control API, no Runtime API, no docs page is mounted, so nobody can
submit a run or take a ServerApp's token, and of the Fleet routes only the two that our agents use
are open: see `door`. LinkState is no authority: it is made anew at every start from the ledger's
peers, and one Flower run lives as long as the coordinator. So it is kept in memory: on SQLite four
fifths of a small round's CPU went into a database that was thrown away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, cast

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from fastapi import FastAPI
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.serverapp import Grid
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import (
    get_federation_manager,
    get_objectstore_linkstate_factories,
)
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.fleet.auth import Auth
from coordinator.fleet.sessions import NoSession
from coordinator.transport.flower_guard import FlowerGuard
from protocols.errors import BadMessage
from protocols.messages.work import FlowerMessage, PollRequest, PollResponse

logging.getLogger("flwr").setLevel(logging.CRITICAL)
log = logging.getLogger("commonweight.superlink")

FLEET_PREFIX = "/v1/fleet/"
#: What our agents use of Flower's routes; messages and heartbeats travel on the exchange route.
OPEN_PATHS = frozenset(FLEET_PREFIX + action for action in ("activate-node", "deactivate-node"))
#: A reply is a message, its RecordDict and two records.
MAX_OBJECTS = 16
#: Requests after which a reply may be whole.
REPLY_ACTIONS = frozenset({"push-messages", "push-object"})


class Superlink:
    """Flower's server parts and the one Flower run that carries all of ours.

    `on_request(action, node_id)` is called in the event loop after a Fleet request of this node
    succeeded; the action is the last part of its path, such as "push-object".
    """

    def __init__(self) -> None:
        _, self._factory = get_objectstore_linkstate_factories(
            FLWR_IN_MEMORY_DB_NAME, get_federation_manager()
        )
        self.state = self._factory.state()
        self.on_request: Callable[[str, int], None] = lambda action, node_id: None
        self._nodes: dict[bytes, int] = {}
        #: By node: ids of the messages to it that it has not taken. Flower's own handler goes
        #: through the messages of all nodes at each pull: a quarter of a round of 1,000 peers.
        self.undelivered: defaultdict[int, deque[str]] = defaultdict(deque)
        #: Held while messages are stored, so that nobody is given one whose objects are not there.
        self.lock = threading.Lock()
        self._open_run()

    def _open_run(self) -> None:
        state = self.state
        self.run_id = state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = state.get_run_info(run_ids=[self.run_id])[0].primary_task_id
        assert task is not None, "a new run has a primary task"
        state.claim_task(task)
        state.activate_task(task)
        # Process-wide: every Message made from here on belongs to this run.
        TaskIdentity.task_id = self._task = task
        TaskIdentity.run_id = self.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def heartbeat(self) -> None:
        """Tell LinkState that the run lives; without it Flower fails the run after a minute."""
        self.state.acknowledge_task_heartbeat(self._task)

    def register_node(self, node_public_pem: bytes) -> int:
        """Let the holder of this P-384 key in; its node id."""
        node_id = self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, node_public_pem, 0)
        self._nodes[node_public_pem] = node_id
        return node_id

    def remove_node(self, node_id: int) -> None:
        """Shut the holder of this node id out, at once and for good."""
        self.state.delete_node(NOOP_FLWR_AID, node_id)

    def online_nodes(self) -> set[int]:
        """Nodes whose heartbeat has not run out."""
        return self.state.get_nodes(self.run_id)

    def poll(self, node_id: int, asked: PollRequest) -> PollResponse:
        """Take a node's reply and give it its next message: Flower's own handlers in one go.

        What takes a node about 14 requests on the Fleet routes is one request and one transaction,
        and counts as a heartbeat. Raises NoSession, and BadMessage for a reply that is not the
        node's own or not whole.
        """
        with self.lock:
            return self._poll(node_id, asked)

    async def poll_async(self, node_id: int, asked: PollRequest) -> PollResponse:
        """`exchange` from the event loop: a thread is only needed while somebody has the lock."""
        if not self.lock.acquire(blocking=False):
            return await run_in_threadpool(self.poll, node_id, asked)
        try:
            return self._poll(node_id, asked)
        finally:
            self.lock.release()

    def _poll(self, node_id: int, asked: PollRequest) -> PollResponse:
        state = cast(InMemoryLinkState, self.state)
        node = state.nodes[node_id]
        if node.online_until <= time.time():
            raise NoSession(f"the session of node {node_id} has ended")
        state.acknowledge_node_heartbeat(node_id, node.heartbeat_interval)
        if asked.reply is not None:
            self._store_reply(node_id, asked.reply)
        return PollResponse(work=self._next_message(node_id) if asked.wants_work else None)

    @staticmethod
    def request_id_of(parcel: FlowerMessage) -> str:
        """The id of the message that a reply says it answers; empty for what is no reply."""
        message = ProtoMessage()
        with contextlib.suppress(DecodeError):
            message.ParseFromString(parcel.message)
        return str(message.metadata.reply_to_message_id)

    def _store_reply(self, node_id: int, parcel: FlowerMessage) -> None:
        try:
            message, tree = ProtoMessage(), ObjectTree()
            message.ParseFromString(parcel.message)
            tree.ParseFromString(parcel.tree)
        except DecodeError as err:
            raise BadMessage("not a Flower message") from err
        metadata = message.metadata
        if metadata.src_node_id != node_id or metadata.run_id != self.run_id:
            raise BadMessage("a reply in another's name")
        if metadata.message_id != tree.object_id:
            raise BadMessage("a reply that is not the one in its tree")
        session = self.state.start_session(self.run_id)
        whole = False
        try:
            _check_objects(tree, parcel)
            _, missing = self.state.store_message_and_object_tree(
                message_from_proto(message), tree, session
            )
            for object_id in missing:
                content = parcel.objects[object_id]
                if not self.state.store_object(self.run_id, session, object_id, content):
                    raise BadMessage("an object that Flower does not take")
            whole = True
        except (ValueError, KeyError, TypeError, OverflowError) as err:
            raise BadMessage(f"Flower refused the reply: {err}") from err
        finally:
            # Flower keeps the session of a reply that nobody waits for, and half a reply, for ever.
            self.state._cleanup_push_session(session, cleanup_messages=not whole)

    def _next_message(self, node_id: int) -> FlowerMessage | None:
        messages = cast(InMemoryLinkState, self.state).message_ins_store
        message, waiting = None, self.undelivered[node_id]
        while message is None and waiting:
            message = messages.get(waiting.popleft())  # None: it was taken back
        if message is None:
            return None
        message.metadata.delivered_at = now().isoformat()
        store = self.state.object_store
        tree = store.get_object_tree(message.metadata.message_id)
        objects = {
            node.object_id: store.get(node.object_id) or b"" for node in iterate_object_tree(tree)
        }
        store.delete(message.metadata.message_id)
        return FlowerMessage(
            message=message_to_proto(message).SerializeToString(),
            tree=tree.SerializeToString(),
            objects=objects,
        )

    def app(self, auth: Auth) -> ASGIApp:
        """The ASGI app of the Fleet routes, behind `auth`."""
        app = FastAPI(
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            middleware=[
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
                Middleware(BaseHTTPMiddleware, dispatch=self._end_previous_session),
            ],
        )
        app.state.linkstate_factory = self._factory
        app.state.enable_supernode_auth = True
        app.include_router(fleet_router)
        return FlowerGuard(self._watched(app), auth, OPEN_PATHS, FLEET_HTTP_PUBLIC_KEY_HEADER)

    async def _end_previous_session(
        self, request: Request, call_next: RequestResponseEndpoint
    ) -> Response:
        """Let a key that opens a session end its last one first.

        Flower refuses a second one, so an agent that was killed and started again would have to
        wait until the heartbeats of its former life run out. (Its key was checked just before.)
        """
        asked = getattr(request.state, "protobuf_request", None)
        if isinstance(asked, ActivateNodeRequest) and asked.public_key in self._nodes:
            node_id = self._nodes[asked.public_key]
            await run_in_threadpool(self.state.deactivate_node, node_id)
        return await call_next(request)

    def _watched(self, app: ASGIApp) -> ASGIApp:
        """Tells of a request that has succeeded, before its sender hears of that and goes on."""

        async def watch(scope: Scope, receive: Receive, send: Send) -> None:
            async def note(message: Any) -> None:
                if message["type"] == "http.response.start" and message["status"] == 200:
                    tell(scope)
                await send(message)

            await app(scope, receive, note)

        def tell(scope: Scope) -> None:
            request = scope["state"].get("protobuf_request")
            if request is None:
                return
            if hasattr(request, "public_key"):
                node_id = self._nodes.get(request.public_key, 0)
            else:
                node_id = request.node.node_id if hasattr(request, "node") else request.node_id
            self.on_request(scope["path"].removeprefix(FLEET_PREFIX), node_id)

        return watch


def _check_objects(tree: ObjectTree, parcel: FlowerMessage) -> None:
    """Raise BadMessage, ValueError unless `tree` is that of the parcel's objects, and small.

    Flower takes a tree's word for who is whose child, and writes each out as often as it is named.
    """
    nodes = list(islice(iterate_object_tree(tree), MAX_OBJECTS + 1))
    if len(nodes) > MAX_OBJECTS:
        raise BadMessage(f"a reply of more than {MAX_OBJECTS} objects")
    for node in nodes:
        content = parcel.objects.get(node.object_id, b"")
        if get_object_id(content) != node.object_id:
            raise BadMessage("a reply whose objects are missing or other ones")
        children = [child.object_id for child in node.children]
        if get_object_children_ids_from_object_content(content) != children:
            raise BadMessage("a reply whose tree is not that of its objects")


class InProcessGrid(Grid):
    """A Grid over LinkState and ObjectStore in this process: no polling, one push for all.

    `get_node_ids` gives the nodes in `eligible`, so that an unmodified strategy samples among the
    peers that can work. Messages must be small: see
    `coordinator.transport.flower_records.ClaimCheckGrid`.
    """

    def __init__(self, superlink: Superlink) -> None:
        self._state = superlink.state
        self._store = superlink.state.object_store
        self._run_id = superlink.run_id
        self._lock, self._undelivered = superlink.lock, superlink.undelivered
        #: Replies that LinkState has delivered but whose objects are still under way, by id.
        self._incomplete: dict[str, Message] = {}
        self.eligible: set[int] = set()

    def set_run(self, run: FlowerRun) -> None:
        raise NotImplementedError("the coordinator has one Flower run, set at its start")

    @property
    def run(self) -> FlowerRun:
        run: FlowerRun = self._state.get_run_info(run_ids=[self._run_id])[0]
        return run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.eligible)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store the messages; the ids of those that LinkState took (a node may be gone)."""
        messages = list(messages)
        ids: list[str] = []
        wanted: set[str] = set()
        objects: dict[str, Any] = {}
        with self._lock, no_object_id_recompute():
            session = self._state.start_session(self._run_id)
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                stored, missing = self._state.store_message_and_object_tree(
                    remove_content_from_message(message), get_object_tree(message), session
                )
                if stored:
                    ids.append(message.metadata.message_id)
                    self._undelivered[message.metadata.dst_node_id].append(ids[-1])
                    wanted.update(missing)
                    objects.update(get_all_nested_objects(message))
            # Only now: a session closes as soon as its registered objects are complete.
            for object_id in sorted(wanted):
                self._state.store_object(
                    self._run_id, session, object_id, objects[object_id].deflate()
                )
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have arrived whole; each is given once and then forgotten."""
        wanted = set(message_ids)
        replies: list[Message] = []
        with self._lock:
            for reply in self._state.get_message_res(set(wanted), self._run_id):
                if reply.has_error():
                    self._store.delete(reply.metadata.message_id)
                    replies.append(reply)
                else:
                    self._incomplete[reply.metadata.message_id] = reply
            for message_id, reply in list(self._incomplete.items()):
                if reply.metadata.reply_to_message_id not in wanted:
                    continue
                try:
                    whole = self._fill(message_id, reply)
                except NoObjectInStoreError:  # its sender died between message and objects
                    del self._incomplete[message_id]
                    continue
                if whole:
                    del self._incomplete[message_id]
                    replies.append(reply)
            self._delete_messages({reply.metadata.reply_to_message_id for reply in replies})
        return replies

    def _fill(self, message_id: str, reply: Message) -> bool:
        """Give a reply its content; False while objects are missing.

        Its metadata stay those that LinkState checked: what is inflated says of itself what its
        sender likes. Objects that are none leave it empty, for the gate to refuse.
        """
        tree = self._store.get_object_tree(message_id)
        contents: dict[str, bytes] = {}
        for node in iterate_object_tree(tree):
            content = self._store.get(node.object_id)
            if not content:
                return False
            contents[node.object_id] = content
        try:
            message = inflate_object_from_contents(message_id, contents)
            if isinstance(message, Message) and isinstance(message.content, RecordDict):
                reply.content = message.content
        except Exception as err:  # one peer's bytes in Flower's parser must not end the run
            log.warning("a reply of node %s cannot be read: %s", reply.metadata.src_node_id, err)
        self._store.delete(message_id)
        return True

    def delete_messages(self, message_ids: set[str]) -> None:
        """Take back messages, answered or not: a late reply to them is refused."""
        if message_ids:
            with self._lock:
                self._delete_messages(message_ids)

    def _delete_messages(self, message_ids: set[str]) -> None:
        self._state.delete_messages(message_ids)
        for message_id in message_ids:
            self._store.delete(message_id)
            for reply_id, reply in list(self._incomplete.items()):
                if reply.metadata.reply_to_message_id == message_id:
                    del self._incomplete[reply_id]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError("a run sends and collects its messages itself")
