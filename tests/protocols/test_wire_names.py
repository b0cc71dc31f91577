"""Fields keep their names on the wire: older agents, coordinators and files use them."""

from __future__ import annotations

import msgspec
import pytest

from protocols.enrollment.joining import EnrollmentStatus
from protocols.messages.envelope import (
    Command,
    Doorbell,
    EventLine,
    LogRequest,
    LogResponse,
    PeerChanged,
)
from protocols.messages.work import FlowerMessage, PollRequest, PollResponse
from protocols.p2p.gossip import AccessToken, GossipBatch, Neighbor, NeighborsResponse
from protocols.p2p.swarm import DownloadPlan, DownloadPlanRequest, DownloadReport, PieceSource

KEY = bytes(32)
MESSAGE = FlowerMessage(message=b"m", tree=b"t", objects={})
OBJECTS = {"message": b"m", "tree": b"t", "objects": {}}
NEIGHBOR = {"peer": "p", "name": "n", "address": "10.0.0.1:5", "node_public": b"k", "signs": 2}
SOURCE = {"peer": "p", "address": "10.0.0.1:5", "node_public": b"k", "signs": 2}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            EnrollmentStatus(peer="p", name="n", enrollment="awaiting", version="1"),
            {"peer": "p", "name": "n", "standing": "awaiting", "version": "1"},
        ),
        (Doorbell(), {"type": "Doorbell"}),
        (Command(action="pause"), {"type": "Command", "action": "pause", "for_s": 0.0}),
        (LogRequest(request_id="a", max_lines=5), {"type": "LogsAsked", "ask": "a", "most": 5}),
        (LogResponse(request_id="a", lines=[]), {"ask": "a", "lines": []}),
        (
            EventLine(level="info", text="t", subject="s"),
            {"type": "Happened", "level": "info", "text": "t", "subject": "s"},
        ),
        (
            PeerChanged(peer="p", name="n", enrollment="removed", public_key=KEY, has_session=True),
            {
                "type": "PeerKnown",
                "peer": "p",
                "name": "n",
                "labels": {},
                "standing": "removed",
                "public_key": KEY,
                "flower": True,
                "awaits_consent": "",
                "awaits": "consent",
                "fetched_from": {},
                "state": None,
            },
        ),
        (
            PollRequest(reply=MESSAGE, wants_work=False, update=b"u"),
            {
                "reply": OBJECTS,
                "want": False,
                "update": b"u",
                "decided": False,
                "steps": False,
                "seen": None,
                "charged": b"",
                "sum": None,
                "run": "",
            },
        ),
        (
            PollResponse(work=MESSAGE, acknowledged=True, version=b"v"),
            {
                "work": OBJECTS,
                "settled": True,
                "version": b"v",
                "log": None,
                "notices": [],
                "charged": b"",
                "over": False,
                "ended": False,
                "offers": 0,
            },
        ),
        (GossipBatch(entries=(b"e",)), {"words": [b"e"]}),
        (
            NeighborsResponse(access_token=b"t", neighbors=(Neighbor(**NEIGHBOR),), removed=("q",)),
            {"pass_": b"t", "near": [NEIGHBOR], "removed": ["q"]},
        ),
        (
            AccessToken(holder="p", sign_public=KEY, until=1.0, gossip_only=True, signs=2),
            {"holder": "p", "sign_public": KEY, "until": 1.0, "words_only": True, "signs": 2},
        ),
        (
            DownloadPlanRequest(serves_other_networks=True, faulty=("q",)),
            {"address": "", "networks": [], "open": True, "faulty": ["q"]},
        ),
        (
            DownloadPlan(
                digest="0" * 64,
                nbytes=1,
                piece_bytes=2,
                pieces=b"h",
                sources=(PieceSource(**SOURCE),),
                token=b"t",
                use_coordinator=True,
            ),
            {
                "digest": "0" * 64,
                "nbytes": 1,
                "piece_bytes": 2,
                "pieces": b"h",
                "holders": [SOURCE],
                "permit": b"t",
                "seed": True,
            },
        ),
        (
            DownloadReport(rates={"p": 1.0}, faulty=("q",)),
            {"rates": {"p": 1.0}, "faulty": ["q"]},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, msgspec.Struct) else "",
)
def test_wire_names(value: msgspec.Struct, expected: dict[str, object]) -> None:
    data = msgspec.msgpack.encode(value)
    assert msgspec.msgpack.decode(data) == expected
    assert msgspec.msgpack.decode(data, type=type(value)) == value
