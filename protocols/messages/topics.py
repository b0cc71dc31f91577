"""The MQTT topics. No other module builds or parses one. Pure.

    cw/<fleet>/peer/<peer>/presence     retained, with a last will    agent → all
    cw/<fleet>/peer/<peer>/telemetry    a few per second              agent → all
    cw/<fleet>/peer/<peer>/notice       lines for the operator        agent → all
    cw/<fleet>/peer/<peer>/command      doorbell, pause, resume       coordinator → agent
    cw/<fleet>/coordinator/event        runs, rounds, peers           coordinator → monitors

<fleet> is the first 16 hex digits of the SHA-256 of its CA, so several fleets can share a broker.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Kind = Literal["presence", "telemetry", "notice", "command", "event"]
COORDINATOR = "coordinator"

_PEER = re.compile(r"cw/([0-9a-f]{16})/peer/([A-Z2-7-]{1,32})/(presence|telemetry|notice|command)")
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
    return None
