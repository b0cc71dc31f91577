"""Whatever dies and comes back, the run goes on to its end: agent, broker, coordinator."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from agent.home.enrollment_file import read_enrollment
from tests.support.fleet_harness import HOST, Fleet, alive, descendants, fleet, two_free_ports
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

#: Seconds of work a round on one core, and the same in every test run.
SLOW = ["--set", "epochs=30", "--seed", "7"]

#: What an agent says of itself while it trains in the first round.
FIRST = ("training", 1)


def rounds_of(run: dict[str, object]) -> list[int]:
    history = run["history"]
    assert isinstance(history, list)
    return [closed["round"] for closed in history]


def the_broker(site: Fleet) -> psutil.Process:
    """The process of the embedded broker."""
    return next(
        child
        for child in descendants(site.programs["up"].process.pid)
        if child.cmdline()[-1].endswith("gate.json")
    )


def test_an_agent_killed_in_a_round_comes_back_as_the_same_peer(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        site.join("ada", "bob")
        site.start("ada", "bob")
        peer = site.agent("ada")["peer"]
        run = site.start_run("mnist", "--rounds", "2", "--quorum", "2", *SLOW)
        site.until_agent("ada", "trains", lambda told: (told["state"], told["round"]) == FIRST)
        trainers = descendants(site.programs["ada"].process.pid)
        site.programs["ada"].kill()
        assert trainers, "the trainer is a process of its own"
        psutil.wait_procs(trainers, timeout=20)
        assert alive(trainers) == []

        site.start("ada")
        assert site.agent("ada")["peer"] == peer
        ended = site.ended_run(run)
        assert ended["state"] == "finished"
        assert rounds_of(ended) == [1, 2]
        assert all(peer in closed["contributors"] for closed in ended["history"])
        assert "ada disconnected during its work" in site.events()


def test_a_killed_broker_stops_no_run_and_the_monitor_hears_of_it(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        site.join("ada", "bob")
        site.start("ada", "bob")
        words = ("run", "start", "ping", "--rounds", "40", "--quorum", "2", "--follow")
        following = site.background("follow", *words)
        wait_for(lambda: "round 2/" in following.log, "the second round")
        first = the_broker(site)
        first.kill()
        wait_for(lambda: "round 40/" in following.log, "the last round")
        assert following.wait() == 0

        wait_for(lambda: the_broker(site).pid != first.pid, "another broker")
        for name in ("ada", "bob"):
            site.until_agent(name, "is back on MQTT", lambda told: told["mqtt"])
        wait_for(lambda: site.data("status")["links"]["mqtt"], "the coordinator is back on MQTT")
        up, *down, up_again = [text for text in site.events() if "MQTT broker" in text]
        assert up == up_again == "the MQTT broker is up"
        assert {text.startswith("no MQTT broker: ") for text in down} == {True}
        assert {text.endswith("training continues") for text in down} == {True}


def test_a_coordinator_stopped_in_a_run_goes_on_with_it(tmp_path: Path) -> None:
    port, mqtt_port = two_free_ports()
    with fleet(tmp_path) as site:
        options = ("--mqtt-port", str(mqtt_port))
        site.up(*options, port=port)
        site.join("ada", "bob")
        site.start("ada", "bob")
        run = site.start_run("mnist", "--rounds", "3", "--quorum", "2", *SLOW)
        for name in ("ada", "bob"):
            site.until_agent(name, "trains", lambda told: told["state"] == "training")
        assert site.programs["up"].stop() == 0
        assert site.ask("status").returncode == 5
        site.until_agent("ada", "notices", lambda told: not told["session"])

        site.up(*options, port=port)
        for name in ("ada", "bob"):
            site.until_agent(name, "is back", lambda told: told["session"] and told["mqtt"])
        ended = site.ended_run(run)
        assert ended["state"] == "finished"
        assert rounds_of(ended) == [1, 2, 3]
        assert all(len(closed["contributors"]) == 2 for closed in ended["history"])
        # The same weights as if nothing had happened: no round was lost and none done twice.
        again = site.ended_run(site.start_run("mnist", "--rounds", "3", "--quorum", "2", *SLOW))
        digests = [closed["digest"] for closed in ended["history"]]
        assert [closed["digest"] for closed in again["history"]] == digests


def test_agents_find_a_coordinator_that_has_moved_as_it_told_before(tmp_path: Path) -> None:
    old, new = two_free_ports()
    told = tmp_path / "coordinator" / "settings.toml"
    with fleet(tmp_path) as site:
        site.up(port=old)
        site.join("ada", "bob")
        site.start("ada", "bob")
        site.programs["up"].stop()
        told.write_text(f'public_addresses = ["{HOST}:{new}"]\n')
        site.up(port=old)
        for name in ("ada", "bob"):
            file = tmp_path / name / "enrolled.json"
            wait_for(
                lambda file=file: f"{HOST}:{new}" in read_enrollment(file.parent).addresses[1:],
                f"{name} knows the next address",
            )
        run = site.start_run("mnist", "--rounds", "2", "--quorum", "2", *SLOW)
        site.until_agent("ada", "trains", lambda told: (told["state"], told["round"]) == FIRST)
        assert site.programs["up"].stop() == 0
        (site.home / "up.json").unlink(missing_ok=True)
        site.up(port=new)
        assert rounds_of(site.ended_run(run)) == [1, 2]
        for name in ("ada", "bob"):
            site.until_agent(name, "has both its links", lambda told: told["mqtt"])
            assert read_enrollment(tmp_path / name).addresses[0] == f"{HOST}:{new}"
