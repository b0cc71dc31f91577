"""Owners who trust each other, and their agents in a secure run: what they type and read."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import failpoint_names
from protocols.local.failpoints import VARIABLE
from tests.support.fleet_harness import AGENT, Fleet, Program, fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

NAMES = ("ada", "bob", "cleo")


def own_id(site: Fleet, name: str) -> str:
    done = site.ask_agent(name, "status", "id", "--json")
    return str(json.loads(done.stdout)["data"]["peer"])


def ledger(site: Fleet, name: str, run: str) -> list[dict[str, Any]]:
    done = site.ask_agent(name, "ledger", "-n", "500", "--json")
    return [entry for entry in json.loads(done.stdout)["data"] if entry["run"] == run]


def test_a_secure_run_waits_for_trust_and_leaves_no_single_update(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        site.join(*NAMES)
        ids = {name: own_id(site, name) for name in NAMES}

        def trust(owner: str, other: str) -> None:
            done = site.ask_agent(owner, "trust", "add", ids[other], "--name", other)
            assert done.returncode == 0, done.stderr

        for owner in ("ada", "bob"):
            for other in NAMES:
                if other != owner:
                    trust(owner, other)
        trust("cleo", "ada")
        assert site.ask_agent("ada", "policy", "set", "secure_min", "3").returncode == 0
        site.start(*NAMES)

        plain = site.start_run("mnist", "--rounds", "1", "--quorum", "3")
        wait_for(
            lambda: "takes part in secure runs alone" in site.ask("run", "show", plain).stdout,
            "the plain run says that ada takes part in secure runs alone",
        )
        assert site.ask("run", "stop", plain).returncode == 0
        left = [entry["what"] for entry in ledger(site, "ada", plain)]
        assert left == ["refused"], "nothing has left ada for a plain run"

        run = site.start_run("mnist", "--secure", "--rounds", "2", "--quorum", "3")
        wait_for(
            lambda: "a sum needs 1 more" in site.agent("cleo").get("last_error", ""),
            "cleo's owner reads what is missing",
        )
        assert site.run(run)["round"] == 0
        trust("cleo", "bob")
        ended = site.ended_run(run)
        assert (ended["state"], len(ended["history"])) == ("finished", 2)
        accuracies = [closed["metrics"]["accuracy"] for closed in ended["history"]]
        assert accuracies[-1] > accuracies[0] > 0.5

        told = [entry["what"] for entry in ledger(site, "ada", run)]
        steps = ["card", "sealed shares", "masked update", "signature for a sum", "shares of masks"]
        assert told[told.index("card") :] == 4 * steps, "two rounds, with an evaluation each"
        assert "trusts 2 peers in secure sums: bob, cleo" in site.ask_agent("ada", "status").stdout


def start_killed_at(site: Fleet, name: str, point: str) -> Program:
    """Start an agent that ends like at a power cut when it reaches this point."""
    env = site._env(name) | {VARIABLE: failpoint_names.check(point)}
    site.programs[name] = Program([AGENT, "run"], env, site.folder / f"{name}.log")
    return site.programs[name]


def test_a_killed_and_a_paused_agent_finish_the_sum_that_they_began(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        site.join(*NAMES)
        ids = {name: own_id(site, name) for name in NAMES}
        for owner in NAMES:
            chosen = "\n".join(f'{ids[other]} = "{other}"' for other in NAMES if other != owner)
            with (site.folder / owner / "settings.toml").open("a") as file:
                file.write(f"[trust]\n{chosen}\n")
        killed = start_killed_at(site, "bob", "agent.secure.recorded.mask")
        site.start("ada", "cleo")
        run = site.start_run("ping", "--secure", "--rounds", "3", "--quorum", "3")
        assert killed.wait() == -signal.SIGKILL
        site.start_agent("bob")
        wait_for(
            lambda: any(entry["what"] == "card" for entry in ledger(site, "ada", run)[6:]),
            "a later round has begun",
        )
        assert site.ask_agent("ada", "pause").returncode == 0
        site.until_agent("ada", "is paused", lambda told: told["state"] == "paused")
        assert site.ask_agent("ada", "resume").returncode == 0
        ended = site.ended_run(run)
        assert (ended["state"], len(ended["history"])) == ("finished", 3)
        for name in NAMES:
            told = ledger(site, name, run)
            cards = [entry["digest"] for entry in told if entry["what"] == "card"]
            # Three rounds have two sums each; an evaluation that meets ada's pause is left out.
            assert len(cards) >= 5
            assert cards == list(dict.fromkeys(cards)) or name == "bob"
            masked = {entry["digest"] for entry in told if entry["what"] == "masked update"}
            assert len(masked) <= len(set(cards)), "a card is for one masked update"
