"""A full disk on either side: the run stands still, says why, and goes on by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.disk import can_mount, fill, small_disk
from tests.support.fleet_harness import Fleet, fleet
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not can_mount(), reason="only root on Linux can mount a small disk"),
]
LONG = 200
RUN = ("ping", "--quorum", "2", "--set", "kilobytes=1000", "--rounds")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Fleet]:
    disks = small_disk(tmp_path / "coordinator"), small_disk(tmp_path / "ada")
    with disks[0], disks[1], fleet(tmp_path) as made:
        made.up()
        made.join("ada", "bob")
        made.start("ada", "bob")
        yield made


def waits_for(site: Fleet, run: str, words: str) -> None:
    wait_for(lambda: words in site.ask("run", "show", run).stdout, f"the run waits for {words}")


def is_whole(site: Fleet, run: str, rounds: int) -> None:
    """The run ended well, and every round counted each peer once."""
    told = site.ended_run(run)
    assert told["state"] == "finished", told["ended_because"]
    assert len(told["history"]) == rounds
    for closed in told["history"]:
        assert len(closed["contributors"]) == len(set(closed["contributors"])) == 2


def test_of_the_coordinator_with_no_byte_left(site: Fleet) -> None:
    ballast = fill(site.home, 0)
    refused = site.ask("run", "start", *RUN, "6")
    assert refused.returncode == 1
    assert "is full" in refused.stderr
    ballast.unlink()
    run = site.start_run(*RUN, str(LONG))
    wait_for(lambda: site.run(run)["history"], "a round is done")
    ballast = fill(site.home, 0)
    waits_for(site, run, "waits for space on the coordinator's disk")
    ballast.unlink()
    is_whole(site, run, LONG)
    assert site.ask("admin", "audit", "verify").returncode == 0


def test_of_the_coordinator_with_room_for_the_ledger_but_no_update(site: Fleet) -> None:
    ballast = fill(site.home, 3_000_000)
    run = site.start_run(*RUN, "6")
    waits_for(site, run, "waits for space on the coordinator's disk")
    assert any("no space on the coordinator's disk" in text for text in site.events())
    # The one that was asked for the first weights.
    both = ("ada", "bob")
    wait_for(
        lambda: any("disk is full" in site.agent(n)["last_error"] for n in both),
        "an agent says why",
    )
    ballast.unlink()
    is_whole(site, run, 6)


def test_of_an_agent(site: Fleet) -> None:
    run = site.start_run(*RUN, str(LONG))
    wait_for(lambda: site.run(run)["history"], "a round is done")
    ballast = fill(site.folder / "ada", 0)
    site.until_agent(
        "ada", "is paused", lambda told: (told["state"], told["reason"]) == ("paused", "disk full")
    )
    waits_for(site, run, "for the quorum")
    ballast.unlink()
    is_whole(site, run, LONG)
