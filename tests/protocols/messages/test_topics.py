"""Topics and states: built and parsed in one place, shown by glyph and word."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.enrollment import identity
from protocols.messages import states, topics
from protocols.messages.states import PeerState
from protocols.messages.topics import COORDINATOR, Topic

FLEETS = st.text("0123456789abcdef", min_size=16, max_size=16)
PEERS = st.binary(min_size=32, max_size=32).map(identity.peer_id)
BUILDERS = {
    "presence": topics.presence,
    "telemetry": topics.telemetry,
    "notice": topics.notice,
    "command": topics.command,
    "head": topics.head,
}


@given(FLEETS, PEERS, st.sampled_from(sorted(BUILDERS)))
def test_a_peers_topic_round_trips(fleet: str, peer: str, kind: str) -> None:
    assert topics.parse(BUILDERS[kind](fleet, peer)) == Topic(fleet, peer, kind)  # type: ignore[arg-type]


@given(FLEETS)
def test_the_coordinators_topic_round_trips(fleet: str) -> None:
    assert topics.parse(topics.event(fleet)) == Topic(fleet, COORDINATOR, "event")


@given(st.text(), FLEETS, PEERS)
def test_a_strange_topic_is_none(junk: str, fleet: str, peer: str) -> None:
    assert topics.parse(junk) is None
    whole = topics.presence(fleet, peer)
    for strange in (junk + whole, whole + junk, whole.replace("peer", junk)):
        if strange != whole:
            assert topics.parse(strange) is None


@pytest.mark.parametrize(
    "topic",
    [
        "cw/0123456789abcdef/peer/+/presence",
        "cw/0123456789abcdef/peer/#",
        "cw/0123456789abcdef/peer/ABCD/event",
        "cw/0123456789abcdef/peer/abcd/presence",
        "cw/0123456789abcdef/peer/ABCD/presence\n",
        "cw/0123456789ABCDEF/peer/ABCD/presence",
        "cw/0123456789abcdef/coordinator/presence",
        "cw/0123456789abcdef/peer//presence",
        "cw/0123456789abcdef/peer/ABCD/head",
        "cw/0123456789abcdef/head/A/C/ABCD",
        "cw/0123456789abcdef/head/A/B/+",
        "",
    ],
)
def test_near_misses(topic: str) -> None:
    assert topics.parse(topic) is None


def test_one_filter_for_all_peers() -> None:
    assert topics.all_peers("f" * 16, "notice") == f"cw/{'f' * 16}/peer/+/notice"


def test_each_step_of_filters_reads_about_twice_as_many_peers() -> None:
    for step in range(topics.HEAD_STEPS):
        filters = topics.head_filters("f" * 16, step, Random(step))
        assert all(topics.is_head_filter("f" * 16, one) for one in filters)
        parts = [one.removeprefix(f"cw/{'f' * 16}/head/").count("+") for one in filters]
        assert len(set(filters)) == len(filters)
        assert sum(32 ** (wildcards - 1) for wildcards in parts) == 1 << step


def test_every_state_has_its_own_glyph_and_word() -> None:
    labels = [states.label(state) for state in PeerState]
    assert len(set(labels)) == len({label[0] for label in labels}) == len(PeerState)
    assert states.label(PeerState.PAUSED, "battery") == "‖ paused: battery"
    assert states.label(PeerState.AWAITING) == "? awaiting approval"
    assert set(PeerState) >= states.AVAILABLE
