"""A fleet whose Mosquitto is lost and comes back, set up as docs/operations.md says.

All tests have one fleet, and leave it connected.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.support.fleet_harness import HOST, Fleet, fleet, two_free_ports
from tests.support.mosquitto import Mosquitto, mosquitto, needs_mosquitto
from tests.support.waiting import wait_for

pytestmark = needs_mosquitto

DEPLOY = Path(__file__).parents[3] / "deploy"
PEERS = ("ada", "bob")


class Site(NamedTuple):
    """The fleet and its broker, which listens at `place`."""

    fleet: Fleet
    broker: Mosquitto
    place: str

    @property
    def links(self) -> dict[str, Any]:
        found: dict[str, Any] = self.fleet.data("status")["links"]
        return found

    def shown(self) -> set[tuple[str, str, str]]:
        peers = self.fleet.data("status")["peers"].values()
        return {(peer["name"], peer["state"], peer["reason"]) for peer in peers}

    def until_told(self, why: str) -> None:
        """Wait until operator and owners can read that the broker is away, and why."""
        for name in PEERS:
            self.fleet.until_agent(name, f"says {why!r}", lambda told: why in told["mqtt_why"])
            said = self.fleet.ask_agent(name, "status").stdout
            assert "mqtt ○" in said
            assert why in said
        wait_for(lambda: why in self.links["why"], f"the coordinator tells {why!r}")
        assert not self.links["mqtt"]
        assert why in " ".join(self.fleet.ask("status").stdout.split())
        checks = json.loads(self.fleet.ask("doctor", "--json").stdout)["data"]["checks"]
        (check,) = (one for one in checks if one["name"] == "broker")
        assert "mosquitto -c" in check["fix"]
        assert f"no MQTT broker: {why}; training continues" in self.fleet.events()
        refused = self.fleet.ask("peers", "pause", "ada")
        assert refused.returncode != 0
        assert "MQTT broker" in refused.stderr

    def until_back(self) -> None:
        """Wait until presence, commands and doorbells work, and nothing says otherwise."""
        for name in PEERS:
            self.fleet.until_agent(name, "is back on MQTT", lambda told: told["mqtt"])
            assert not self.fleet.agent(name)["mqtt_why"]
        wait_for(lambda: self.links["mqtt"], "the coordinator is back on MQTT")
        self.until_shown(ada="idle", bob="idle")
        links = self.links
        assert (links["mqtt"], links["why"], links["rejected"]) == (True, "", 0)
        assert "MQTT" not in self.fleet.ask("status").stdout
        for action, state in (("pause", "paused"), ("resume", "idle")):
            done = self.fleet.ask("peers", action, "ada")
            assert done.returncode == 0, done.stderr
            self.until_shown(ada=state, bob="idle")
        self.finishes_a_run()

    def until_shown(self, **states: str) -> None:
        def agree() -> bool:
            told = {(name, state) for name, state, why in self.shown() if "MQTT" not in why}
            return told == set(states.items())

        wait_for(agree, f"the peers are {states}", every_s=0.3)

    def finishes_a_run(self) -> None:
        """A run in which every peer takes part in every round."""
        run = self.fleet.start_run("ping", "--rounds", "3", "--quorum", str(len(PEERS)))
        ended = self.fleet.ended_run(run)
        assert ended["state"] == "finished"
        assert [len(one["contributors"]) for one in ended["history"]] == [len(PEERS)] * 3


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A coordinator, Mosquitto and two agents, all connected."""
    folder = tmp_path_factory.mktemp("mosquitto")
    port, mqtt_port = two_free_ports()
    settings = {"COMMONWEIGHT_HOST": HOST, "COMMONWEIGHT_MQTT_PORT": str(mqtt_port)}
    with fleet(folder, **settings) as made:
        assert made.ask("init").returncode == 0
        done = made.ask("admin", "mosquitto", str(folder / "broker"))
        assert done.returncode == 0, done.stderr
        with mosquitto(folder / "broker" / "mosquitto.conf") as broker:
            here = Site(made, broker, f"{HOST}:{mqtt_port}")
            made.up("--mosquitto", str(folder / "broker"), port=port)
            made.join(*PEERS)
            made.start(*PEERS)
            yield here
            for program in made.programs.values():
                assert program.process.poll() is None, program.log
                assert "Traceback" not in program.log


def test_a_run_goes_on_while_mosquitto_is_lost(site: Site) -> None:
    words = ("run", "start", "mnist", "--rounds", "5", "--quorum", "2", "--follow")
    following = site.fleet.background("follow", *words)
    wait_for(lambda: "round 2/" in following.log, "the second round")
    site.broker.kill()
    assert following.wait() == 0
    assert "round 5/" in following.log
    del site.fleet.programs["follow"]
    site.until_told(f"no broker listens at {site.place}")
    site.finishes_a_run()
    site.broker.start()
    site.until_back()


def test_mosquitto_hangs(site: Site) -> None:
    site.broker.send(signal.SIGSTOP)
    site.until_told(f"{site.place} refused the MQTT login or does not answer")
    site.finishes_a_run()
    site.broker.send(signal.SIGCONT)
    site.until_back()


def test_coordinator_and_members_change_while_mosquitto_is_away(site: Site) -> None:
    port = int(json.loads((site.fleet.home / "up.json").read_bytes())["address"].rpartition(":")[2])
    site.broker.kill()
    assert site.fleet.programs["up"].stop() == 0
    site.fleet.up("--mosquitto", str(site.fleet.folder / "broker"), port=port)
    site.until_told(f"no broker listens at {site.place}")
    site.finishes_a_run()
    site.fleet.join("eve")
    site.broker.start()
    site.fleet.start("eve")
    site.until_shown(ada="idle", bob="idle", eve="idle")
    assert site.fleet.ask("peers", "remove", "eve", "--yes").returncode == 0
    site.fleet.until_agent("eve", "lost its login", lambda told: not told["mqtt"])
    site.fleet.programs.pop("eve").stop()
    site.until_back()


def test_the_broker_of_the_compose_file_serves_a_fleet(tmp_path: Path) -> None:
    port, mqtt_port = two_free_ports()
    password = "a long pass-word"
    url = f"mqtts://fleet:{password.replace(' ', '%20')}@{HOST}:{mqtt_port}"
    home = tmp_path / "coordinator"
    paths = {
        "/tmp/passwords": str(tmp_path / "passwords"),
        "/mosquitto/config/mosquitto.conf": str(tmp_path / "mosquitto.conf"),
        "/var/lib/commonweight/coordinator": str(home),
        "8883": str(mqtt_port),
        "$$": "$",
    }

    def here(text: str) -> str:
        for theirs, ours in paths.items():
            text = text.replace(theirs, ours)
        return text

    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["broker"]
    config = here((DEPLOY / "mosquitto.conf").read_text())
    if os.geteuid() == 0:  # in the container it never is
        config += "user root\n"
    (tmp_path / "mosquitto.conf").write_text(config)
    env = {"PATH": f"{os.environ['PATH']}:/usr/sbin", "MQTT_PASSWORD": password}
    settings = {"COMMONWEIGHT_HOST": HOST, "COMMONWEIGHT_MQTT_CA": str(home / "ca.pem")}
    with (
        fleet(tmp_path, COMMONWEIGHT_MQTT_URL=url, **settings) as made,
        (tmp_path / "mosquitto.log").open("wb") as log,
    ):
        assert made.ask("init").returncode == 0
        words = [here(word) for word in service["entrypoint"]]
        broker = subprocess.Popen(words, env=env, stdout=log, stderr=log)
        try:
            made.up(port=port)
            made.join("ada")
            made.start("ada")
            wait_for(lambda: made.data("status")["links"]["mqtt"], "the coordinator is on MQTT")
        finally:
            broker.terminate()
            broker.wait(20)
    assert password not in (tmp_path / "passwords").read_text()
