"""Flower's server parts in this process: LinkState and ObjectStore.

In the coordinator, only this module and `flower_sessions` use Flower's private names (1.41, 1.42:
see the contract tests). Neither the Control API nor the Runtime API is mounted, so nobody can
submit a run or take a ServerApp's token.

LinkState is rebuilt from the ledger's peers at every start, and one Flower run lives as long as the
process. So LinkState is kept in memory: with SQLite, the database took 80 % of a small round's CPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, cast

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.date import now
from flwr.supercore.inflatable import inflatable_object as inflatable
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool

from coordinator.fleet.sessions import NoSession
from protocols.errors import BadMessage
from protocols.messages.work import STEP_MESSAGES, FlowerMessage, PollRequest, PollResponse

logging.getLogger("flwr").setLevel(logging.CRITICAL)
log = logging.getLogger("commonweight.superlink")

#: A reply is a message, its RecordDict and two records.
MAX_OBJECTS = 16
#: Requests that may complete a reply.
REPLY_ACTIONS = frozenset({"push-messages", "push-object"})


class Superlink:
    """Flower's server parts, and the one Flower run that carries all our messages.

    `on_request(action, node_id)` is called in the event loop after a Fleet request of this node
    succeeded. The action is the last part of its path, such as "push-object".
    """

    def __init__(self) -> None:
        _, self.factory = get_objectstore_linkstate_factories(
            FLWR_IN_MEMORY_DB_NAME, get_federation_manager()
        )
        self.state = cast(InMemoryLinkState, self.factory.state())
        self.on_request: Callable[[str, int], None] = lambda action, node_id: None
        #: Node ids by public key.
        self.nodes: dict[bytes, int] = {}
        #: By node: ids of its undelivered messages. Flower's own handler searches the messages of
        #: all nodes at each pull, which took a quarter of a round of 1,000 peers.
        self._undelivered: defaultdict[int, deque[str]] = defaultdict(deque)
        #: By id: replies that LinkState has returned and whose objects have not all arrived.
        self._incomplete: dict[str, Message] = {}
        #: Held while messages are stored, so that none is delivered without its objects.
        self.lock = threading.Lock()
        self._open_run()

    def _open_run(self) -> None:
        state = self.state
        self.run_id = state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self.run.primary_task_id
        assert task is not None, "a new run has a primary task"
        state.claim_task(task)
        state.activate_task(task)
        # Process-wide: every Message made from here on belongs to this run.
        TaskIdentity.task_id = self._task = task
        TaskIdentity.run_id = self.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    @property
    def run(self) -> Run:
        run: Run = self.state.get_run_info(run_ids=[self.run_id])[0]
        return run

    def heartbeat(self) -> None:
        """Keep the run alive: without heartbeats Flower fails it after a minute."""
        self.state.acknowledge_task_heartbeat(self._task)

    # --- nodes ---

    def register_node(self, node_public_pem: bytes) -> int:
        """Accept sessions of this P-384 key. Returns the node id."""
        node_id = self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, node_public_pem, 0)
        self.nodes[node_public_pem] = node_id
        return node_id

    def remove_node(self, node_id: int) -> None:
        """End the node's session and refuse its key from now on."""
        self.state.delete_node(NOOP_FLWR_AID, node_id)

    def online_nodes(self) -> set[int]:
        """Nodes with a valid heartbeat."""
        return self.state.get_nodes(self.run_id)

    # --- a node's polls ---

    def poll(self, node_id: int, request: PollRequest) -> PollResponse:
        """Store a node's reply and return its next message, in one transaction.

        On the Fleet routes this takes about 14 requests. It counts as a heartbeat. Raises
        NoSession, and BadMessage for a reply that is incomplete or not the node's own.
        """
        with self.lock:
            return self._poll(node_id, request)

    async def poll_async(self, node_id: int, request: PollRequest) -> PollResponse:
        """`poll` from the event loop. It uses a thread only while the lock is taken."""
        if not self.lock.acquire(blocking=False):
            return await run_in_threadpool(self.poll, node_id, request)
        try:
            return self._poll(node_id, request)
        finally:
            self.lock.release()

    def _poll(self, node_id: int, request: PollRequest) -> PollResponse:
        node = self.state.nodes[node_id]
        if node.online_until <= time.time():
            raise NoSession(f"the session of node {node_id} has ended")
        self.state.acknowledge_node_heartbeat(node_id, node.heartbeat_interval)
        if request.reply is not None:
            self._store_reply(node_id, request.reply)
        if not request.wants_work:
            return PollResponse()
        return PollResponse(work=self._next_message(node_id, steps_only=request.steps_only))

    @staticmethod
    def request_id_of(reply: FlowerMessage) -> str:
        """The id of the message that a reply claims to answer, or "" if it is not a reply."""
        message = ProtoMessage()
        with contextlib.suppress(DecodeError):
            message.ParseFromString(reply.message)
        return str(message.metadata.reply_to_message_id)

    def _store_reply(self, node_id: int, reply: FlowerMessage) -> None:
        try:
            message, tree = ProtoMessage(), ObjectTree()
            message.ParseFromString(reply.message)
            tree.ParseFromString(reply.tree)
        except DecodeError as err:
            raise BadMessage("not a Flower message") from err
        metadata = message.metadata
        if metadata.src_node_id != node_id or metadata.run_id != self.run_id:
            raise BadMessage("the reply names another sender")
        if metadata.message_id != tree.object_id:
            raise BadMessage("the reply is not the root of its object tree")
        session = self.state.start_session(self.run_id)
        stored = False
        try:
            _check_objects(tree, reply.objects)
            _, missing = self.state.store_message_and_object_tree(
                message_from_proto(message), tree, session
            )
            for object_id in missing:
                content = reply.objects[object_id]
                if not self.state.store_object(self.run_id, session, object_id, content):
                    raise BadMessage("Flower refused an object of the reply")
            stored = True
        except (ValueError, KeyError, TypeError, OverflowError) as err:
            raise BadMessage(f"Flower refused the reply: {err}") from err
        finally:
            # Flower itself would keep this session forever for a partial or unexpected reply.
            self.state._cleanup_push_session(session, cleanup_messages=not stored)

    def _take_undelivered(self, node_id: int, *, steps_only: bool) -> Message | None:
        """The oldest message for a node; with `steps_only`, the oldest one with a step."""
        undelivered = self._undelivered[node_id]
        later: list[str] = []
        found = None
        while found is None and undelivered:
            message_id = undelivered.popleft()
            # None for a message that was deleted.
            message: Message | None = self.state.message_ins_store.get(message_id)
            if message is not None and steps_only and not _is_step(message):
                later.append(message_id)
            else:
                found = message
        undelivered.extendleft(reversed(later))
        return found

    def _next_message(self, node_id: int, *, steps_only: bool) -> FlowerMessage | None:
        message = self._take_undelivered(node_id, steps_only=steps_only)
        if message is None:
            return None
        message.metadata.delivered_at = now().isoformat()
        store = self.state.object_store
        tree = store.get_object_tree(message.metadata.message_id)
        objects = {
            node.object_id: store.get(node.object_id) or b""
            for node in inflatable.iterate_object_tree(tree)
        }
        store.delete(message.metadata.message_id)
        return FlowerMessage(
            message=message_to_proto(message).SerializeToString(),
            tree=tree.SerializeToString(),
            objects=objects,
        )

    # --- the run's messages, for the Grid ---

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Store messages for their nodes. Returns the ids of those whose nodes exist."""
        ids: list[str] = []
        objects: dict[str, Any] = {}
        unstored: set[str] = set()
        with self.lock, inflatable.no_object_id_recompute():
            session = self.state.start_session(self.run_id)
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                stored, missing = self.state.store_message_and_object_tree(
                    remove_content_from_message(message),
                    inflatable.get_object_tree(message),
                    session,
                )
                if stored:
                    ids.append(message.metadata.message_id)
                    self._undelivered[message.metadata.dst_node_id].append(ids[-1])
                    unstored.update(missing)
                    objects.update(inflatable.get_all_nested_objects(message))
            # After all messages: a session closes as soon as its registered objects are complete.
            for object_id in sorted(unstored):
                content = objects[object_id].deflate()
                self.state.store_object(self.run_id, session, object_id, content)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Remove and return the complete replies to these messages."""
        wanted = set(message_ids)
        replies: list[Message] = []
        with self.lock:
            for reply in self.state.get_message_res(set(wanted), self.run_id):
                if reply.has_error():
                    self.state.object_store.delete(reply.metadata.message_id)
                    replies.append(reply)
                else:
                    self._incomplete[reply.metadata.message_id] = reply
            for reply_id, reply in list(self._incomplete.items()):
                if reply.metadata.reply_to_message_id not in wanted:
                    continue
                try:
                    if not self._load_content(reply_id, reply):
                        continue
                    replies.append(reply)
                except NoObjectInStoreError:  # its sender died between message and objects
                    pass
                del self._incomplete[reply_id]
            self._delete({reply.metadata.reply_to_message_id for reply in replies})
        return replies

    def _load_content(self, reply_id: str, reply: Message) -> bool:
        """Set a reply's content. Returns False while objects are missing.

        The metadata stay those that LinkState checked: the sender chooses those in the objects. A
        reply with invalid objects stays empty, and the validation of replies refuses it.
        """
        store = self.state.object_store
        contents: dict[str, bytes] = {}
        for node in inflatable.iterate_object_tree(store.get_object_tree(reply_id)):
            content = store.get(node.object_id)
            if not content:
                return False
            contents[node.object_id] = content
        try:
            message = inflate_object_from_contents(reply_id, contents)
            if isinstance(message, Message) and isinstance(message.content, RecordDict):
                reply.content = message.content
        except Exception as err:  # one peer's bytes in Flower's parser must not end the run
            log.warning("a reply of node %s cannot be read: %s", reply.metadata.src_node_id, err)
        store.delete(reply_id)
        return True

    def delete_messages(self, message_ids: set[str]) -> None:
        """Delete messages, answered or not. Late replies to them are refused."""
        if message_ids:
            with self.lock:
                self._delete(message_ids)

    def _delete(self, message_ids: set[str]) -> None:
        self.state.delete_messages(message_ids)
        for message_id in message_ids:
            self.state.object_store.delete(message_id)
        for reply_id, reply in list(self._incomplete.items()):
            if reply.metadata.reply_to_message_id in message_ids:
                del self._incomplete[reply_id]


def _is_step(message: Message) -> bool:
    return message.metadata.message_type in STEP_MESSAGES


def _check_objects(tree: ObjectTree, objects: Mapping[str, bytes]) -> None:
    """Raise BadMessage or ValueError unless `tree` is small and describes `objects`.

    Flower does not compare a tree with its objects, and decodes each object as often as the tree
    names it.
    """
    nodes = list(islice(inflatable.iterate_object_tree(tree), MAX_OBJECTS + 1))
    if len(nodes) > MAX_OBJECTS:
        raise BadMessage(f"the reply has more than {MAX_OBJECTS} objects")
    for node in nodes:
        content = objects.get(node.object_id, b"")
        if inflatable.get_object_id(content) != node.object_id:
            raise BadMessage("an object of the reply is missing or has another id")
        children = [child.object_id for child in node.children]
        if inflatable.get_object_children_ids_from_object_content(content) != children:
            raise BadMessage("the reply's tree does not match its objects")
