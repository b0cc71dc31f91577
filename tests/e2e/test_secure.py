"""A secure run of a whole fleet: three agents that trust each other, and a curious coordinator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.faults import failpoint_names
from coordinator.storage import run_events
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.local import failpoints
from tests.support.fleet_harness import (
    AGENT,
    COORDINATOR,
    HOST,
    Fleet,
    Program,
    fleet,
    two_free_ports,
)
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

NAMES = ("north", "south", "west")
#: Where the tests kill the coordinator and an agent.
COORDINATOR_POINTS = failpoint_names.SECURE_SUMS
LOST_POINTS = failpoint_names.LOST_COHORTS
AGENT_POINTS = (*failpoint_names.SECURE, *failpoint_names.SECURE_FILES)
RUN = ("mnist", "--secure", "--quorum", "3", "--rounds", "2", "--deadline", "2m")


def trusting(site: Fleet, *names: str) -> dict[str, str]:
    """Join these machines, let their owners trust each other, and start them; ids by name."""
    site.join(*names)
    ids = {
        name: json.loads((site.folder / name / "enrolled.json").read_bytes())["peer"]
        for name in names
    }
    for name in names:
        for other in names:
            if other != name:
                done = site.ask_agent(name, "trust", "add", ids[other], "--name", other)
                assert done.returncode == 0, done.stderr
    site.start(*names)
    return ids


def test_a_secure_run_learns_and_no_update_or_metric_of_a_peer_is_seen(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        ids = trusting(site, *NAMES)
        run_id = site.start_run(*RUN)
        run = site.ended_run(run_id)
        assert run["state"] == "finished", run["ended_because"]
        accuracies = [closed["metrics"]["accuracy"] for closed in run["history"]]
        assert accuracies[1] > accuracies[0] > 0.2
        assert [closed["contributors"] for closed in run["history"]] == [sorted(ids.values())] * 2
        shown = site.ask("run", "show", run_id).stdout
        assert "secure: the coordinator sees only sums of 3 updates or more" in shown
        for fact in facts(site, run_id):
            if isinstance(fact, run_events.UpdateAccepted):
                assert (fact.update.metrics, fact.update.norm) == ({}, 0.0)


def facts(site: Fleet, run_id: str) -> list[run_events.RunEvent]:
    ledger = SqliteLedger(site.home / "ledger.db")
    found = [run_events.decode(entry.body) for entry in ledger.entries(run_id)]
    ledger.close()
    return found


def check_whole(site: Fleet, run_id: str, ids: dict[str, str], rounds: int) -> None:
    """The run has all its rounds, each with all peers, and repeated none."""
    run = site.ended_run(run_id)
    assert run["state"] == "finished", run["ended_because"]
    contributors = [closed["contributors"] for closed in run["history"]]
    assert contributors == [sorted(ids.values())] * rounds
    told = facts(site, run_id)
    bad = (run_events.CohortLost, run_events.UpdateRefused)
    assert [fact for fact in told if isinstance(fact, bad)] == []
    sums = [fact.kind for fact in told if isinstance(fact, run_events.CohortFixed)]
    assert sums.count("train") == rounds
    assert sums.count("evaluate") > 0


def coordinator_killed_at(site: Fleet, point: str, port: int) -> Program:
    """Kill the coordinator, and start one that dies at this point."""
    site.programs["up"].kill()
    (site.home / "up.json").unlink(missing_ok=True)
    env = {**site._env(), failpoints.VARIABLE: failpoint_names.check(point)}
    return site._start("up", [COORDINATOR, "up", "--host", HOST, "--port", str(port)], env)


def agent_killed_at(site: Fleet, name: str, point: str) -> Program:
    env = {**site._env(name), failpoints.VARIABLE: failpoint_names.check(point)}
    return site._start(name, [AGENT, "run"], env)


def until_dead(program: Program, point: str) -> None:
    wait_for(lambda: program.process.poll() is not None, f"it dies at {point}")


@pytest.mark.timeout(540)  # more than a dozen kills and restarts
def test_the_coordinator_is_killed_at_every_step_of_a_sum(tmp_path: Path) -> None:
    """Each start dies at the next step; no update is trained again, lost or counted twice."""
    port, rounds = two_free_ports()[0], 6
    with fleet(tmp_path) as site:
        site.up(port=port)
        ids = trusting(site, *NAMES)
        run_id = ""
        for point in COORDINATOR_POINTS:
            armed = coordinator_killed_at(site, point, port)
            if not run_id:
                wait_for((site.home / "up.json").exists, "the coordinator is up")
                words = ["ping", "--secure", "--quorum", "3", "--rounds", str(rounds)]
                run_id = site.start_run(*words)
            until_dead(armed, point)
        (site.home / "up.json").unlink(missing_ok=True)
        site.up(port=port)
        check_whole(site, run_id, ids, rounds)


@pytest.mark.timeout(540)  # each cohort is lost at a deadline
def test_the_coordinator_is_killed_when_it_gives_a_cohort_up(tmp_path: Path) -> None:
    """A peer dies before it masks. The round is trained again, with new keys, and counts once."""
    port = two_free_ports()[0]
    with fleet(tmp_path) as site:
        site.up(port=port)
        ids = trusting(site, *NAMES)
        run_id = ""
        for point in LOST_POINTS:
            armed = coordinator_killed_at(site, point, port)
            site.programs["north"].kill()
            gone = agent_killed_at(site, "north", "agent.secure.recording.mask")
            if not run_id:
                site.until_agent("north", "is there", lambda told: told["session"])
                words = ["ping", "--secure", "--quorum", "3", "--rounds", "2", "--deadline", "10s"]
                run_id = site.start_run(*words)
            until_dead(gone, "its masks")
            until_dead(armed, point)
        (site.home / "up.json").unlink(missing_ok=True)
        site.up(port=port)
        site.start_agent("north")
        run = site.ended_run(run_id)
        assert run["state"] == "finished", run["ended_because"]
        contributors = [closed["contributors"] for closed in run["history"]]
        assert contributors == [sorted(ids.values())] * 2
        told = facts(site, run_id)
        # The first kill is before the ledger has the loss.
        lost = [fact.because for fact in told if isinstance(fact, run_events.CohortLost)]
        assert len(lost) >= len(LOST_POINTS) - 1
        assert all("2 of 3 masked updates, and a sum needs 3" in because for because in lost)
        turns = [fact.turn for fact in told if isinstance(fact, run_events.CohortFixed)]
        assert turns == sorted(turns)


@pytest.mark.timeout(540)  # more than a dozen kills and restarts
def test_an_agent_is_killed_at_every_step_of_a_sum(tmp_path: Path) -> None:
    rounds = 10
    with fleet(tmp_path) as site:
        site.up()
        ids = trusting(site, *NAMES)
        run_id = ""
        for point in AGENT_POINTS:
            site.programs["north"].kill()
            armed = agent_killed_at(site, "north", point)
            if not run_id:
                site.until_agent("north", "is there", lambda told: told["session"])
                words = ["ping", "--secure", "--quorum", "3", "--rounds", str(rounds)]
                run_id = site.start_run(*words)
            until_dead(armed, point)
        site.start_agent("north")
        check_whole(site, run_id, ids, rounds)
