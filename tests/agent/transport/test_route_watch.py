"""A change of the way to the coordinator is seen, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from agent.transport.route_watch import RouteState, RouteWatch, local_address


@pytest.mark.parametrize(
    ("looks", "told"),
    [
        ("aaa", [0, 0, 0]),
        ("aab", [0, 0, 1]),
        ("b", [1]),
        ("aa-a", [0, 0, 0, 1]),  # the cable was out for a moment
        ("a--b", [0, 0, 0, 1]),
        ("--", [0, 0]),
    ],
)
def test_a_change_is_told(looks: str, told: list[int]) -> None:
    way = RouteState()
    found = [None if look == "-" else look for look in looks]
    assert [way.has_changed("a", look, 100.0 * at) for at, look in enumerate(found)] == told


def test_two_ways_that_take_turns_cost_few_reconnects() -> None:
    way = RouteState()
    told = [way.has_changed("a", "ab"[second % 2], float(second)) for second in range(60)]
    assert 0 < sum(told) <= 6


def test_the_way_on_this_machine() -> None:
    assert local_address("127.0.0.1") == "127.0.0.1"
    watch = RouteWatch()
    assert not watch.has_changed(("", ""))
    assert not watch.has_changed(("127.0.0.1", "127.0.0.1"))
    assert watch.has_changed(("10.0.0.1", "127.0.0.1"))
