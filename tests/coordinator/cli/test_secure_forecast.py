"""What `run start` says before a secure run."""

from __future__ import annotations

from coordinator.cli import secure_forecast
from coordinator.storage.run_events import RunSpec


def lines(peers: int, quorum: int = 3) -> list[str]:
    spec = RunSpec(task="t", rounds=1, secure=True, quorum=quorum, clip_norm=10.0)
    return list(secure_forecast.lines(spec, peers))


def test_it_says_what_is_summed_and_how_many_peers_may_be_lost() -> None:
    assert lines(5) == [
        "secure: the coordinator sees only sums of 3 updates or more; each peer scales its change "
        "down to norm 10 (--clip-norm)",
        "a round with 5 peers is trained again if more than 1 of 5 peers are lost in it",
    ]
    assert "if any of 3 peers is lost" in lines(3)[1]
    assert "if any of 5 peers is lost" in lines(5, quorum=5)[1]


def test_it_says_the_cost_above_256_peers() -> None:
    assert len(lines(256)) == 2
    assert "more than 65 of 197 neighbors" in lines(1000)[1]
    assert "up to 134 s of the coordinator's CPU for each 40 MB" in lines(1000)[2]


def test_it_says_nothing_of_a_plain_run() -> None:
    assert list(secure_forecast.lines(RunSpec(task="t", rounds=1), 9)) == []
