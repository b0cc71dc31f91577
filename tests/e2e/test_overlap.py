"""A run that trains while it exchanges fragments: kills change no byte of its versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fleet_harness import fleet, two_free_ports

pytestmark = pytest.mark.long

ROUNDS = 4
RUN = (
    *("mnist", "--rounds", str(ROUNDS), "--quorum", "2", "--seed", "7"),
    *("--overlap", "1", "--fragments", "2", "--codec", "int8", "--strategy", "diloco"),
    *("--set", "epochs=6", "--set", "optimiser=adamw", "--set", "lr=0.001"),
)


def test_killed_agent_and_coordinator_give_the_same_versions(tmp_path: Path) -> None:
    port, mqtt_port = two_free_ports()
    with fleet(tmp_path) as site:
        options = ("--mqtt-port", str(mqtt_port))
        site.up(*options, port=port)
        site.join("ada", "bob")
        site.start("ada", "bob")
        run = site.start_run(*RUN)
        for name in ("ada", "bob"):
            site.until_agent(
                name, "trains", lambda told: told["state"] == "training" and told["round"] >= 2
            )
        site.programs["ada"].kill()
        site.start("ada")
        site.programs["up"].kill()
        (site.home / "up.json").unlink()
        site.up(*options, port=port)
        ended = site.ended_run(run)
        assert ended["state"] == "finished"
        assert all(len(closed["contributors"]) == 2 for closed in ended["history"])
        again = site.ended_run(site.start_run(*RUN))
        digests = [closed["digest"] for closed in ended["history"]]
        assert [closed["digest"] for closed in again["history"]] == digests
        assert len(set(digests)) == ROUNDS
