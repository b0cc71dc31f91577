"""A secure run of a whole fleet: three agents that trust each other, and a curious coordinator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fleet_harness import Fleet, fleet

pytestmark = pytest.mark.long

NAMES = ("north", "south", "west")
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
        print(json.dumps(run["history"], indent=1)[:3000])
        accuracies = [closed["metrics"]["accuracy"] for closed in run["history"]]
        assert accuracies[1] > accuracies[0] > 0.2
        assert [closed["contributors"] for closed in run["history"]] == [sorted(ids.values())] * 2
        shown = site.ask("run", "show", run_id).stdout
        assert "secure: the coordinator sees only sums of 3 updates or more" in shown
