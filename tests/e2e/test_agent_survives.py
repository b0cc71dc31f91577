"""What an agent gets over by itself, and what it says when it cannot: real processes, real work."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from tests.support.fleet_harness import Fleet, descendants, fleet
from tests.support.waiting import wait_for

#: Seconds of work a round on one core, and the same in every test run.
SLOW = ["--set", "epochs=30", "--seed", "7"]


def trainers(site: Fleet, name: str) -> list[psutil.Process]:
    return descendants(site.programs[name].process.pid)


def journal(site: Fleet, name: str) -> Path:
    return site.folder / name / "trainer" / "journal"


@pytest.mark.long
def test_an_agent_that_was_ended_or_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    with fleet(tmp_path, COMMONWEIGHT_AGENT_CHECKPOINT_INTERVAL_S="0.1") as site:
        site.up()
        site.join("ada")
        site.start("ada")
        whole = site.ended_run(site.start_run("mnist", "--rounds", "1", "--quorum", "1", *SLOW))
        run = site.start_run("mnist", "--rounds", "1", "--quorum", "1", *SLOW)
        for end in ("stop", "kill"):
            site.until_agent("ada", "trains", lambda told: told["state"] == "training")
            file = journal(site, "ada")
            wait_for(lambda: file.exists(), "the journal is kept")  # noqa: B023
            kept_at = file.stat().st_mtime_ns
            wait_for(lambda: file.stat().st_mtime_ns > kept_at, "it is kept anew")  # noqa: B023
            ada = site.programs["ada"]
            code = ada.stop() if end == "stop" else ada.kill()
            assert not code, ada.log
            site.start("ada")
        ended = site.ended_run(run)
        assert ended["state"] == "finished"
        resumed = [line for line in site.programs["ada"].log.splitlines() if "resumed from" in line]
        assert resumed, site.programs["ada"].log
        assert ended["history"][0]["digest"] == whole["history"][0]["digest"]


@pytest.mark.long
def test_a_trainer_that_fails_again_and_again_pauses_its_agent_alone(tmp_path: Path) -> None:
    with fleet(tmp_path, COMMONWEIGHT_AGENT_TRAINER_TRIES="2") as site:
        site.up()
        site.join("ada", "bob")
        site.start("ada", "bob")
        run = site.start_run("mnist", "--rounds", "2", "--quorum", "1", *SLOW)

        def given_up() -> bool:
            for process in trainers(site, "bob"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return bool(site.agent("bob")["state"] == "paused")

        wait_for(given_up, "bob gives up")
        site.until_agent(
            "bob", "says why", lambda told: told["reason"].startswith("trainer failed")
        )
        told = site.agent("bob")["reason"]
        peer = site.agent("bob")["peer"]
        wait_for(
            lambda: site.data("status")["peers"][peer]["reason"] == told,
            "the coordinator knows why",
            every_s=0.5,
        )
        ended = site.ended_run(run)
        assert ended["state"] == "finished"
        assert [len(closed["contributors"]) for closed in ended["history"]] == [1, 1]

        assert site.ask_agent("bob", "resume").returncode == 0
        site.until_agent("bob", "works again", lambda told: told["state"] == "idle")
        again = site.ended_run(site.start_run("mnist", "--rounds", "1", "--quorum", "2"))
        assert len(again["history"][0]["contributors"]) == 2


def test_an_idle_trainer_ends_and_is_back_with_the_next_work(tmp_path: Path) -> None:
    with fleet(tmp_path, COMMONWEIGHT_AGENT_IDLE_TIMEOUT_S="0.5") as site:
        site.up()
        site.join("ada")
        site.start("ada")
        for _ in range(2):
            run = site.start_run("ping", "--rounds", "1", "--quorum", "1")
            wait_for(lambda: trainers(site, "ada"), "the trainer is there")
            assert site.ended_run(run)["state"] == "finished"
            wait_for(lambda: not trainers(site, "ada"), "the idle trainer has ended")
