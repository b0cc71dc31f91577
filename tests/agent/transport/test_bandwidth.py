"""The limit of a rate, and the count of a day's bytes."""

from __future__ import annotations

from pathlib import Path

from agent.transport.bandwidth import Bandwidth, RateLimit


def test_bytes_wait_for_those_before_them() -> None:
    limit = RateLimit()
    assert limit.reserve(1000, 100) == 0
    assert 9 < limit.reserve(1000, 100) <= 10
    assert 19 < limit.reserve(1, 100) <= 20


def test_without_a_limit_nothing_waits() -> None:
    limit = RateLimit()
    assert [limit.reserve(10**9, 0) for _ in range(3)] == [0, 0, 0]


def test_a_full_line_does_not_delay_the_other_direction(tmp_path: Path) -> None:
    bandwidth = Bandwidth(tmp_path)
    bandwidth.rates = lambda: (0.000_001, 0.0)
    bandwidth.sent(1)  # the line up is busy for 8 seconds
    bandwidth.rates = lambda: (0.000_001, 0.000_001)
    bandwidth.received(1)
    assert bandwidth.today() == (1, 1)
    assert bandwidth._limits[0].reserve(1, 1) > 4, "it did not wait for the line up"


def test_the_count_survives_a_restart(tmp_path: Path) -> None:
    bandwidth = Bandwidth(tmp_path)
    bandwidth.sent(5)
    bandwidth.received(7)
    bandwidth.save(at_once=True)
    assert Bandwidth(tmp_path).today() == (5, 7)
