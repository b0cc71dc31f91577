"""A run that has ended does not affect the next one, whatever its peers still do for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.fleet_harness import Fleet, fleet, two_free_ports
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long


def leftovers(site: Fleet) -> list[str]:
    folders = (site.home / "spool", site.home / "jobs" / "spool")
    return [path.name for folder in folders for path in folder.rglob("*")]


def test_a_stopped_run_does_not_block_the_next_one(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        port, _ = two_free_ports()
        site.up(port=port)
        site.join("ada", "bob")
        site.start("ada", "bob")
        for _ in range(2):
            stopped = site.start_run(
                "mnist", "--mode", "buffered", "--buffer", "2", "--rounds", "9999"
            )
            wait_for(
                lambda r=stopped: site.run(r)["round"] >= 3, "it trains", within_s=60.0, every_s=0.3
            )  # type: ignore[misc]
            assert site.ask("run", "stop", stopped).returncode == 0
            run = site.ended_run(site.start_run("mnist", "--rounds", "2", "--quorum", "2"))
            assert run["state"] == "finished"
            assert run["refusals"] == 0
            wait_for(lambda: not leftovers(site), "the uploads of ended runs are deleted")
        assert site.ended_run(stopped)["state"] == "stopped"
        # A stopped run continues, with another codec's run in between.
        codec = site.ended_run(site.start_run("mnist", "--rounds", "2", "--codec", "int8"))
        assert (codec["state"], codec["refusals"]) == ("finished", 0)
        assert site.ask("run", "resume", stopped).returncode == 0
        before = site.run(stopped)["round"]
        wait_for(
            lambda: site.run(stopped)["round"] >= before + 2,
            "it continues",
            within_s=60.0,
            every_s=0.3,
        )
        site.programs["up"].kill()
        (site.home / "up.json").unlink()
        site.up(port=port)
        wait_for(
            lambda: site.run(stopped)["round"] >= before + 4,
            "it continues",
            within_s=60.0,
            every_s=0.3,
        )
        assert site.ask("run", "stop", stopped).returncode == 0
        wait_for(lambda: not leftovers(site), "the uploads of ended runs are deleted")
        for name in ("ada", "bob"):
            # Not "413" alone: a line of the log may have been written at such a millisecond.
            assert not re.search("(HTTP|answered) 413|refused", site.programs[name].log)
            assert "refuse" not in site.programs[name].log
            assert "Traceback" not in site.programs[name].log
