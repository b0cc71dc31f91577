"""A fleet whose MQTT broker goes away: runs go on, and every view says what is true."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.transport.mqtt_broker import EmbeddedBroker
from tests.support.fleet_harness import Fleet, fleet, two_free_ports
from tests.support.mqtt_fleet import HOST, Site
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

#: So that peers are seen in training by commands that take seconds on a busy machine.
SLOW = ["--rounds", "1", "--set", "epochs=400", "--seed", "7"]
MISSING = "MQTT presence missing"


@contextmanager
def external_broker(folder: Path) -> Iterator[tuple[EmbeddedBroker, dict[str, str]]]:
    """A real broker that the coordinator does not restart, and the settings that name it."""
    folder.mkdir()
    site = Site(folder)
    broker = site.broker()
    asyncio.run(broker.start())
    own = site.address(broker)  # one login for all, as most brokers have
    try:
        url = f"mqtt://{own.user}:{own.password}@{own.netloc}"
        yield broker, {"COMMONWEIGHT_MQTT_URL": url}
    finally:
        asyncio.run(broker.stop())


def kill(broker: EmbeddedBroker) -> None:
    assert broker.pid is not None
    psutil.Process(broker.pid).kill()
    wait_for(lambda: not broker.running, "the broker is dead")


def views(site: Fleet, metrics_port: int) -> dict[str, Any]:
    """The states of the peers in every view, read one after another."""
    snapshot = site.data("status")["peers"].values()
    listed = site.data("peers", "list")
    with urllib.request.urlopen(f"http://{HOST}:{metrics_port}/metrics") as response:
        lines = response.read().decode().splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines)
    return {
        "snapshot": {(peer["name"], peer["state"], peer["reason"]) for peer in snapshot},
        "list": {(peer["name"], peer["state"], peer["reason"]) for peer in listed},
        "available": float(metrics["commonweight_peers_available"]),
        "without": float(metrics["commonweight_peers_without_presence"]),
        "training": float(metrics['commonweight_peers{state="training"}']),
        "table": " ".join(site.ask("status").stdout.split()),
    }


def test_peers_without_a_broker_are_counted_and_every_view_says_what_is_missing(
    tmp_path: Path,
) -> None:
    port, metrics_port = two_free_ports()
    with (
        external_broker(tmp_path / "broker") as (broker, settings),
        fleet(tmp_path, **settings) as site,
    ):

        def shown(**states: tuple[str, str]) -> dict[str, Any]:
            """The views, once these are the states and reasons."""
            expected = {(name, *state) for name, state in states.items()}

            def agree() -> dict[str, Any] | None:
                seen = views(site, metrics_port)
                return seen if seen["snapshot"] == seen["list"] == expected else None

            found: dict[str, Any] = wait_for(agree, f"all views show {states}")
            return found

        site.up("--metrics-port", str(metrics_port), port=port)
        site.join("ada", "bob")
        for name in ("ada", "bob"):  # else they compare after the run, and the views say so
            assert site.ask_agent(name, "policy", "set", "compare", "off").returncode == 0
        site.start("ada", "bob")
        kill(broker)
        run = site.start_run("mnist", "--quorum", "2", *SLOW)
        seen = shown(ada=("training", MISSING), bob=("training", MISSING))
        assert "2/2 peers · 2 without MQTT presence" in seen["table"]
        assert seen["table"].count("● training: no MQTT") == 2
        assert (seen["available"], seen["without"], seen["training"]) == (2, 2, 2)

        # A new coordinator has never heard of these peers over MQTT.
        assert site.programs["up"].stop() == 0
        site.up("--metrics-port", str(metrics_port), port=port)
        wait_for(lambda: views(site, metrics_port)["without"] == 2, "both are connected again")
        assert site.ended_run(run)["state"] == "finished"
        seen = shown(ada=("idle", MISSING), bob=("idle", MISSING))
        assert (seen["available"], seen["without"]) == (2, 2)
        assert site.programs["ada"].stop() == 0
        seen = shown(ada=("offline", "session ended"), bob=("idle", MISSING))
        assert "1/2 peers · 1 without MQTT presence" in seen["table"]
        site.start_agent("ada")

        asyncio.run(broker.start())
        seen = shown(ada=("idle", ""), bob=("idle", ""))
        assert (seen["available"], seen["without"]) == (2, 0)
        assert "MQTT" not in seen["table"]
        for program in site.programs.values():
            assert "Traceback" not in program.log


def test_an_owners_pause_and_resume_without_a_broker_count(tmp_path: Path) -> None:
    """The last presence says that she is paused, and no other can come."""
    with (
        external_broker(tmp_path / "broker") as (broker, settings),
        fleet(tmp_path, **settings) as site,
    ):
        site.up()
        site.join("ada")
        site.start("ada")
        site.ask_agent("ada", "pause")
        wait_for(
            lambda: [peer["state"] for peer in site.data("peers", "list")] == ["paused"],
            "she is shown as paused",
        )
        kill(broker)
        run = site.start_run("ping", "--rounds", "2", "--quorum", "1")
        site.until_agent("ada", "notices", lambda told: not told["mqtt"])
        site.ask_agent("ada", "resume")
        assert site.ended_run(run)["state"] == "finished"
