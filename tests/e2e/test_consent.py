"""A fleet in which owners have not decided yet: a run waits for them, and goes on by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.home import audit_log, refusal_log
from tests.support.fleet_harness import Fleet, fleet
from tests.support.tables import MIXED, write_csv
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

TRAINING = ("tabular", "--target", "label", "--rounds", "1", "--set", "model=linear")


def join(site: Fleet, name: str, *options: str) -> str:
    """Join a machine with a table; returns what the command said."""
    rows = MIXED[:90] if name == "north" else MIXED[90:]
    table = write_csv(site.folder / f"{name}.csv", rows)
    words = ("join", "-", "--name", name, "--data", str(table), *options)
    done = site.ask_agent(name, *words, given=site.ticket())
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def peers(site: Fleet) -> dict[str, tuple[str, str]]:
    return {p["name"]: (p["state"], p["reason"]) for p in site.data("peers", "list")}


def waits_for(site: Fleet, run: str) -> str:
    return str(site.data("status")["runs"][run]["changed"]["waiting_for"])


@pytest.mark.attack("20.consent", by="coordinator")
def test_a_run_waits_for_consent_and_goes_on_when_it_is_given(tmp_path: Path) -> None:
    """Attack: train, describe and evaluate on a machine whose owner has allowed nothing."""
    with fleet(tmp_path) as site:
        site.up()
        said = join(site, "north", "--allow", "tabular", "--purpose", "a study", "--columns", "all")
        assert "allowed: tabular, all columns, for: a study" in said
        assert "commonweight-agent policy set share off" in said, "how the port is closed"
        assert "no task is allowed yet" in join(site, "south")
        site.start("north", "south")

        # With a quorum of one the run goes on with the owner who consented.
        ended = site.ended_run(site.start_run(*TRAINING, "--quorum", "1"))
        assert (ended["state"], len(ended["history"][-1]["contributors"])) == ("finished", 1)

        run = site.start_run(*TRAINING, "--quorum", "2")
        text = "the consent of 1 peer to the task tabular (south)"
        wait_for(lambda: waits_for(site, run) == text, "the run says for whom it waits")
        wait_for(lambda: peers(site)["south"] == ("awaiting", "consent: tabular"), "peers list")
        assert "? awaiting consent: tabular" in site.ask("peers", "list").stdout
        assert "? awaiting consent" in site.ask("monitor", "--once").stdout
        assert f"waits for {text}" in site.ask("run", "show", run).stdout

        allow = "commonweight-agent task allow tabular"
        asks = f"run {run} asks for the task 'tabular' to predict label, from all columns that you"
        status = site.ask_agent("south", "status").stdout
        assert f"? awaiting consent: {asks} allow; to allow it: {allow}" in status
        assert site.programs["south"].log.count(f"awaiting consent: {asks}") == 1
        assert f"? awaiting consent: {asks}" in site.ask_agent("south", "task", "list").stdout
        assert [entry.what for entry in refusal_log.read(tmp_path / "south")] == ["refused"] * 2
        assert audit_log.read(tmp_path / "south") == [], "nothing has left the machine"

        # Consent without columns is not enough: the run says what else it waits for.
        assert site.ask_agent("south", "task", "allow", "tabular").returncode == 0
        text = "the columns of 1 peer for the task tabular (south)"
        wait_for(lambda: waits_for(site, run) == text, "the run says for whom it waits")
        wait_for(lambda: peers(site)["south"] == ("awaiting", "columns: tabular"), "peers list")
        assert "? awaiting columns" in site.ask("monitor", "--once").stdout
        assert f"waits for {text}" in site.ask("run", "show", run).stdout
        name_them = f"{allow} --columns NAME,NAME (or all)"
        status = site.ask_agent("south", "status").stdout
        assert f"? awaiting columns: run {run} asks for the task 'tabular'" in status
        assert f"to name them: {name_them}" in status
        assert audit_log.read(tmp_path / "south") == [], "nothing has left the machine"

        done = site.ask_agent("south", "task", "allow", "tabular", "--columns", "all")
        assert "the running agent takes part within seconds" in done.stdout + done.stderr
        ended = site.ended_run(run)
        assert (ended["state"], len(ended["history"][-1]["contributors"])) == ("finished", 2)
        wait_for(lambda: peers(site)["south"][0] == "idle", "nobody awaits anything")
        assert "awaiting" not in site.ask_agent("south", "status").stdout

        # An owner who says no is not waited for.
        assert site.ask_agent("south", "task", "forbid", "tabular").returncode == 0
        assert site.ask_agent("north", "task", "forbid", "tabular").returncode == 0
        run = site.start_run("mnist", "--rounds", "1", "--quorum", "1")
        site.ask("run", "stop", run)
        refused = site.ask("run", "start", *TRAINING, "--quorum", "1")
        assert "no peer can run the task 'tabular'" in refused.stderr


def test_a_running_agent_takes_other_data_and_tasks_without_a_restart(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        join(site, "north", "--allow", "tabular", "--columns", "all")
        site.start("north")
        process = site.programs["north"].process.pid

        def change(key: str, value: str) -> None:
            done = site.ask_agent("north", "policy", "set", key, value)
            assert done.returncode == 0, done.stderr

        def rows() -> int:
            """The rows of the table that the newest run was told about."""
            left = json.loads(site.ask_agent("north", "ledger", "--json").stdout)["data"]
            told = [json.loads(one["told"]) for one in left if one["what"] == "description"]
            return int([one["rows"] for one in told if "rows" in one][-1])

        assert site.ended_run(site.start_run(*TRAINING))["state"] == "finished"
        assert rows() == 90
        change("data", str(write_csv(tmp_path / "south.csv", MIXED[90:])))
        again = "restarting with the changed settings"
        wait_for(lambda: again in site.programs["north"].log, "it takes the new data")
        assert site.ended_run(site.start_run(*TRAINING))["state"] == "finished"
        assert rows() == len(MIXED) - 90

        change("tasks", "ping")
        run = site.start_run(*TRAINING)
        text = "the consent of 1 peer to the task tabular (north)"
        wait_for(lambda: waits_for(site, run) == text, "the run says for whom it waits")
        change("tasks", "ping,tabular")
        assert site.ended_run(run)["state"] == "finished"
        site.until_agent("north", "is the same process", lambda told: told["pid"] == process)
