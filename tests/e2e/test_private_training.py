"""Noise for single rows on a whole fleet: sandboxed trainers, owners' budgets, a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocols.local import failpoints
from tests.support.fleet_harness import AGENT, fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

RUN = ("mnist", "--quorum", "2", "--rounds", "3", "--deadline", "2m")
NOISE = ("--dp", "3", "--set", "batch_size=all", "--set", "epochs=1")


def test_a_run_with_noise_is_charged_and_survives_a_kill_and_a_limit(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        site.join_parts({"north": "0/2", "south": "1/2"})
        site.start("south")
        # North is killed between the charge of its second update and the reply.
        env = {**site._env("north"), failpoints.VARIABLE: "agent.privacy.charged:2=kill"}
        site._start("north", [AGENT, "run"], env)
        site.until_agent("north", "is there", lambda status: status)
        run_id = site.start_run(*RUN, *NOISE)
        killed = site.programs["north"].process
        wait_for(lambda: killed.poll() is not None, "north is killed")
        site.start_agent("north")
        run = site.ended_run(run_id)
        assert (run["state"], len(run["history"])) == ("finished", 3)
        assert [closed["metrics"] for closed in run["history"]] == [{}, {}, {}]
        assert "each peer adds its own noise: ε 3" in site.ask("run", "show", run["id"]).stdout

        def spent(name: str) -> str:
            return site.ask_agent(name, "budget").stdout

        told = spent("north")
        assert f"training {run['id'][:24]}" in told
        assert "3 answers with noise, ε 3 alone" in told
        # A kill forgets nothing, and the limit counts what was spent before there was one.
        site.programs["north"].kill()
        assert spent("north") == told
        # A home that is copied back lacks the charges, and the coordinator returns their number.
        ledger = site.folder / "north" / "told" / "privacy.db"
        kept = ledger.read_bytes()
        ledger.unlink()
        site.start_agent("north")
        last = site.start_run(*RUN, *NOISE)
        ended = site.ended_run(last)
        assert "lacks 3 of its 3 entries" in str(ended)
        site.programs["north"].kill()
        assert "has stated 3 more entries" in spent("north")
        ledger.write_bytes(kept)
        assert "3 answers with noise" in spent("north")
        done = site.ask_agent("north", "policy", "set", "privacy.max_epsilon", "4")
        assert done.returncode == 0, done.stderr
        site.start_agent("north")
        done = site.ask("run", "start", *RUN, *NOISE, "--json")
        assert f"by run {last}, 2 peers have 2,000 rows" in done.stderr
        refused = json.loads(done.stdout)["data"]["run"]
        site.until_agent("north", "is there", lambda status: status)
        ended = site.ended_run(refused)
        assert "privacy_max_epsilon is 4" in str(ended)
        assert "3 answers with noise" in spent("north")
