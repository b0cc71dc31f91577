"""Who is sent to whom: near, the least loaded first, and never in a circle."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.transport.piece_sources import FIRST_SEED_WAIT_S, MAX_AGE_S, PieceSources
from protocols.p2p.swarm import MAX_SOURCES, DownloadPlanRequest

VERSION = "0" * 64
HOME = ("192.168.1.0/24",)
ROUTER = "203.0.113.7"


def at_home(number: int, **changed: object) -> DownloadPlanRequest:
    fields: dict[str, object] = {"address": f"192.168.1.{number}:4000", "networks": HOME}
    return DownloadPlanRequest(**(fields | changed))  # type: ignore[arg-type]


def ask(holders: PieceSources, number: int, now: float = 0.0, **changed: object) -> list[str]:
    asked = at_home(number, **changed)
    return [
        peer for peer, _ in holders.plan_fetch(VERSION, f"p{number}", asked, ROUTER, now).sources
    ]


def test_the_first_of_a_network_asks_the_coordinator_and_later_ones_those_before() -> None:
    holders = PieceSources()
    assert ask(holders, 1) == []
    assert ask(holders, 2) == ["p1"]
    assert ask(holders, 3) == ["p2", "p1"], "the less loaded first"
    assert holders.plan_fetch(VERSION, "p9", at_home(9), ROUTER, 0.0).sources[0] == (
        "p3",
        "192.168.1.3:4000",
    )


def test_other_networks_are_another_affair() -> None:
    holders = PieceSources()
    ask(holders, 1)
    elsewhere = DownloadPlanRequest(address="10.0.0.2:4000", networks=("10.0.0.0/8",))
    assert holders.plan_fetch(VERSION, "far", elsewhere, "198.51.100.1", 0.0).sources == []
    # The same private numbers behind another router are another home.
    assert holders.plan_fetch(VERSION, "twin", at_home(8), "198.51.100.1", 0.0).sources == []


def test_without_a_router_in_between_the_network_is_seen_as_it_is() -> None:
    holders = PieceSources()
    holders.plan_fetch(VERSION, "p1", at_home(1), "192.168.1.1", 0.0)
    found = holders.plan_fetch(VERSION, "p2", at_home(2), "192.168.1.2", 0.0).sources
    assert [peer for peer, _ in found] == ["p1"]


def test_an_open_holder_serves_everybody() -> None:
    holders = PieceSources()
    ask(holders, 1, serves_other_networks=True)
    elsewhere = DownloadPlanRequest(address="10.0.0.2:4000", networks=("10.0.0.0/8",))
    found = holders.plan_fetch(VERSION, "far", elsewhere, "198.51.100.1", 0.0).sources
    assert found == [("p1", f"{ROUTER}:4000")], "where it was seen"


def test_who_failed_is_not_given_again_and_after_two_complaints_to_nobody() -> None:
    holders = PieceSources()
    ask(holders, 1)
    ask(holders, 2)
    assert ask(holders, 3, faulty=("p1",)) == ["p2"]
    assert holders.record_complete(VERSION, "p2", {}, ("p1",)) == ["p1"]
    assert "p1" in ask(holders, 4), "one complaint may be a lie"
    assert holders.record_complete(VERSION, "p2", {}, ("p1",)) == []
    assert "p1" in ask(holders, 5), "and twice the same is still one"
    assert holders.record_complete(VERSION, "p3", {}, ("p1", "p1", "p3", "nobody")) == []
    assert "p1" not in ask(holders, 6)
    holders.clear_complaints("p1")
    assert "p1" in ask(holders, 7, faulty=("p2", "p3", "p4", "p5", "p6"))


def test_nobody_is_sent_to_the_removed_the_absent_or_the_long_ago() -> None:
    here = {"p1", "p2", "p3"}
    holders = PieceSources(lambda peer: peer in here)
    ask(holders, 1)
    ask(holders, 2)
    holders.remove_peer("p1")
    assert ask(holders, 3) == ["p2"]
    here.discard("p2")
    assert ask(holders, 4) == ["p3"]
    assert ask(holders, 5, now=MAX_AGE_S + 1) == []


def test_a_whole_version_serves_also_those_who_asked_before() -> None:
    holders = PieceSources()
    ask(holders, 1)
    ask(holders, 2)
    assert ask(holders, 1) == []
    holders.record_complete(VERSION, "p2", {}, ())
    assert ask(holders, 1) == ["p2"]


def test_a_network_whose_seed_is_slow_is_given_others_ever_more_seldom() -> None:
    holders = PieceSources()

    def seed(number: int, now: float) -> bool:
        return holders.plan_fetch(VERSION, f"p{number}", at_home(number), ROUTER, now).seed

    assert seed(1, 0.0)
    assert not seed(2, FIRST_SEED_WAIT_S - 1)
    assert seed(3, FIRST_SEED_WAIT_S)
    assert not seed(4, FIRST_SEED_WAIT_S + 1.9 * FIRST_SEED_WAIT_S)
    assert seed(4, FIRST_SEED_WAIT_S + 2 * FIRST_SEED_WAIT_S)
    holders.record_complete(VERSION, "p4", {}, ())
    assert not seed(5, 1000.0), "somebody has it whole"


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.sampled_from(["ask", "held", "gone", "mute"])),
        max_size=60,
    )
)
def test_whoever_waits_waits_for_nobody_who_waits_for_him(deeds: list[tuple[int, str]]) -> None:
    holders = PieceSources()
    waits: dict[str, set[str]] = {}
    for number, deed in deeds:
        peer = f"p{number}"
        if deed in ("held", "gone"):
            if deed == "held":
                holders.record_complete(VERSION, peer, {f"p{number + 1}": 1e6}, ())
            else:
                holders.remove_peer(peer)
            waits.pop(peer, None)
            for others in waits.values():
                others.discard(peer)
        else:
            found = ask(holders, number, **({"address": ""} if deed == "mute" else {}))
            assert len(found) <= MAX_SOURCES
            assert peer not in found
            waits[peer] = {other for other in found if other in waits}
    settled: set[str] = set()
    while free := {peer for peer, others in waits.items() if others <= settled} - settled:
        settled |= free
    assert settled == waits.keys()
