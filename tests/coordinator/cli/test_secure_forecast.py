"""What `run start` says before a secure run."""

from __future__ import annotations

import pytest

from benchmarks.speed import secure_many
from coordinator.cli import secure_forecast
from coordinator.storage.run_events import RunSpec
from protocols.privacy.secagg.recovery import recover
from tests.support.secure_cohort import run_cohort


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


def test_with_shared_noise_no_change_is_scaled_down() -> None:
    spec = RunSpec(task="t", rounds=1, secure=True, quorum=3, dp_epsilon=3.0, dp_shared=2)
    said = next(secure_forecast.lines(spec, 3))
    assert said == "secure: the coordinator sees only sums of 3 updates or more"


def test_it_says_the_cost_above_256_peers() -> None:
    assert len(lines(256)) == 2
    assert "more than 65 of 197 neighbors" in lines(1000)[1]
    assert lines(1000)[2] == (
        "keys and shares: in a round each peer exchanges 1.3 MB with the coordinator (1.3 GB in "
        "all) and spends 0.3 s of CPU, the coordinator 50 s"
    )
    assert "up to 134 s of the coordinator's CPU for each 40 MB" in lines(1000)[3]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_it_counts_the_masks_of_a_sum(lost: int) -> None:
    _, _, state = run_cohort(8, (0, lost, 0, 0))
    recovery = recover(state)
    counted = len(recovery.plus) + len(recovery.minus)
    assert secure_forecast.count_masks(8, lost) >= counted > 0
    if lost < 2:  # two lost peers also have a mask in common, which is in no update
        assert secure_forecast.count_masks(8, lost) == counted


def test_it_knows_how_large_the_messages_are() -> None:
    measured = 2 * secure_many.one_peer(80)["bytes"]
    assert secure_forecast.message_bytes(80) == pytest.approx(measured, rel=0.1)


def test_it_says_nothing_of_a_plain_run() -> None:
    assert list(secure_forecast.lines(RunSpec(task="t", rounds=1), 9)) == []
