"""Flower's private names that we stand on, what a stranger meets, and messages there and back."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import inspect
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flwr
import httpx
import msgspec
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.fleet_pb2 import (
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.superlink.servicer.fleet import fleet_handlers
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.transport.coordinator_client import CoordinatorClient, pack_message, unpack_message
from agent.transport.weight_transfer import SessionLost
from coordinator.transport.flower_records import read_claim
from coordinator.transport.flower_sessions import MAX_BODY_BYTES
from protocols.errors import BadMessage, Unreachable
from protocols.messages.work import POLL_PATH, FlowerMessage, PollRequest
from tests.support.https_site import Machine, Site
from tests.support.waiting import wait_for

# --- the contract with flwr 1.41, 1.42 -------------------------------------------------------

#: Name -> the parameters that we give it, in its order ("*": a keyword).
CALLED = {
    "flwr.app.message:remove_content_from_message": ["message"],
    "flwr.common.serde:message_to_proto": ["message"],
    "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects": ["obj"],
    "flwr.supercore.inflatable.inflatable_object:get_object_tree": ["obj"],
    "flwr.supercore.inflatable.inflatable_object:iterate_object_tree": ["tree"],
    "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute": [],
    "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents": [
        "object_id",
        "object_contents",
    ],
    "flwr.superlink.config_loader:get_federation_manager": [],
    "flwr.superlink.config_loader:get_objectstore_linkstate_factories": [
        "database",
        "federation_manager",
    ],
    "flwr.common.serde:message_from_proto": ["message_proto"],
    "flwr.superlink.routers.fleet.node_auth:authenticate_node": ["request"],
    "flwr.superlink.servicer.fleet.fleet_handlers:activate_node": ["*request", "*state"],
    "flwr.superlink.servicer.fleet.fleet_handlers:deactivate_node": ["*request", "*state"],
    "flwr.supercore.primitives.asymmetric:sign_message": ["private_key", "message"],
}
THERE = [
    "flwr.common.constant:TIMESTAMP_HEADER",
    "flwr.supercore.constant:FLEET_HTTP_PUBLIC_KEY_HEADER",
    "flwr.supercore.constant:FLEET_HTTP_SIGNATURE_HEADER",
    "flwr.supercore.date:now",
    "flwr.supercore.protobuf.constants:PROTOBUF_MEDIA_TYPE",
    "flwr.common.constant:NOOP_ACCOUNT_NAME",
    "flwr.common.constant:NOOP_FLWR_AID",
    "flwr.common.constant:SUPERLINK_NODE_ID",
    "flwr.supercore.constant:FLWR_IN_MEMORY_DB_NAME",
    "flwr.supercore.constant:NOOP_FEDERATION_ID",
    "flwr.supercore.constant:TaskType.SERVER_APP",
    "flwr.supercore.error.catalog:API_ERROR_MAP",
    "flwr.supercore.error:FlowerError",
    "flwr.supercore.object_store:NoObjectInStoreError",
    "flwr.supercore.run:Run",
    "flwr.supercore.task_identity:TaskIdentity",
    "flwr.proto.fleet_pb2:ActivateNodeRequest",
    "flwr.proto.fleet_pb2:ActivateNodeResponse",
    "flwr.proto.fleet_pb2:DeactivateNodeRequest",
    "flwr.proto.fleet_pb2:PullMessagesRequest",
    "flwr.proto.fleet_pb2:PushMessagesRequest",
    "flwr.proto.message_pb2:ObjectTree",
    "flwr.proto.node_pb2:Node",
]
#: What we call on LinkState and on its ObjectStore, with the names of what we give.
STATE: dict[str, list[str] | None] = {
    "create_run": None,
    "get_run_info": ["*run_ids"],
    "claim_task": None,
    "activate_task": None,
    "acknowledge_task_heartbeat": None,
    "acknowledge_node_heartbeat": ["node_id", "heartbeat_interval"],
    "create_node": ["owner_aid", "owner_name", "public_key", "heartbeat_interval"],
    "delete_node": ["owner_aid", "node_id"],
    "deactivate_node": ["node_id"],
    "get_nodes": ["run_id"],
    "get_message_res": ["message_ids", "run_id"],
    "delete_messages": ["message_ins_ids"],
    "start_session": ["run_id"],
    "store_message_and_object_tree": ["message", "object_tree", "session_id"],
    "store_object": ["run_id", "session_id", "object_id", "object_content"],
}


def find(name: str) -> Any:
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def check_parameters(called: Any, given: list[str]) -> None:
    parameters = inspect.signature(called).parameters
    positional = [name for name in given if not name.startswith("*")]
    assert list(parameters)[: len(positional)] == positional
    assert {name.lstrip("*") for name in given} <= parameters.keys()
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    assert needed <= {name.lstrip("*") for name in given}


def test_the_version_is_the_one_that_was_read() -> None:
    assert flwr.__version__.startswith(("1.41.", "1.42."))


def test_four_files_use_private_names() -> None:
    """What Flower documents is in flwr.app, flwr.clientapp, flwr.serverapp and flwr.common."""
    root, public = Path(__file__).parents[3], ("app", "clientapp", "serverapp")
    found = set[str]()
    for package in ("agent", "commonweight", "coordinator", "protocols"):
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else []
                modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                for module in filter(None, modules):
                    top, _, rest = module.partition(".")
                    is_private = rest.partition(".")[0] not in public or rest == "app.message"
                    if top == "flwr" and is_private:
                        found.add(path.relative_to(root).as_posix())
    assert found == {
        "agent/transport/coordinator_client.py",
        "commonweight/flower_apps/flower_names.py",
        "coordinator/transport/flower.py",
        "coordinator/transport/flower_sessions.py",
    }


@pytest.mark.parametrize("name", CALLED)
def test_a_private_function_takes_what_we_give(name: str) -> None:
    check_parameters(find(name), CALLED[name])


@pytest.mark.parametrize("name", THERE)
def test_a_private_name_is_there(name: str) -> None:
    find(name)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site"), flower=True).up() as running:
        yield running


@pytest.fixture
def link(link: CoordinatorClient) -> CoordinatorClient:
    """The client of `machine`, with a session."""
    link.open()
    return link


def test_linkstate_keeps_its_messages_where_we_look(site: Site) -> None:
    assert isinstance(site.superlink.state.message_ins_store, dict)


@pytest.mark.parametrize("name", ["ActivateNode", "DeactivateNode"])
def test_flowers_own_client_calls_the_routes_that_we_call(
    name: str, monkeypatch: pytest.MonkeyPatch, link: CoordinatorClient
) -> None:
    """Our requests equal those of Flower's client, but for the signatures."""
    from flwr.proto import fleet_pb2
    from flwr.supernode.fleet_http_client import FleetHttpClient

    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(418)

    client = FleetHttpClient("https://coordinator")
    client._client = httpx.Client(transport=httpx.MockTransport(answer))
    request = getattr(fleet_pb2, f"{name}Request")()
    with pytest.raises(httpx.HTTPStatusError):
        getattr(client, name)(request)
    ours: list[tuple[str, str, dict[str, str], bytes]] = []
    monkeypatch.setattr(link._http_client, "request", lambda *call, max_bytes: ours.append(call))
    link._fleet_call("activate-node" if name == "ActivateNode" else "deactivate-node", request)
    method, path, headers, body = ours[0]
    monkeypatch.undo()
    assert (method, path, body) == (sent[0].method, sent[0].url.path, sent[0].content)
    assert headers["content-type"] == sent[0].headers["content-type"]
    assert headers["accept"] == sent[0].headers["accept"]


@pytest.mark.parametrize("name", STATE)
def test_linkstate_takes_what_we_give(site: Site, name: str) -> None:
    method = getattr(site.superlink.state, name)
    if (given := STATE[name]) is not None:
        check_parameters(method, given)


def test_the_object_store_takes_what_we_give(site: Site) -> None:
    store = site.superlink.state.object_store
    for name in ("get_object_tree", "get", "delete"):
        check_parameters(getattr(store, name), ["object_id"])


# --- strangers -------------------------------------------------------------------------------


def test_a_strangers_key_opens_no_session(site: Site) -> None:
    stranger = Machine()
    link = CoordinatorClient(site.credentials(stranger))
    with pytest.raises(SessionLost, match="401"):
        link.open()
    with pytest.raises(SessionLost, match="401"):
        link.pull()
    link.close()


def test_another_machines_session_cannot_be_closed(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    other = CoordinatorClient(site.credentials(site.enroll()))
    other.open()
    own, other._node = other._node, link._node
    request = DeactivateNodeRequest(node_id=site.nodes[machine.peer])
    assert other._fleet_call("deactivate-node", request).status == 401
    assert site.nodes[machine.peer] in site.superlink.online_nodes()
    other._node = own
    other.close()


def test_every_exchange_is_a_heartbeat_of_an_open_session(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    node = site.superlink.state.nodes[site.nodes[machine.peer]]  # type: ignore[attr-defined]
    for ask in (link.heartbeat, link.pull):
        node.online_until = time.time() + 5
        ask()
        assert node.online_until > time.time() + 30
        assert link.heartbeat_due_s > 10
    node.online_until = time.time() - 1  # two were missed: it must open another
    for ask in (link.heartbeat, link.pull):
        with pytest.raises(SessionLost, match="412"):
            ask()
    assert site.nodes[machine.peer] not in site.superlink.online_nodes()
    link.open()
    assert site.nodes[machine.peer] in site.superlink.online_nodes()


def test_a_removed_machine_is_shut_out(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    site.registry.remove(machine.peer, "test")
    site.superlink.remove_node(site.nodes[machine.peer])
    for ask in (link.pull, link.heartbeat, link.open):
        with pytest.raises(SessionLost):
            ask()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/nothing",
        "/v1/fleet/docs",
        "/v1/fleet/openapi.json",
        "/v1/control/start-run",
        "/v1/runtime/pull-task",
        "/v1/serverappio/pull-messages",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/v1/health",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_there_are_only_the_fleet_routes(http: httpx.Client, method: str, path: str) -> None:
    answer = http.request(method, path, headers={"content-length": "0"})
    assert answer.status_code == 404


def test_a_large_body_is_refused_before_it_is_parsed(http: httpx.Client, machine: Machine) -> None:
    path = "/v1/fleet/activate-node"
    body = b"\xff" * (MAX_BODY_BYTES + 1)
    assert http.post(path, content=body).status_code == 401
    headers = machine.headers("POST", path, body)
    assert http.post(path, content=body, headers=headers).status_code == 413
    headers = machine.headers("POST", path, body)
    assert http.post(path, content=iter([body, body]), headers=headers).status_code == 413


def test_what_our_agents_do_not_use_is_shut_for_them_too(link: CoordinatorClient) -> None:
    for route, request in (
        ("pull-messages", PullMessagesRequest(node=link._node)),
        ("push-messages", PushMessagesRequest(node=link._node)),
    ):
        assert link._fleet_call(route, request).status == 404


@pytest.mark.parametrize("action", ["register-node", "activate-node", "pull-messages"])
@pytest.mark.parametrize("body", [b"", b"\xff" * 10])
def test_an_unsigned_request_is_refused(http: httpx.Client, action: str, body: bytes) -> None:
    answer = http.post(
        f"/v1/fleet/{action}", content=body, headers={"content-type": "application/x-protobuf"}
    )
    assert 400 <= answer.status_code < 500


def test_who_succeeded_is_told(site: Site, machine: Machine, link: CoordinatorClient) -> None:
    node = site.nodes[machine.peer]
    link.heartbeat()
    for action in ("activate-node", "exchange"):  # told after the answer is sent
        wait_for(lambda action=action: (action, node) in site.heard)  # type: ignore[misc]
    assert node in site.superlink.online_nodes()


# --- messages there and back -----------------------------------------------------------------


def question(site: Site, machine: Machine, text: str) -> Message:
    content = RecordDict({"config": ConfigRecord({"text": text})})
    return Message(content, site.nodes[machine.peer], "train", group_id="r")


def answer_to(message: Message, text: str) -> Message:
    content = RecordDict(
        {"config": ConfigRecord({"text": text}), "metrics": MetricRecord({"loss": 0.5})}
    )
    return Message(content, reply_to=message)


def text_of(message: Message) -> object:
    return message.content.config_records["config"]["text"]


def test_messages_travel_both_ways(site: Site, machine: Machine, link: CoordinatorClient) -> None:
    other = site.enroll()
    other_link = CoordinatorClient(site.credentials(other))
    other_link.open()
    ids = set(
        site.grid.push_messages([question(site, machine, "one"), question(site, other, "two")])
    )
    assert len(ids) == 2
    first, second = link.pull(), other_link.pull()
    assert first is not None
    assert second is not None
    assert (text_of(first), text_of(second)) == ("one", "two")
    assert {first.metadata.message_id, second.metadata.message_id} == ids
    assert link.pull() is None
    assert list(site.grid.pull_messages(ids)) == []
    link.push(answer_to(first, "uno"))
    replies = list(site.grid.pull_messages(ids))
    assert [text_of(reply) for reply in replies] == ["uno"]
    assert other_link.exchange(answer_to(second, "due")) is None
    replies = list(site.grid.pull_messages({second.metadata.message_id}))
    assert [text_of(reply) for reply in replies] == ["due"]
    assert replies[0].metadata.src_node_id == site.nodes[other.peer]
    assert replies[0].metadata.reply_to_message_id == second.metadata.message_id
    gone = list(site.grid.pull_messages(ids))  # each is given once
    assert all(reply.has_error() for reply in gone)
    other_link.close()


def test_an_error_travels_too(site: Site, machine: Machine, link: CoordinatorClient) -> None:
    (message_id,) = site.grid.push_messages([question(site, machine, "one")])
    message = link.pull()
    assert message is not None
    link.push(Message(Error(2, "no data here"), reply_to=message))
    (reply,) = site.grid.pull_messages({message_id})
    assert reply.has_error()
    assert reply.error.reason == "no data here"


def test_a_reply_that_nobody_waits_for_is_taken_and_dropped(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    (message_id,) = site.grid.push_messages([question(site, machine, "one")])
    message = link.pull()
    assert message is not None
    site.grid.delete_messages({message_id})
    link.push(answer_to(message, "late"))
    assert all(reply.has_error() for reply in site.grid.pull_messages({message_id}))
    (message_id,) = site.grid.push_messages([question(site, machine, "two")])
    message = link.exchange(answer_to(message, "late"))
    assert message is not None
    assert text_of(message) == "two"
    site.grid.delete_messages({message_id})


def test_a_paused_agent_gets_the_steps_of_a_secure_sum_alone(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    plain = [question(site, machine, text) for text in ("one", "two")]
    step = question(site, machine, "step")
    step.metadata.message_type = "query.mask"
    site.grid.push_messages([plain[0], step, plain[1]])
    taken = link.pull(steps_only=True)
    assert taken is not None
    assert text_of(taken) == "step"
    assert link.exchange(answer_to(taken, "done"), steps_only=True) is None
    later = [link.pull(), link.pull(), link.pull()]
    assert [text_of(one) for one in later if one is not None] == ["one", "two"]


def test_a_message_that_was_taken_back_is_not_given(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    ids = site.grid.push_messages([question(site, machine, "one")])
    site.grid.delete_messages(set(ids))
    assert link.pull() is None


def test_nothing_is_left_behind(site: Site, machine: Machine, link: CoordinatorClient) -> None:
    """Or memory would grow with the rounds."""
    store = site.superlink.state.object_store
    before = len(store)
    for number in range(3):
        ids = set(site.grid.push_messages([question(site, machine, f"text {number}")]))
        message = link.pull()
        assert message is not None
        link.push(answer_to(message, f"answer {number}"))
        assert len(list(site.grid.pull_messages(ids))) == 1
    assert len(store) == before


# --- hostile replies -------------------------------------------------------------------------


def packed(message: Message, text: str) -> FlowerMessage:
    return pack_message(answer_to(message, text))


def test_a_reply_that_is_not_whole_does_not_block_the_others(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    """To Flower's own handlers a reply may be known before its objects are there."""
    other = site.enroll()
    other_link = CoordinatorClient(site.credentials(other))
    other_link.open()
    ids = set(site.grid.push_messages([question(site, m, "q") for m in (machine, other)]))
    first, second = link.pull(), other_link.pull()
    assert first is not None
    assert second is not None
    parcel = packed(first, "slow")
    head, tree = ProtoMessage.FromString(parcel.message), ObjectTree.FromString(parcel.tree)
    state, run_id = site.superlink.state, head.metadata.run_id
    pushed = fleet_handlers.push_messages(
        PushMessagesRequest(node=link._node, messages_list=[head], message_object_trees=[tree]),
        state,
    )
    other_link.push(answer_to(second, "whole"))
    assert [text_of(reply) for reply in site.grid.pull_messages(ids)] == ["whole"]
    slow = {first.metadata.message_id}
    for object_id in pushed.objects_to_push:
        assert list(site.grid.pull_messages(slow)) == []
        state.store_object(run_id, pushed.session_id, object_id, parcel.objects[object_id])
    assert [text_of(reply) for reply in site.grid.pull_messages(slow)] == ["slow"]
    other_link.close()


def test_nobody_answers_in_anothers_name(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    ids = set(site.grid.push_messages([question(site, machine, "q")]))
    message = link.pull()
    assert message is not None
    stranger = site.enroll()
    other = CoordinatorClient(site.credentials(stranger))
    other.open()
    forged = PollRequest(reply=packed(message, "forged"), wants_work=False)
    with pytest.raises(BadMessage, match="another sender"):
        site.superlink.poll(site.nodes[stranger.peer], forged)
    other.close()
    assert list(site.grid.pull_messages(ids)) == []
    link.push(answer_to(message, "genuine"))
    assert [text_of(reply) for reply in site.grid.pull_messages(ids)] == ["genuine"]


def test_a_parcel_that_is_none_is_refused(site: Site, machine: Machine, http: httpx.Client) -> None:
    for body in (
        b"",
        b"\xc1",
        b"\x91" * 5000,
        msgspec.msgpack.encode({"reply": {"message": b"x"}}),
    ):
        answer = http.post(
            POLL_PATH, content=body, headers=machine.headers("POST", POLL_PATH, body)
        )
        assert answer.status_code == 400


def test_a_refused_parcel_is_an_error_of_the_link(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    ids = set(site.grid.push_messages([question(site, machine, "q")]))
    message = link.pull()
    assert message is not None
    message.metadata.__dict__["_run_id"] = 7
    with pytest.raises(Unreachable, match="400"):
        link.push(answer_to(message, "x"))
    site.grid.delete_messages(ids)


HOSTILE = ["content", "tree", "missing", "bytes", "kind", "empty", "head"]
HEADS: list[tuple[str, Any]] = [
    ("ttl", -1.0),
    ("ttl", math.nan),
    ("ttl", 1e300),
    ("created_at", math.nan),
    ("created_at", 1e300),
    ("message_type", "strange"),
    ("message_id", ""),
    ("message_id", "0" * 64),
    ("reply_to_message_id", ""),
    ("reply_to_message_id", "0" * 64),
    ("dst_node_id", 2**63),
    ("group_id", "x" * 10_000),
]


@given(data=st.data())
@settings(max_examples=150)
def test_no_reply_can_harm_the_grid(site: Site, data: st.DataObject) -> None:
    """Whatever an enrolled machine makes of its reply: refused, or an answer that the gate sees."""
    machine = site.enroll()
    node = site.nodes[machine.peer]
    site.superlink.state.activate_node(node, 60.0)
    ids = set(site.grid.push_messages([question(site, machine, "q")]))
    given_out = site.superlink.poll(node, PollRequest()).work
    assert given_out is not None
    message = Message(
        RecordDict(), reply_to=unpack_message(given_out)
    )  # an empty one, to be filled by hand
    parcel = packed(unpack_message(given_out), "hostile")
    tree = ObjectTree.FromString(parcel.tree)
    objects = dict(parcel.objects)
    what = data.draw(st.sampled_from(HOSTILE))
    some = sorted(objects)[data.draw(st.integers(0, 99)) % len(objects)]
    if what == "content":
        at = data.draw(st.integers(0, 999))
        changed = bytearray(objects[some])
        changed[at % len(changed)] ^= data.draw(st.integers(1, 255))
        objects, tree = _renamed(objects, tree, some, bytes(changed))
    elif what == "kind":
        word = data.draw(st.sampled_from([b"Array", b"ConfigRecord", b"Message", b"Nothing"]))
        body = word + objects[some][objects[some].index(b" ") :]
        objects, tree = _renamed(objects, tree, some, body)
    elif what == "bytes":
        objects, tree = _renamed(objects, tree, some, data.draw(st.binary(max_size=60)))
    elif what == "tree":
        del tree.children[:]
    elif what == "missing":
        del objects[some]
    else:
        parcel = pack_message(message)
        objects, tree = dict(parcel.objects), ObjectTree.FromString(parcel.tree)
    head = ProtoMessage.FromString(parcel.message)
    head.metadata.message_id = tree.object_id
    if what == "head":
        field, value = data.draw(st.sampled_from(HEADS))
        setattr(head.metadata, field, value)
    hostile = FlowerMessage(
        message=head.SerializeToString(), tree=tree.SerializeToString(), objects=objects
    )
    with contextlib.suppress(BadMessage):
        site.superlink.poll(node, PollRequest(reply=hostile, wants_work=False))
    for reply in site.grid.pull_messages(ids):
        assert reply.metadata.reply_to_message_id in ids
        with contextlib.suppress(BadMessage, KeyError, TypeError, ValueError):
            read_claim(reply)
    site.grid.delete_messages(ids)


def _renamed(
    objects: dict[str, bytes], tree: ObjectTree, old: str, content: bytes
) -> tuple[dict[str, bytes], ObjectTree]:
    """Put `content` in the place of an object, under the hash that it has."""
    new = hashlib.sha256(content).hexdigest()
    text = tree.SerializeToString().replace(old.encode(), new.encode())
    others = {
        name: body.replace(old.encode(), new.encode())
        for name, body in objects.items()
        if name != old
    }
    return others | {new: content}, ObjectTree.FromString(text)
