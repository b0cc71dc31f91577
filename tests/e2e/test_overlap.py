"""A run that trains while it exchanges fragments: kills change no byte of its versions. And what
ends that training: a run that is stopped, its owner's pause, and the end of the agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults.paced import fleet as paced_fleet
from benchmarks.faults.paced import paced
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


#: The first peer trains a step in round 1 and five minutes in round 2, the other one in round 1.
UNEVEN = """

class Paced(Paced):
    def train(self, weights, settings, on_step):
        is_short = (self.seed, settings["round"]) == (0, 1)
        return super().train(weights, {**settings, "max_steps": 1 if is_short else 3000}, on_step)
"""


def test_training_ahead_obeys_a_stopped_run_a_pause_and_the_end_of_the_agent(
    tmp_path: Path,
) -> None:
    names = ("ada", "bob")
    with paced_fleet(tmp_path, names, (), paced(5000, 0.1) + UNEVEN) as (site, _):

        def begin() -> str:
            run = site.start_run(site.paced, "--quorum", "2", "--rounds", "3", "--overlap", "1")
            site.until_agent("ada", "trains ahead", lambda told: told["round"] == 2)
            site.until_agent("bob", "trains", lambda told: told["state"] == "training")
            return run

        run = begin()
        assert site.run(run)["round"] == 1
        assert site.ask_agent("ada", "pause").returncode == 0
        site.until_agent("ada", "is paused", lambda told: told["state"] == "paused")
        assert site.ask_agent("ada", "resume").returncode == 0
        site.until_agent("ada", "trains again", lambda told: told["state"] == "training")
        assert site.ask("run", "stop", run).returncode == 0
        for name in names:  # long before the five minutes are over
            site.until_agent(name, "is idle", lambda told: told["state"] == "idle")
            log = site.folder / name / "trainer" / "trainer.log"
            assert not [line for line in log.read_text().splitlines() if line.endswith(" 3000")]
        run = begin()
        assert site.programs["ada"].stop() == 0
        assert site.ask("run", "stop", run).returncode == 0
