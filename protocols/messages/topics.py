"""The MQTT topics. No other module builds or parses one. Pure.

    cw/<fleet>/peer/<peer>/presence     retained, with a last will    agent → all
    cw/<fleet>/peer/<peer>/telemetry    a few per second              agent → all
    cw/<fleet>/peer/<peer>/notice       lines for the operator        agent → all
    cw/<fleet>/peer/<peer>/command      doorbell, pause, resume       coordinator → agent
    cw/<fleet>/head/<c>/<d>/<peer>      retained: what it has seen    agent → some agents
                                        of the log of versions
    cw/<fleet>/coordinator/event        runs, rounds, peers           coordinator → monitors

<fleet> is the first 16 hex digits of the SHA-256 of its CA, so several fleets can share a broker.
<c> and <d> are the first two letters of the peer id, which is a hash: an agent of a large fleet
subscribes to a few of these groups, so that no message goes to all.
"""

from __future__ import annotations

import re
from random import Random
from typing import Literal, NamedTuple

Kind = Literal["presence", "telemetry", "notice", "command", "event", "head"]
COORDINATOR = "coordinator"

_PEER = re.compile(r"cw/([0-9a-f]{16})/peer/([A-Z2-7-]{1,32})/(presence|telemetry|notice|command)")
#: A peer id is in base32, as RFC 4648 has it.
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_HEAD = re.compile(r"cw/([0-9a-f]{16})/head/([A-Z2-7])/([A-Z2-7])/(\2\3[A-Z2-7-]{0,30})")
_HEAD_FILTER = re.compile(
    r"cw/([0-9a-f]{16})/head/(\+/\+/\+|[A-Z2-7]/\+/\+|([A-Z2-7])/([A-Z2-7])/(\+|\3\4[A-Z2-7-]{0,30}))"
)
_COORDINATOR = re.compile(r"cw/([0-9a-f]{16})/coordinator/(event)")


class Topic(NamedTuple):
    """A parsed topic. `peer` is `COORDINATOR` for topics of the coordinator."""

    fleet: str
    peer: str
    kind: Kind


def presence(fleet: str, peer: str) -> str:
    return f"cw/{fleet}/peer/{peer}/presence"


def telemetry(fleet: str, peer: str) -> str:
    return f"cw/{fleet}/peer/{peer}/telemetry"


def notice(fleet: str, peer: str) -> str:
    return f"cw/{fleet}/peer/{peer}/notice"


def command(fleet: str, peer: str) -> str:
    return f"cw/{fleet}/peer/{peer}/command"


def head(fleet: str, peer: str) -> str:
    return f"cw/{fleet}/head/{peer[:1]}/{peer[1:2]}/{peer}"


def all_heads(fleet: str) -> str:
    return f"cw/{fleet}/head/+/+/+"


def is_head_filter(fleet: str, topic_filter: str) -> bool:
    """Whether this filter is for heads of this fleet: of a peer, of one or more groups, of all."""
    match = _HEAD_FILTER.fullmatch(topic_filter)
    return match is not None and match[1] == fleet


#: The number of steps of `head_filters`.
HEAD_STEPS = 11


def head_filters(fleet: str, step: int, random: Random) -> list[str]:
    """Filters for about 2^step / 1024 of all peers, in groups drawn at random; 10: for all."""
    if step < 5:
        groups = random.sample([f"{c}/{d}" for c in _ALPHABET for d in _ALPHABET], 1 << step)
    elif step < HEAD_STEPS - 1:
        groups = [f"{c}/+" for c in random.sample(_ALPHABET, 1 << step - 5)]
    else:
        return [all_heads(fleet)]
    return [f"cw/{fleet}/head/{group}/+" for group in groups]


def event(fleet: str) -> str:
    return f"cw/{fleet}/coordinator/event"


def all_peers(fleet: str, kind: Kind) -> str:
    """The topic filter for one kind of message from all peers."""
    return f"cw/{fleet}/peer/+/{kind}"


def parse(topic: str) -> Topic | None:
    """The parts of a topic, or None if it is not one of ours."""
    if match := _PEER.fullmatch(topic):
        return Topic(match[1], match[2], match[3])  # type: ignore[arg-type]
    if match := _COORDINATOR.fullmatch(topic):
        return Topic(match[1], COORDINATOR, match[2])  # type: ignore[arg-type]
    if match := _HEAD.fullmatch(topic):
        return Topic(match[1], match[4], "head")
    return None
