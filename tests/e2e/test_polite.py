"""A real fleet whose agents feel a battery and other programs: folders for /sys, real busy loops.

No time is asserted: what counts is that the pause comes, why, and that nothing is lost by it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fleet_harness import fleet
from tests.support.laptop import heeding, on_mains
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

LONG = ("mnist", "--rounds", "2", "--quorum", "1", "--set", "epochs=150")


def test_on_battery_it_stands_still_says_so_and_loses_nothing(tmp_path: Path) -> None:
    sysfs = tmp_path / "sys"
    on_mains(sysfs, True)
    with fleet(tmp_path, **heeding("battery", sysfs=str(sysfs))) as site:
        site.up()
        site.join("ada")
        site.start("ada")
        run = site.start_run(*LONG)
        site.until_agent("ada", "trains", lambda told: told["state"] == "training")
        on_mains(sysfs, False)
        site.until_agent("ada", "is paused", lambda told: told["reason"] == "on battery")
        shown = site.ask_agent("ada", "status").stdout
        assert "paused: on battery" in shown
        assert "commonweight-agent policy set battery always" in shown
        wait_for(lambda: "paused: on battery" in site.ask("status").stdout, "the operator sees it")
        assert site.run(run)["history"] == []

        # The owner lets it work all the same, for a while, without a new start.
        for_a_while = ("policy", "set", "battery", "always", "--for", "1h")
        assert site.ask_agent("ada", *for_a_while).returncode == 0
        site.until_agent("ada", "works", lambda told: told["state"] != "paused")
        ended = site.ended_run(run)
        assert ended["state"] == "finished"
        assert len(ended["history"]) == 2
        journal = (tmp_path / "ada" / "agent.log").read_text()
        assert "policy: paused: on battery" in journal


def test_a_round_goes_on_without_a_peer_whose_machine_is_busy(tmp_path: Path) -> None:
    with fleet(tmp_path, **heeding("busy", nice="10")) as site:
        site.up()
        site.join("ada", "bob")
        assert site.ask_agent("ada", "policy", "set", "busy", "always").returncode == 0
        # A share of all cores that this test's own loops surely go beyond.
        assert site.ask_agent("bob", "policy", "set", "busy_percent", "5").returncode == 0
        loops: list[subprocess.Popen[bytes]] = []
        try:
            loops += [
                subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in range(max(1, (os.cpu_count() or 1) // 2))
            ]
            site.start("ada", "bob")
            why = "other programs use more than 5 % of the CPU"
            site.until_agent("bob", "is paused", lambda told: told["reason"] == why)
            wait_for(
                lambda: why in [peer["reason"] for peer in site.data("status")["peers"].values()],
                "the operator sees it",
            )
            ended = site.ended_run(site.start_run("mnist", "--rounds", "1", "--quorum", "1"))
            assert ended["state"] == "finished"
            names = {peer["peer"]: peer["name"] for peer in site.data("peers", "list")}
            assert [names[p] for p in ended["history"][0]["contributors"]] == ["ada"]
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
