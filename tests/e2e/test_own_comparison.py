"""After a run each owner sees, on rows held out at home, whether taking part was worth it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from tests.support.fleet_harness import ALLOW, Fleet, fleet
from tests.support.tables import patients
from tests.support.waiting import wait_for

SIZES = {"bern": 600, "basel": 400, "uri": 60}
RUN = ("--target", "ill", "--rounds", "6", "--quorum", "3", "--set", "model=linear")


def joined(site: Fleet, folder: Path) -> None:
    for seed, (name, rows) in enumerate(SIZES.items()):
        table = patients(folder / f"{name}.csv", rows, seed)
        words = ("join", "-", "--name", name, "--data", str(table), *ALLOW)
        done = site.ask_agent(name, *words, given=site.ticket())
        assert done.returncode == 0, done.stderr


def test_a_peer_with_few_rows_sees_that_it_gains(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        assert site.ask("init").returncode == 0
        site.up()
        joined(site, tmp_path)
        site.start(*SIZES)
        run = site.ended_run(site.start_run("tabular", *RUN))
        assert run["state"] == "finished", run["ended_because"]
        seen = {}

        def all_know() -> bool:
            for name in SIZES:
                done = site.ask_agent(name, "status")
                if "held-out rows of yours" in done.stdout:
                    seen[name] = done.stdout
            return len(seen) == len(SIZES)

        wait_for(all_know, "each owner sees the comparison")
        assert f"run {run['id']} on 12 held-out rows of yours" in seen["uri"]
        assert "→ shared" in seen["uri"] or "→ personal" in seen["uri"]
