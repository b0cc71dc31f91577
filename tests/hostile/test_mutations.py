"""Random mutations of all that comes from outside: a clean refusal each time, never a surprise.

What is signed is mutated twice over: as bytes, which the signature must notice, and as values that
are signed again, as an enrolled member that lies would.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from hypothesis import given
from hypothesis import strategies as st

from agent.transport.coordinator_client import pack_message, unpack_message
from coordinator.fleet import reducer as fleets
from coordinator.fleet import state
from coordinator.fleet.state import Fleet
from coordinator.runs import validation
from coordinator.runs.state import Run
from coordinator.runs.validation import ExpectedReply
from coordinator.storage.run_events import RunSpec
from coordinator.transport.flower_records import CLAIM, read_claim
from coordinator.transport.mqtt_client import FleetMqttClient
from protocols.enrollment import certificates, identity, signed_requests, tickets
from protocols.enrollment.joining import JoinRequest
from protocols.errors import (
    BadMessage,
    BadWeights,
    CommonweightError,
    TicketMalformed,
    UpdateRefused,
)
from protocols.messages import envelope as messages
from protocols.messages import topics
from protocols.messages.envelope import Presence, Telemetry, seal, unseal
from protocols.messages.mqtt import MqttAddress, SequencedSigner
from protocols.messages.states import PeerState, RunState
from protocols.messages.work import (
    POLL_PATH,
    SIGNED_CLAIM,
    SIGNED_WORK,
    FlowerMessage,
    PollRequest,
    UpdateClaim,
    Work,
)
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.model.weights_file import WeightsFile
from tests.hostile.mutate import CHANGES, PLACES, WEIRD, as_json, distorted, few, mutated, plain_of
from tests.support.https_site import Machine, Site

pytestmark = pytest.mark.attack("20.wire", by="stranger")

tried: Counter[str] = Counter()
KEY = identity.new_signing_key()
PUBLIC = identity.public_bytes(KEY)
PEER = identity.peer_id(PUBLIC)
FLEET = "0123456789abcdef"

# --- tickets, joining, signed requests -------------------------------------------------------

TICKET = tickets.new_ticket(("coordinator.lan:9092", "10.0.0.1:9092"), bytes(range(32)))


@given(CHANGES)
@few(1500)
def test_tickets(changes: list[tuple[str, int, bytes]]) -> None:
    """Attack: change, cut or lengthen a ticket at random."""
    tried["ticket"] += 1
    text = mutated(tickets.encode(TICKET).encode(), changes).decode("latin-1")
    try:
        assert tickets.decode(text) == TICKET, "only blanks were added"
    except TicketMalformed:
        pass


@given(PLACES)
@few(700)
def test_tickets_with_a_good_checksum(places: list[tuple[int, Any, bool]]) -> None:
    """Attack: make a ticket of wrong types and sizes, with a good checksum."""
    tried["ticket"] += 1
    fields = [list(TICKET.addresses), TICKET.ca_sha256, TICKET.id, TICKET.secret]
    try:
        body = msgspec.msgpack.encode(distorted(fields, places))
    except OverflowError:
        return
    checksum = hashlib.sha256(body).digest()[:4]
    text = tickets.PREFIX + base64.urlsafe_b64encode(body + checksum).rstrip(b"=").decode()
    with contextlib.suppress(TicketMalformed):
        tickets.decode(text)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"), flower=True)
    with made.up():
        yield made


@given(places=PLACES, changes=CHANGES, raw=st.booleans())
@few(600)
def test_join_bodies(
    site: Site,
    places: list[tuple[int, Any, bool]],
    changes: list[tuple[str, int, bytes]],
    raw: bool,
) -> None:
    """Attack: send a distorted request to join."""
    tried["join"] += 1
    machine = Machine()
    ticket = tickets.new_ticket(("x:1",), bytes(32))  # nobody made it
    whole = machine.joining(ticket)
    body = (
        mutated(msgspec.json.encode(whole), changes)
        if raw
        else as_json(distorted(plain_of(whole), places))
    )
    before = len(site.registry.peers)
    with contextlib.suppress(
        msgspec.DecodeError, UnicodeDecodeError, RecursionError, CommonweightError
    ):
        site.registry.join(msgspec.json.decode(body, type=JoinRequest))
    assert len(site.registry.peers) == before


HEADERS = [
    signed_requests.SENDER,
    signed_requests.TIME,
    signed_requests.NONCE,
    signed_requests.BODY,
    signed_requests.SIGNATURE,
]


@given(st.sampled_from(HEADERS), CHANGES, st.sampled_from(["GET", "PUT", "get", ""]))
@few(1200)
def test_signed_request_headers(
    name: str, changes: list[tuple[str, int, bytes]], method: str
) -> None:
    """Attack: change the headers of a signed request."""
    tried["request"] += 1
    sent = signed_requests.sign_headers(PEER, KEY.sign, "GET", "/cw/v1/mqtt")
    sent[name] = mutated(sent[name].encode(), changes).decode("latin-1")
    try:
        signed = signed_requests.parse(method, "/cw/v1/mqtt", sent, time.time())
    except BadMessage:
        return
    good = identity.verify(PUBLIC, signed.signature, signed.message)
    assert not (good and signed.sender == PEER), "a changed request is not the one that was signed"


# --- MQTT ------------------------------------------------------------------------------------

TOPIC = topics.presence(FLEET, PEER)
PRESENCE = Presence(state=PeerState.IDLE, name="box", version="1", tasks=("mnist",))
TELEMETRY = Telemetry(run="r", round=1, phase="train", step=3, steps=9, loss=0.5)


def knows(sender: str, signature: bytes, signed: bytes) -> bool:
    return sender == PEER and identity.verify(PUBLIC, signature, signed)


def a_feed() -> tuple[FleetMqttClient, Fleet, list[BadMessage]]:
    fleet = Fleet(fleet=FLEET)
    known = messages.PeerChanged(peer=PEER, name="box", public_key=PUBLIC)
    voice = SequencedSigner(topics.COORDINATOR, KEY.sign)
    fleets.reduce(fleet, voice.next_envelope(known), time.time())
    rejected: list[BadMessage] = []
    feed = FleetMqttClient(
        MqttAddress(host="x", port=1),
        FLEET,
        knows,
        lambda kind, envelope: fleets.reduce(fleet, envelope, time.time()) and None,
        lambda up, why: None,
        lambda topic, err: rejected.append(err),
    )
    return feed, fleet, rejected


@given(CHANGES)
@few(1200)
def test_envelopes_as_bytes(changes: list[tuple[str, int, bytes]]) -> None:
    """Attack: change the bytes of a signed MQTT message."""
    tried["envelope"] += 1
    feed, fleet, rejected = a_feed()
    before = state.encode(fleet, 0.0)
    payload = mutated(SequencedSigner(PEER, KEY.sign).seal(TOPIC, PRESENCE), changes)
    feed._on_message(TOPIC, payload)
    assert len(rejected) == (1 if payload else 0)
    assert state.encode(fleet, 0.0) == before


@pytest.mark.attack("20.wire", by="peer")
@given(PLACES, st.sampled_from([PRESENCE, TELEMETRY]))
@few(1000)
def test_envelopes_of_a_lying_member(
    places: list[tuple[int, Any, bool]], body: Presence | Telemetry
) -> None:
    """Attack: sign an MQTT message with fields of wrong types, sizes and numbers."""
    tried["envelope"] += 1
    feed, fleet, _ = a_feed()
    topic = TOPIC if isinstance(body, Presence) else topics.telemetry(FLEET, PEER)
    whole = plain_of(SequencedSigner(PEER, KEY.sign).next_envelope(body))
    payload = as_json(distorted(whole, places))
    signature = KEY.sign(b"commonweight mqtt 1\n" + topic.encode() + b"\n" + payload)
    feed._on_message(topic, base64.urlsafe_b64encode(signature) + b"." + payload)
    state.decode(state.encode(fleet, time.time()))
    assert set(fleet.peers) == {PEER}


@given(CHANGES)
@few(500)
def test_topics(changes: list[tuple[str, int, bytes]]) -> None:
    """Attack: send a signed MQTT message under another topic."""
    tried["topic"] += 1
    text = mutated(TOPIC.encode(), changes).decode("latin-1")
    found = topics.parse(text)
    assert found is None or found.fleet in text
    envelope = SequencedSigner(PEER, KEY.sign).next_envelope(PRESENCE)
    with pytest.raises(BadMessage):
        unseal(text, seal(TOPIC, envelope, KEY.sign), knows)


# --- claims and work -------------------------------------------------------------------------

RUN = Run(
    id="mnist-1",
    spec=RunSpec(task="mnist", rounds=3),
    state=RunState.TRAINING,
    round=2,
    head="a" * 64,
    parent="a" * 64,
    peers={PEER: "asked"},
)
GOOD = UpdateClaim(
    run="mnist-1",
    round=2,
    kind="train",
    peer=PEER,
    base="a" * 64,
    digest="b" * 64,
    nbytes=1000,
    num_examples=80,
    metrics={"train_loss": 0.5, "accuracy": 0.9},
    nonce="n",
)


def judge(payload: bytes, signature: bytes) -> UpdateClaim | None:
    """What the run loop does with a claim; None for a clean refusal."""
    content = RecordDict({CLAIM: ConfigRecord({"claim": payload, "signature": signature})})
    reply = Message(content, reply_to=Message(RecordDict(), 1, "train"))
    try:
        claim, payload, signature = read_claim(reply)
        expected = ExpectedReply("train", "a" * 64, {})
        validation.check_claim(RUN, expected, PEER, claim, payload, signature, knows)
    except (BadMessage, KeyError, TypeError, ValueError, UpdateRefused):
        return None
    return claim


@given(CHANGES)
@few(900)
def test_claims_as_bytes(changes: list[tuple[str, int, bytes]]) -> None:
    """Attack: change the bytes of a signed claim about an update."""
    tried["claim"] += 1
    payload, signature = SIGNED_CLAIM.seal(GOOD, KEY.sign)
    assert judge(payload, signature) == GOOD
    assert judge(mutated(payload, changes), signature) is None
    assert judge(payload, mutated(signature, changes)) is None


@pytest.mark.attack("20.wire", by="peer")
@given(PLACES)
@few(1200)
def test_claims_of_a_lying_member(places: list[tuple[int, Any, bool]]) -> None:
    """Attack: sign a claim with fields of wrong types, sizes and numbers."""
    tried["claim"] += 1
    payload = as_json(distorted(plain_of(GOOD), places))
    claim = judge(payload, KEY.sign(SIGNED_CLAIM.signed_bytes(payload)))
    if claim is not None:  # what is accepted is what was asked, within its bounds
        assert (claim.run, claim.round, claim.kind, claim.peer) == ("mnist-1", 2, "train", PEER)
        assert claim.base == "a" * 64
        assert 0 < claim.num_examples <= RUN.spec.max_examples
        assert len(claim.metrics) <= validation.MAX_METRICS


WORK = Work(run="r", round=1, kind="train", task="mnist", base="a" * 64, settings={"lr": 0.1})


@pytest.mark.attack("20.wire", by="coordinator")
@given(CHANGES, PLACES, st.booleans())
@few(900)
def test_work(
    changes: list[tuple[str, int, bytes]], places: list[tuple[int, Any, bool]], raw: bool
) -> None:
    """Attack: change work on its way, or sign work with distorted fields."""
    tried["work"] += 1
    payload, signature = SIGNED_WORK.seal(WORK, KEY.sign)
    if raw:
        with pytest.raises(BadMessage):
            SIGNED_WORK.open(mutated(payload, changes), signature, _by_key)
        return
    payload = as_json(distorted(plain_of(WORK), places))
    with contextlib.suppress(BadMessage):
        SIGNED_WORK.open(payload, KEY.sign(b"commonweight work 1\n" + payload), _by_key)


def _by_key(signature: bytes, signed: bytes) -> bool:
    return identity.verify(PUBLIC, signature, signed)


# --- weights ---------------------------------------------------------------------------------

MODEL = Weights({"w": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.array([7], np.int64)})
DATA = weights.to_bytes(MODEL)


@pytest.mark.attack("20.wire", by="peer")
@given(CHANGES)
@few(1500)
def test_safetensors(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    """Attack: change the bytes of a file of weights."""
    tried["weights"] += 1
    data = mutated(DATA, changes)
    path = _scratch(tmp_path_factory)
    path.write_bytes(data)
    refused = []
    for read in (lambda: weights.from_bytes(data), lambda: weights.load(path)):
        try:
            found = read()
        except BadWeights:
            refused.append(True)
        else:
            assert weights.to_bytes(found) == data, "only what is canonical is read"
            refused.append(False)
    try:
        with WeightsFile(path) as stored:
            assert stored.nbytes == len(data)
        refused.append(False)
    except BadWeights:
        refused.append(True)
    assert len(set(refused)) == 1
    with contextlib.suppress(UpdateRefused):
        validation.check_weights(
            ExpectedReply("train", "", MODEL.schema), lambda: weights.from_bytes(data)
        )


_files: dict[str, Path] = {}


def _scratch(factory: pytest.TempPathFactory) -> Path:
    if "scratch" not in _files:
        _files["scratch"] = factory.mktemp("weights") / "update.safetensors"
    return _files["scratch"]


@pytest.mark.attack("20.wire", by="peer")
@given(st.dictionaries(st.sampled_from(["w", "n", "é", "", "x" * 300]), st.sampled_from(WEIRD)))
@few(600)
def test_safetensors_headers(table: dict[str, Any]) -> None:
    """Attack: send a file of weights with strange names, shapes and offsets."""
    tried["weights"] += 1
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = as_json({name: entry | {"shape": weird} for name, weird in copy.deepcopy(table).items()})
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    with contextlib.suppress(BadWeights):
        weights.from_bytes(data)


@given(CHANGES)
@few(300)
def test_node_keys_and_certificates(changes: list[tuple[str, int, bytes]]) -> None:
    """Attack: change a public key or a certificate."""
    tried["key"] += 1
    with pytest.raises(BadMessage):
        identity.check_node_public(mutated(NODE_PUBLIC, changes))
    with pytest.raises(BadMessage):
        certificates.verify_certificate(CA_PEM, mutated(CERTIFICATE, changes))


CA_KEY, CA_PEM = certificates.new_ca("x")
NODE_PUBLIC = identity.node_public_pem(identity.new_node_key())
CERTIFICATE = certificates.issue_certificate(
    CA_KEY,
    certificates.NodeCertificate(
        fleet=FLEET,
        peer=PEER,
        name="box",
        sign_public=PUBLIC,
        node_public=NODE_PUBLIC,
        not_after=1.0,
    ),
)


# --- the exchange ----------------------------------------------------------------------------


class Asked:
    """An enrolled machine that has a question, and what it would honestly send."""

    def __init__(self, site: Site) -> None:
        self.site, self.machine = site, site.enroll("eve")
        self.node = site.nodes[self.machine.peer]
        site.superlink.state.activate_node(self.node, 60.0)

    def parcel(self) -> FlowerMessage:
        content = RecordDict({"config": ConfigRecord({"text": "q"})})
        question = Message(content, self.node, "train", group_id="r")
        self.ids = set(self.site.grid.push_messages([question]))
        given_out = self.site.superlink.poll(self.node, PollRequest()).work
        assert given_out is not None
        answer = RecordDict({CLAIM: ConfigRecord({"claim": b"x"}), "metrics": MetricRecord()})
        return pack_message(Message(answer, reply_to=unpack_message(given_out)))

    def settle(self) -> None:
        """What the run does then; nothing may be left of the question."""
        for reply in self.site.grid.pull_messages(self.ids):
            with contextlib.suppress(BadMessage, KeyError, TypeError, ValueError):
                read_claim(reply)
        self.site.grid.delete_messages(self.ids)


@pytest.fixture(scope="module")
def asked(site: Site) -> Asked:
    return Asked(site)


PARTS = st.sampled_from(["message", "tree", "objects", "body", "deep", "wide"])


@pytest.mark.attack("20.wire", by="peer")
@given(part=PARTS, changes=CHANGES, keep_hash=st.booleans(), data=st.data())
@few(1200)
def test_exchange_bodies(
    asked: Asked,
    part: str,
    changes: list[tuple[str, int, bytes]],
    keep_hash: bool,
    data: st.DataObject,
) -> None:
    """Attack: change, nest or enlarge the messages of Flower at random."""
    count = data.draw(st.integers(1, 60))
    tried["exchange"] += 1
    parcel = asked.parcel()
    objects = dict(parcel.objects)
    message, tree = parcel.message, parcel.tree
    if part == "message":
        message = mutated(message, changes)
    elif part == "tree":
        tree = mutated(tree, changes)
    elif part in ("deep", "wide"):
        root = ObjectTree.FromString(tree)
        node = root
        for number in range(count):
            node.children.add(object_id=hashlib.sha256(str(number).encode()).hexdigest())
            node = node.children[-1] if part == "deep" else root
        tree = root.SerializeToString()
    elif part == "objects":
        name = sorted(objects)[count % len(objects)]
        content = mutated(objects.pop(name), changes)
        new = name if keep_hash else hashlib.sha256(content).hexdigest()
        objects = {n: c.replace(name.encode(), new.encode()) for n, c in objects.items()}
        objects[new] = content
        tree = tree.replace(name.encode(), new.encode())
        head = ProtoMessage.FromString(message)
        head.metadata.message_id = ObjectTree.FromString(tree).object_id
        message = head.SerializeToString()
    body = msgspec.msgpack.encode(
        {"reply": {"message": message, "tree": tree, "objects": objects}, "want": False}
    )
    if part == "body":
        body = mutated(body, changes)
    try:
        order = msgspec.msgpack.decode(body, type=PollRequest)
        asked.site.superlink.poll(asked.node, order)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, BadMessage):
        pass
    asked.settle()


def test_nothing_piles_up_in_flowers_memory(asked: Asked) -> None:
    """Control: after all refused messages, no message is left in memory."""
    state = asked.site.superlink.state
    assert state.num_message_ins() == 0
    assert state.num_message_res() == 0
    assert len(state.object_store) == 0
    assert len(state._object_push_sessions) == 0  # type: ignore[attr-defined]


# --- over HTTP -------------------------------------------------------------------------------

ROUTES = [
    ("POST", "/cw/v1/join"),
    ("POST", "/cw/v1/operators/join"),
    ("POST", "/cw/v1/logs"),
    ("POST", POLL_PATH),
    ("GET", "/cw/v1/weights/" + "0" * 64),
    ("PUT", "/cw/v1/updates/" + "0" * 64),
    ("GET", "/cw/v1/peers"),
    ("POST", "/cw/v1/tickets"),
    ("GET", "/cw/v1/fleet"),
    ("POST", "/v1/fleet/activate-node"),
    ("POST", "/v1/fleet/deactivate-node"),
]


@pytest.fixture(scope="module")
def http(site: Site) -> Iterator[httpx.Client]:
    with site.http() as client:
        yield client


@given(
    route=st.sampled_from(ROUTES),
    changes=CHANGES,
    where=st.sampled_from(["path", "body", "headers", "signed body"]),
)
@few(400)
def test_over_http(
    site: Site, http: httpx.Client, asked: Asked, route: Any, changes: Any, where: str
) -> None:
    """Attack: change path, headers and body of requests to a running server."""
    tried["http"] += 1
    method, path = route
    body = b'{"ttl_s":60,"uses":1,"label":"x"}'
    sent = mutated(body, changes) if where in ("body", "signed body") else body
    operator = path in ("/cw/v1/peers", "/cw/v1/tickets", "/cw/v1/fleet")
    sign = site.operator if operator else asked.machine.headers
    headers = sign(method, path, sent if where == "signed body" else body)
    if where == "headers":
        name = sorted(headers)[len(changes) % len(headers)]
        noisy = mutated(headers[name].encode(), changes)
        headers[name] = "".join(chr(c) for c in noisy if 32 < c < 127)
    if where == "path":
        path = "/" + mutated(path.encode(), changes).decode("latin-1").lstrip("/")
        path = path.replace("?", "").replace("#", "").replace("\\", "")
    try:
        answer = http.request(method, path, content=sent, headers=headers)
    except (httpx.InvalidURL, httpx.LocalProtocolError, httpx.UnsupportedProtocol):
        return  # httpx itself refuses to send it
    assert answer.status_code < 500, (method, path, sent, answer.content)


def test_zz_enough_was_tried() -> None:
    """Control: at least 10,000 mutations were tried."""
    total = sum(tried.values())
    print(f"{total} mutations tried, all refused cleanly or harmless: {dict(tried)}")
    assert total >= 10_000
