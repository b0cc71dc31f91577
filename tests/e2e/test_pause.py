"""A peer that was paused from afar takes no part until it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet_harness import Fleet, fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

#: What an agent says of itself while it trains in the first round.
FIRST = ("training", 1)


def who_took_part(site: Fleet, run: dict[str, Any]) -> list[list[str]]:
    """The names of each round's contributors."""
    names = {peer["peer"]: peer["name"] for peer in site.data("peers", "list")}
    return [sorted(names[peer] for peer in closed["contributors"]) for closed in run["history"]]


def test_rounds_go_on_without_a_paused_peer_and_with_it_again(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        site.join("ada", "bob")
        site.start("ada", "bob")
        run = ("ping", "--rounds", "3", "--quorum", "1")

        assert site.ask("peers", "pause", "bob").returncode == 0
        site.until_agent("bob", "is paused", lambda told: told["state"] == "paused")
        assert site.agent("bob")["reason"] == "by the operator"
        wait_for(lambda: "paused: by the operator" in site.ask("status").stdout, "it is shown")
        alone = site.ended_run(site.start_run(*run))
        assert who_took_part(site, alone) == [["ada"]] * 3

        assert site.ask("peers", "resume", "bob").returncode == 0
        site.until_agent("bob", "is back", lambda told: told["state"] == "idle")
        together = site.ended_run(site.start_run(*run, "--quorum", "2"))
        assert who_took_part(site, together) == [["ada", "bob"]] * 3


def test_a_peer_paused_by_its_owner_in_its_work_ends_it_after_resume(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        site.join("ada")
        site.start("ada")
        run = site.start_run("mnist", "--rounds", "1", "--set", "epochs=20")
        site.until_agent("ada", "trains", lambda told: told["state"] == "training")
        assert site.ask_agent("ada", "pause").returncode == 0
        site.until_agent("ada", "is paused", lambda told: told["state"] == "paused")
        assert "paused: by its owner" in site.ask_agent("ada", "status").stdout
        assert site.run(run)["history"] == []

        # A restart keeps the pause and the work, and reads settings that need one.
        assert site.ask_agent("ada", "policy", "set", "nice", "7").returncode == 0
        since = site.agent("ada")["since"]
        restarted = site.ask_agent("ada", "restart")
        assert (restarted.returncode, restarted.stderr) == (0, "restarted\n")
        assert site.agent("ada")["since"] > since
        site.until_agent("ada", "is paused again", lambda told: told["state"] == "paused")

        assert site.ask_agent("ada", "resume").returncode == 0
        assert site.ended_run(run)["state"] == "finished"


def test_finish_ends_the_round_and_then_the_agent(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        site.join("ada", "bob")
        site.start("ada", "bob")
        words = ("--rounds", "2", "--quorum", "1", "--set", "epochs=40")
        run = site.start_run("mnist", *words)
        site.until_agent("bob", "trains", lambda told: (told["state"], told["round"]) == FIRST)
        assert site.ask_agent("bob", "finish").returncode == 0
        assert site.programs["bob"].wait(60) == 0
        assert site.ask_agent("bob", "status").returncode == 5
        ended = site.ended_run(run)
        assert ended["state"] == "finished"
        assert who_took_part(site, ended) == [["ada", "bob"], ["ada"]]
