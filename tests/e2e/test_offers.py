"""A real fleet to which the operator delivers a task file: offered, approved, run, withdrawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fleet_harness import ROOT, Fleet, fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

TASK = "line.py:Line"


def waits_for(site: Fleet, run: str) -> str:
    return str(site.data("status")["runs"][run]["changed"]["waiting_for"])


def asked(site: Fleet, name: str, *words: str) -> str:
    """What a command on a machine printed."""
    done = site.ask_agent(name, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def started(site: Fleet) -> str:
    """The run; empty while the coordinator has not heard yet of any peer with the task."""
    done = site.ask("run", "start", TASK, "--rounds", "1", "--quorum", "1", "--json")
    told = json.loads(done.stdout)
    if done.returncode:
        assert told["error"]["code"] == "unknown_name", told
        return ""
    return str(told["data"]["run"])


def test_a_file_is_delivered_and_runs_once_its_owners_approve_it(tmp_path: Path) -> None:
    file = tmp_path / "line.py"
    file.write_bytes((ROOT / "docs" / "examples" / "line.py").read_bytes())
    points = tmp_path / "points.txt"
    points.write_text("".join(f"{x / 64} {x / 32 + 1}\n" for x in range(64)))
    with fleet(tmp_path) as site:
        site.up()
        for name in ("north", "south"):
            words = ("join", "-", "--name", name, "--data", str(points), "--allow", "*")
            done = site.ask_agent(name, *words, given=site.ticket())
            assert done.returncode == 0, done.stderr
        site.start("north", "south")

        offered = site.data("task", "offer", str(file), "--note", "a line")
        digest = offered["digest"]
        assert (offered["name"], offered["note"]) == (TASK, "a line")
        for name in ("north", "south"):
            text = f"the operator offers the task {TASK} ({digest[:12]})"
            wait_for(lambda name=name, text=text: text in site.programs[name].log, "it is offered")
            assert "awaiting approval" in asked(site, name, "task", "list")
            assert "awaiting approval" in asked(site, name, "status")
        review = asked(site, "north", "task", "review", digest[:12])
        assert f"sha256 {digest}" in review
        assert "+class Line:" in review
        assert ": a line" in review

        # Although both allow every task, nobody runs it; the run says what is missing.
        run = wait_for(lambda: started(site), "the coordinator knows that the peers have it")
        text = f"the consent of 2 peers to the task {TASK}"
        wait_for(lambda: text in waits_for(site, run), "the run says for whom it waits")
        assert f"task review {TASK}" in site.ask("run", "show", run).stdout
        wait_for(
            lambda: f"? awaiting review: {TASK}" in site.ask("peers", "list").stdout, "peers list"
        )

        without = site.ask_agent("north", "task", "approve", TASK)
        assert without.returncode == 2
        assert "nothing was approved" in without.stderr
        wrong = site.ask_agent("north", "task", "approve", TASK, "--sha256", "0" * 64)
        assert "has another hash" in wrong.stderr
        asked(site, "north", "task", "approve", TASK, "--sha256", digest)
        ended = site.ended_run(run)
        assert ended["state"] == "finished"
        assert len(ended["history"][-1]["contributors"]) == 1, "the other peer is skipped"

        # Another version: the approved one stops, also after a restart.
        site.programs["north"].stop()
        file.write_bytes(file.read_bytes() + b"# another version\n")
        second = site.data("task", "offer", str(file))["digest"]
        site.start("north")
        wait_for(
            lambda: "+# another version" in asked(site, "north", "task", "review", TASK), "diff"
        )
        run = site.start_run(TASK, "--rounds", "1", "--quorum", "2")
        text = f"the consent of 2 peers to the task {TASK}"
        wait_for(lambda: text in waits_for(site, run), "the run says for whom it waits")
        for name in ("north", "south"):
            asked(site, name, "task", "approve", second[:12], "--sha256", second)
        assert site.ended_run(run)["state"] == "finished"

        # Withdrawn: one owner keeps it, the other does not.
        assert site.ask("task", "withdraw", TASK).returncode == 0
        assert site.data("task", "list") == []
        for name in ("north", "south"):
            log = site.programs[name]
            wait_for(lambda log=log: "has withdrawn the task" in log.log, "the agents know")
        asked(site, "north", "task", "allow", TASK, "--keep")
        run = site.start_run(TASK, "--rounds", "1", "--quorum", "1")
        ended = site.ended_run(run)
        assert (ended["state"], len(ended["history"][-1]["contributors"])) == ("finished", 1)
        assert f"task allow {TASK} --keep" in site.ask("run", "show", run).stdout
        asked(site, "south", "task", "remove", TASK)

        ledger = json.loads(site.ask_agent("north", "ledger", "--json").stdout)["data"]
        assert [one["what"] for one in ledger if one["what"].startswith("task ")] == [
            *("task offered", "task approved", "task withdrawn", "task offered", "task approved"),
            *("task withdrawn", "task kept"),
        ]
        audit = site.ask("admin", "audit").stdout
        assert f"offered {TASK}, sha256 {digest}" in audit
        assert f"withdrew {TASK}, sha256 {second}" in audit
