"""The doctor of a running, stopped or damaged coordinator; and draining a peer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.admin.doctor import check_free, engine, examine_coordinator
from coordinator.storage import settings
from coordinator.storage.settings import PORT
from protocols.enrollment import certificates, identity
from protocols.errors import CommonweightError, PortInUse
from protocols.local.atomic_files import write_private
from tests.support.fleet_harness import HOST, Fleet, fleet, two_free_ports
from tests.support.waiting import wait_for

NAMES = [
    "home", "permissions", "settings", "disk", "crashes", "engine", "ledger", "versions", "clock",
    "running", "certificate", "ports", "broker", "peers",
]  # fmt: skip

Made = dict[str, dict[str, Any]]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as made:
        yield made


def doctor(site: Fleet) -> tuple[int, Made]:
    done = site.ask("doctor", "--json")
    told = json.loads(done.stdout)
    assert (told["schema_version"], told["status"]) == (1, "ok"), done.stderr
    made = {check["name"]: check for check in told["data"]["checks"]}
    assert list(made) == NAMES
    assert told["data"]["faults"] == sum(check["ok"] is False for check in made.values())
    return done.returncode, made


def faults(made: Made) -> list[str]:
    return [name for name, check in made.items() if check["ok"] is False]


def skipped(made: Made) -> list[str]:
    return [name for name, check in made.items() if check["ok"] is None]


def test_before_init(site: Fleet) -> None:
    code, made = doctor(site)
    assert (code, faults(made)) == (6, ["home"])
    assert "commonweight init" in made["home"]["fix"]
    assert {"ledger", "running", "broker", "peers"} <= set(skipped(made))
    assert not site.home.exists(), "a doctor makes nothing"


def test_right_after_init_nothing_is_a_fault(site: Fleet) -> None:
    assert site.ask("init").returncode == 0
    code, made = doctor(site)
    assert (code, faults(made)) == (0, [])
    assert made["running"] | {"name": ""} == {
        "name": "", "ok": None, "detail": "not started yet", "fix": "commonweight up",
    }  # fmt: skip
    assert made["certificate"]["detail"].startswith("valid for ")


def test_a_broker_without_tls_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path))
    monkeypatch.setenv("COMMONWEIGHT_MQTT_URL", "mqtt://fleet:secret@broker.example")
    settings.init([HOST])
    line = next(check for check in examine_coordinator(tmp_path) if check.name == "settings")
    assert "without TLS" in line.detail
    assert "mqtts://" in line.fix
    assert "secret" not in line.detail + line.fix


def test_up_and_down(site: Fleet) -> None:
    up = site.up()
    code, made = doctor(site)
    assert (code, faults(made), skipped(made)) == (0, [], [])
    assert made["peers"]["fix"] == "commonweight ticket create"
    assert made["certificate"]["detail"].startswith(f"valid for {HOST}, 36")
    assert "in use by this coordinator" in made["ports"]["detail"]

    site.join("box")
    site.start("box")
    _, made = doctor(site)
    assert made["peers"]["detail"] == "1 enrolled, 1 can work now"
    assert made["ledger"]["detail"] == "2 entries, every hash fits"

    assert site.programs["box"].stop() == 0
    assert up.stop() == 0
    done = site.ask("doctor")
    assert done.returncode == 6
    assert "✗ running: no coordinator is running" in done.stdout
    assert "    fix: start it: commonweight up" in done.stdout
    assert "– broker: skipped\n– peers: skipped\n" in done.stdout
    assert "✓ ledger: 2 entries" in done.stdout


def test_programs_at_the_default_ports_disturb_no_test(site: Fleet) -> None:
    with contextlib.ExitStack() as stack:
        for port in (PORT, PORT + 1):
            other = stack.enter_context(socket.socket())
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):  # taken already: as good
                other.bind((HOST, port))
                other.listen()
        site.up().stop()
        _, made = doctor(site)
        assert faults(made) == ["running"]
        assert made["ports"]["detail"] == "any free port"


def test_a_killed_coordinator_is_not_up(site: Fleet) -> None:
    site.up().kill()
    assert (site.home / "up.json").exists()
    _, made = doctor(site)
    assert faults(made) == ["running"]
    assert "does not answer" in made["running"]["detail"]


def test_damage_is_found(site: Fleet) -> None:
    site.up()
    site.ticket()
    site.ticket()
    with sqlite3.connect(site.home / "ledger.db") as ledger:
        ledger.execute("UPDATE log SET body = 'x' WHERE seq = 1")  # TEXT where a BLOB was
    ledger.close()
    names = ["elsewhere.example"]
    key, pem = certificates.new_server_certificate(
        identity.load_signing_key(site.home / "ca.key"),
        (site.home / "ca.pem").read_bytes(),
        names,
    )
    write_private(site.home / "server.key", identity.private_pem(key))
    write_private(site.home / "server.pem", pem)
    (site.home / "ca.key").chmod(0o640)
    code, made = doctor(site)
    assert code == 6
    wrong = ["permissions"] if os.name == "posix" else []
    assert faults(made) == [*wrong, "ledger", "certificate", "broker"]
    assert "is not valid" in made["broker"]["detail"]
    assert "entry 1 was changed" in made["ledger"]["detail"]
    assert f"it lacks {HOST}" in made["certificate"]["detail"]
    assert "ca.key" in made["permissions"]["detail"]
    assert made["clock"]["ok"] is None


def test_a_clock_that_was_set_back_is_found(site: Fleet) -> None:
    site.up().stop()
    later = time.time() + 3600
    os.utime(site.home / "ca.pem", (later, later))
    assert "in the future" in doctor(site)[1]["clock"]["detail"]


def test_a_stopped_broker_is_found(site: Fleet) -> None:
    site.up("--mqtt-url", f"mqtt://{HOST}:{two_free_ports()[0]}")
    _, made = doctor(site)
    assert faults(made) == ["broker"]
    assert "no broker listens" in made["broker"]["detail"]


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        with pytest.raises(PortInUse, match="is in use"):
            check_free(HOST, other.getsockname()[1])
    check_free(HOST, two_free_ports()[0])
    with pytest.raises(CommonweightError, match="has no address"):
        check_free("192.0.2.254", 1)


def test_the_installed_flower_is_supported() -> None:
    assert "flwr 1.4" in engine()


def test_names_given_to_init_are_those_that_up_certifies(site: Fleet) -> None:
    assert site.ask("init", "--san", "cw.example", "--san", HOST).returncode == 0
    site.up()
    names = certificates.certificate_names((site.home / "server.pem").read_bytes())
    assert "cw.example" in names
    assert doctor(site)[0] == 0


# --- draining ---------------------------------------------------------------------------------


@pytest.mark.long
def test_a_drained_peer_has_stopped_when_the_command_ends(site: Fleet) -> None:
    site.up()
    site.join("box", "other")
    site.start("box", "other")
    assert site.ask("peers", "drain", "nobody").returncode == 2
    done = site.ask("peers", "drain", "box", "--deadline", "60s")
    assert done.returncode == 0, done.stderr
    assert "box has no work any more: ✕ offline" in done.stderr
    assert site.programs["box"].wait(30) == 0
    again = site.ask("peers", "drain", "box")
    assert (again.returncode, "sent" in again.stderr) == (0, False)

    # One that does not hear it: the command says so when the time is up.
    suspended = site.programs["other"].process
    import psutil

    psutil.Process(suspended.pid).suspend()
    try:
        late = site.ask("peers", "drain", "other", "--deadline", "1s")
    finally:
        psutil.Process(suspended.pid).resume()
    assert late.returncode == 1
    assert "after 1s other is still" in late.stderr
    assert "commonweight peers pause other" in late.stderr
    wait_for(lambda: suspended.poll() is not None, "it ends once it hears the command")


@pytest.mark.long
def test_a_drain_right_after_a_restart_waits_for_the_agent(site: Fleet) -> None:
    """The coordinator has not heard of it yet: it is no agent that has stopped."""
    import psutil

    port = two_free_ports()[0]
    site.up(port=port)
    site.join("box")
    site.start("box")
    agent = psutil.Process(site.programs["box"].process.pid)
    agent.suspend()  # so that it cannot connect before the command looks
    assert site.programs["up"].stop() == 0
    site.up(port=port)
    back = threading.Timer(3, agent.resume)
    back.start()
    try:
        done = site.ask("peers", "drain", "box", "--deadline", "60s")
    finally:
        back.join()
    assert (done.returncode, "finish sent to box" in done.stderr) == (0, True), done.stderr
    assert site.programs["box"].wait(30) == 0
