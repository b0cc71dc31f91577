"""The agent's doctor against a real coordinator, and against ones with a fault."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.home import enrollment_file
from agent.home.enrollment_file import Enrollment
from agent.setup import environment as environment_checks
from agent.setup.doctor import check_skew, examine_agent
from agent.transport.mqtt_client import try_login
from protocols.enrollment import certificates, identity
from protocols.enrollment.certificates import NodeCertificate
from protocols.errors import CommonweightError
from protocols.local.atomic_files import write_private
from protocols.local.checks import Advice
from protocols.messages.mqtt import MqttAddress
from tests.support.fleet_harness import AGENT, Fleet, environment, fleet, run_program
from tests.support.waiting import wait_for

HOST = "127.0.0.1"
HERE = [
    "home",
    "permissions",
    *("settings", "tasks", "sharing"),
    "data",
    "disk",
    "crashes",
    "packages",
    "device",
    "sandbox",
    "sensors",
    "service",
]
THERE = ["enrolled", "dns", "tcp", "tls", "clock", "coordinator", "flower", "mqtt", "version"]

Made = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A coordinator, and a machine `box` that has joined."""
    with fleet(tmp_path_factory.mktemp("site")) as made:
        made.up()
        made.join("box")
        yield made


def doctor(site: Fleet, name: str) -> tuple[int, Made]:
    """The exit status of `doctor --json` on this machine, and its checks by name."""
    done = site.ask_agent(name, "doctor", "--json")
    told = json.loads(done.stdout)
    assert (told["schema_version"], told["status"]) == (1, "ok"), done.stderr
    made = {check["name"]: check for check in told["data"]["checks"]}
    assert told["data"]["faults"] == sum(check["ok"] is False for check in made.values())
    return done.returncode, made


def test_a_healthy_machine_passes_whether_or_not_its_agent_runs(site: Fleet) -> None:
    code, made = doctor(site, "box")
    assert (code, list(made)) == (0, HERE + THERE), made
    assert all(check["ok"] for check in made.values()), made
    assert "days left" in made["tls"]["detail"]
    before = site.data("status")["peers"]
    assert [peer["state"] for peer in before.values()] == ["offline"]

    site.start("box")
    since = site.agent("box")["since"]
    events = site.events()
    done = site.ask_agent("box", "doctor")
    assert done.returncode == 0, done.stdout
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        f"✓ {name}" for name in HERE + THERE
    ]
    # Neither the running agent nor the coordinator was disturbed.
    told = site.agent("box")
    assert (told["since"], told["session"], told["mqtt"]) == (since, True, True)
    assert site.events() == events
    assert site.programs["box"].stop() == 0


def test_a_machine_that_never_joined(site: Fleet) -> None:
    code, made = doctor(site, "nobody")
    assert code == 6
    assert made["home"]["ok"] is False
    assert "commonweight-agent join" in made["home"]["fix"]
    assert {name for name, check in made.items() if check["ok"] is None} == {
        *("permissions", "settings", "tasks", "sharing", "data", "disk", "crashes", "sandbox"),
        *("sensors", *THERE),
    }  # fmt: skip
    assert not (site.folder / "nobody").exists()


def test_the_device_is_the_one_that_the_owner_has_set() -> None:
    assert environment_checks.check_device("cpu").startswith("cpu, torch")
    with pytest.raises(CommonweightError, match="torch cannot use cuda:99") as caught:
        environment_checks.check_device("cuda:99")
    assert "policy set device auto" in caught.value.hint


def test_public_files_and_unreadable_settings_are_faults(site: Fleet) -> None:
    site.join("open")
    home = site.folder / "open"
    (home / "sign.key").chmod(0o644)
    (home / "settings.toml").write_text("idle_timeout_s = -1\n")
    code, made = doctor(site, "open")
    assert code == 6
    if os.name == "posix":
        assert "sign.key" in made["permissions"]["detail"]
        assert made["permissions"]["fix"] == f"chmod -R go-rwx '{home}'"
    assert "idle_timeout_s" in made["settings"]["detail"]
    assert made["coordinator"]["ok"], "the other checks still run"


@pytest.mark.long
def test_a_removed_machine(site: Fleet) -> None:
    site.join("gone")
    assert site.ask("peers", "remove", "gone", "--yes").returncode == 0
    code, made = doctor(site, "gone")
    assert code == 6
    assert made["tls"]["ok"]
    assert made["coordinator"]["ok"] is False
    assert "refuses this machine's signature" in made["coordinator"]["detail"]
    assert "--replace" in made["coordinator"]["fix"]
    assert made["flower"]["ok"] is made["version"]["ok"] is None


def test_another_distribution_named_agent_is_a_fault(site: Fleet, tmp_path: Path) -> None:
    meta = tmp_path / "other-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (meta / "top_level.txt").write_text("agent\n")
    env = environment(site.folder, COMMONWEIGHT_AGENT_HOME=str(site.folder / "box"))
    env["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = run_program([AGENT, "doctor"], env)
    assert done.returncode == 6
    assert "✗ packages: two packages named agent or protocols: other\n    fix: " in done.stdout


async def test_the_mqtt_login_is_tried(site: Fleet) -> None:
    mqtt = enrollment_file.read_enrollment(site.folder / "box").mqtt
    assert await try_login(mqtt) == ""
    wrong = msgspec.structs.replace(mqtt, password="wrong")
    assert "refused the MQTT login or does not answer" in await try_login(wrong)
    with socket.socket() as held:
        held.bind((HOST, 0))  # bound, but not listening
        nobody = msgspec.structs.replace(mqtt, port=held.getsockname()[1])
        assert "no broker listens" in await try_login(nobody)
    stranger = msgspec.structs.replace(mqtt, ca_pem=certificates.new_ca("other")[1].decode())
    assert "certificate" in await try_login(stranger)


@pytest.mark.long
def test_a_machine_that_awaits_approval_and_a_coordinator_that_is_down(tmp_path: Path) -> None:
    with fleet(tmp_path) as made:
        up = made.up("--approve")
        made.join("box")
        code, checks = doctor(made, "box")
        assert code == 6
        assert checks["coordinator"]["detail"] == "this machine awaits approval"
        assert (
            checks["coordinator"]["fix"] == "run on the coordinator: commonweight peers approve box"
        )
        assert checks["flower"]["ok"] is None
        assert checks["mqtt"]["ok"] is None  # it gets the login once it is approved
        assert made.ask("peers", "approve", "box").returncode == 0
        assert doctor(made, "box")[0] == 0

        assert up.stop() == 0
        code, checks = doctor(made, "box")
        assert code == 6
        assert checks["dns"]["ok"]
        assert "takes no connection" in checks["tcp"]["detail"]
        assert "commonweight up" in checks["tcp"]["fix"]
        assert checks["tls"]["ok"] is checks["clock"]["ok"] is checks["flower"]["ok"] is None
        assert checks["mqtt"]["ok"] is None


# --- coordinators with one fault --------------------------------------------------------------


class Answering(BaseHTTPRequestHandler):
    """Answers every request with a wrong date."""

    ahead_s = 0.0
    protocol_version = "HTTP/1.1"

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + self.ahead_s, usegmt=True)

    def do_GET(self) -> None:
        self.send_response(401 if "standing" in self.path else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def impostor(
    home: Path, *, ahead_s: float = 0.0, name: str = HOST, other_ca: bool = False
) -> Iterator[None]:
    """A server at the address of this home's coordinator."""
    ca_key, ca_pem = certificates.new_ca("test")
    trusted = certificates.new_ca("another") if other_ca else (ca_key, ca_pem)
    key, certificate = certificates.new_server_certificate(ca_key, ca_pem, [name])
    folder = home.parent
    write_private(folder / "server.key", identity.private_pem(key))
    write_private(folder / "server.pem", certificate)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "server.pem", folder / "server.key")
    handler = type("Handler", (Answering,), {"ahead_s": ahead_s})
    server = ThreadingHTTPServer((HOST, 0), handler)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        enroll(home, *trusted, server.server_address[1])
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def enroll(home: Path, ca_key: identity.SigningKey, ca_pem: bytes, port: int) -> None:
    sign_key, node_key = identity.new_signing_key(), identity.new_node_key()
    write_private(home / "sign.key", identity.private_pem(sign_key))
    write_private(home / "node.key", identity.private_pem(node_key))
    fleet_id = certificates.ca_fingerprint(ca_pem).hex()[:16]
    public = identity.public_bytes(sign_key)
    certificate = NodeCertificate(
        fleet=fleet_id,
        peer=identity.peer_id(public),
        name="box",
        sign_public=public,
        node_public=identity.node_public_pem(node_key),
        not_after=time.time() + 1000,
    )
    enrollment = Enrollment(
        peer=certificate.peer,
        name="box",
        fleet=fleet_id,
        addresses=(f"{HOST}:{port}",),
        ca_pem=ca_pem.decode(),
        certificate=certificates.issue_certificate(ca_key, certificate),
        coordinator_public=bytes(32),
        mqtt=MqttAddress(host=HOST, port=port, ca_pem=ca_pem.decode()),
    )
    enrollment_file.write_enrollment(home, enrollment)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the device that does not load torch for seconds; other tests load it."""
    monkeypatch.setattr(environment_checks, "_DEVICE_SCRIPT", "print('cpu')")


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(
    ("ahead_s", "ok", "said"),
    [
        (-30.0, False, "ahead of the coordinator: signatures are refused"),
        (20.0, True, "behind the coordinator"),
        (400.0, False, "behind the coordinator: signatures are refused"),
    ],
)
def test_a_wrong_clock_is_a_fault(agent_home: Path, ahead_s: float, ok: bool, said: str) -> None:
    with impostor(agent_home, ahead_s=ahead_s):
        made = {check.name: check for check in examine_agent(agent_home)}
    assert made["tls"].ok
    assert made["clock"].ok is ok
    assert said in made["clock"].detail
    assert "NTP" in made["clock"].fix


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(
    ("wrong", "said", "fix"),
    [
        ({"name": "elsewhere.example"}, "mismatch", "`names` in settings.toml"),
        ({"other_ca": True}, "is not valid", "another coordinator answers there"),
    ],
)
def test_another_server_at_the_coordinators_address(
    agent_home: Path, wrong: dict[str, Any], said: str, fix: str
) -> None:
    with impostor(agent_home, **wrong):
        made = {check.name: check for check in examine_agent(agent_home)}
    assert made["enrolled"].ok
    assert made["tls"].ok is False
    assert said in made["tls"].detail
    assert fix in made["tls"].fix
    assert made["coordinator"].ok is None


def test_limits_of_the_clock_skew() -> None:
    # A date header lags by up to 2 s, by 1 s on average.
    for fine in (-2.0, 0.0, 1.0, 2.0, 3.9):
        assert isinstance(check_skew(fine), str)
    for odd in (4.5, -2.5, -100.0, -298.0):
        assert isinstance(check_skew(odd), Advice)
    for wrong in (6.5, 3600.0, -300.0, -86400.0):
        with pytest.raises(CommonweightError, match="signatures are refused"):
            check_skew(wrong)


@pytest.mark.long
def test_the_doctor_can_run_repeatedly(site: Fleet) -> None:
    """No request is refused as a replay, and no session stays open."""
    for _ in range(2):
        assert doctor(site, "box")[0] == 0
    wait_for(
        lambda: all(peer["state"] == "offline" for peer in site.data("status")["peers"].values()),
        "nobody is shown as present",
    )
