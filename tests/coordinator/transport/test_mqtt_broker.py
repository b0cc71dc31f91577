"""The embedded broker: how it starts, hides its password, comes back and ends with its parent."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coordinator.daemon.brokers import make_broker
from coordinator.storage import settings
from coordinator.storage.settings import PORT, Settings
from coordinator.transport import certificate_probe, mqtt_broker
from coordinator.transport.external_broker import ExternalBroker
from coordinator.transport.mqtt_access import Passwords
from coordinator.transport.mqtt_broker import EmbeddedBroker
from coordinator.transport.mqtt_gate import MAX_WAITING
from protocols.errors import CommonweightError, HomeError, PortInUse, UsageError
from tests.support.mqtt_fleet import HOST, Site, rogue, running, started
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def _logs_in(site: Site, broker: EmbeddedBroker) -> bool:
    async with rogue(site.login(broker)):
        return True


async def test_starts_answers_and_frees_its_port(site: Site) -> None:
    broker = site.broker()
    assert not broker.running
    assert broker.pid is None
    await broker.start()
    await broker.start()  # a second time changes nothing
    assert broker.running
    assert await _logs_in(site, broker)
    await broker.stop()
    await broker.stop()
    assert not broker.running
    again = site.broker(broker.port)
    await again.start()
    assert await _logs_in(site, again)
    await again.stop()


def test_by_default_it_has_the_port_after_the_coordinators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path))
    settings.init([HOST])
    made = make_broker(tmp_path, Settings(), PORT, settings.open_keys(tmp_path))
    assert isinstance(made, EmbeddedBroker)
    assert made.port == PORT + 1


async def test_passwords_are_in_private_files_or_in_none(site: Site) -> None:
    async with started(site) as broker:
        inner, own = site.address(broker).password, site.login(broker).password
        for child in psutil.Process().children(recursive=True):
            assert inner not in " ".join(child.cmdline())
        files = [path for path in site.folder.rglob("*") if path.is_file()]
        with_it = [path for path in files if inner in path.read_text(errors="replace")]
        assert {path.name for path in with_it} == {"broker.toml", "gate.json"}
        if sys.platform != "win32":
            assert {stat.S_IMODE(path.stat().st_mode) for path in with_it} == {0o600}
        assert not [path for path in files if own in path.read_text(errors="replace")]


@pytest.mark.skipif(sys.platform == "win32", reason="sessions are POSIX")
async def test_ctrl_c_of_the_terminal_does_not_reach_it(site: Site) -> None:
    async with started(site) as broker:
        assert broker.pid is not None
        assert os.getsid(broker.pid) == broker.pid != os.getsid(0)


async def test_a_port_in_use_is_named_with_the_option(site: Site) -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        broker = site.broker(port)
        with pytest.raises(PortInUse, match=str(port)) as caught:
            await broker.start()
    assert "--mqtt-port" in caught.value.hint
    assert not broker.running


async def test_what_cannot_work_is_said(site: Site) -> None:
    certificate, key = site.folder / "tls.pem", site.folder / "tls.key"
    for host in ("192.0.2.1", "nowhere.invalid"):
        broker = EmbeddedBroker(site.folder, host, 0, certificate, key, "f", Passwords(b"s"))
        with pytest.raises(UsageError, match=host):
            await broker.start()
    broker = EmbeddedBroker(
        site.folder, HOST, 0, site.folder / "none.pem", key, "f", Passwords(b"s")
    )
    with pytest.raises(HomeError, match=r"none\.pem"):
        await broker.start()


async def test_a_key_that_does_not_fit_leaves_no_child(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.transport.mqtt_broker.START_TIMEOUT_S", 0.5)
    (site.folder / "tls.key").write_text("not a key")
    broker, before = site.broker(), psutil.Process().children()
    with pytest.raises(CommonweightError):
        await broker.start()
    assert not broker.running
    assert psutil.Process().children() == before


@pytest.mark.filterwarnings("always::ResourceWarning")
async def test_a_killed_child_is_started_again_on_its_port(
    site: Site, recwarn: pytest.WarningsRecorder
) -> None:
    changes: list[tuple[bool, str]] = []
    async with (
        started(site) as broker,
        running(lambda: broker.supervise(lambda up, why: changes.append((up, why)))),
    ):
        await until(lambda: changes == [(True, "")])
        port, first = broker.port, broker.pid
        assert first is not None
        psutil.Process(first).kill()
        await until(lambda: len(changes) == 3)
        assert [up for up, _ in changes] == [True, False, True]
        assert "ended" in changes[1][1]
        assert broker.pid != first
        assert broker.port == port
        assert await _logs_in(site, broker)
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
async def test_a_blocked_child_is_started_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_broker, "_STOP_TIMEOUT_S", 1.0)  # it does not hear SIGTERM
    broker = site.broker(stuck_after_s=1.0)
    await broker.start()
    changes: list[tuple[bool, str]] = []
    try:
        async with running(lambda: broker.supervise(lambda up, why: changes.append((up, why)))):
            assert broker.pid is not None
            psutil.Process(broker.pid).suspend()
            await until(lambda: len(changes) >= 3)
            assert "was blocked" in changes[1][1]
            assert await _logs_in(site, broker)
    finally:
        await broker.stop()


async def test_a_full_broker_is_not_taken_for_a_blocked_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes connections over a limit, also those of the probe."""
    broker = site.broker(stuck_after_s=3.0)
    await broker.start()
    changes: list[tuple[bool, str]] = []
    probes: list[bool] = []

    async def probe(ip: str, port: int, timeout_s: float) -> bool:
        probes.append(await certificate_probe.is_blocked(ip, port, timeout_s))
        return probes[-1]

    monkeypatch.setattr(mqtt_broker, "is_blocked", probe)
    waiting = [socket.create_connection((HOST, broker.port)) for _ in range(MAX_WAITING)]
    try:
        assert await certificate_probe.served_certificate(HOST, broker.port, 3.0) is None
        async with running(lambda: broker.supervise(lambda up, why: changes.append((up, why)))):
            await until(lambda: len(probes) >= 2)
        assert not any(probes)
        assert changes == [(True, "")]
    finally:
        for connection in waiting:
            connection.close()
        await broker.stop()


async def test_a_cancelled_start_leaves_no_child(site: Site) -> None:
    broker, before = site.broker(), psutil.Process().children()
    starting = asyncio.create_task(broker.start())
    await until(lambda: broker.running or starting.done())
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await broker.stop()
    assert psutil.Process().children() == before


_PARENT = """
import asyncio, json, sys
from pathlib import Path
from coordinator.transport.mqtt_access import Passwords
from coordinator.transport.mqtt_broker import EmbeddedBroker

async def main():
    folder, certificate, key = json.loads(sys.stdin.readline())
    broker = EmbeddedBroker(
        Path(folder), "127.0.0.1", 0, Path(certificate), Path(key), "f", Passwords(b"s")
    )
    await broker.start()
    print(broker.pid, broker.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_it_ends_with_a_parent_that_is_killed(site: Site) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        paths = [str(site.folder / name) for name in ("mqtt", "tls.pem", "tls.key")]
        parent.stdin.write(json.dumps(paths) + "\n")
        parent.stdin.flush()
        pid, port = map(int, parent.stdout.readline().split())
        child = psutil.Process(pid)
        socket.create_connection((HOST, port)).close()
        parent.kill()
        parent.wait()
        try:
            # An orphan whose new parent does not reap it stays as a zombie: ended all the same.
            asyncio.run(until(lambda: not _alive(child)))
        finally:
            if child.is_running():
                child.kill()


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_an_external_broker_is_its_url(site: Site) -> None:
    ca = site.folder / "ca.pem"
    ca.write_text(site.ca_pem)
    broker = ExternalBroker("mqtts://fleet:secret@broker.example", ca)
    address = broker.address("ignored")
    assert (address.host, address.port, address.tls) == ("broker.example", 8883, True)
    assert address.ca_pem == site.ca_pem
    changes: list[bool] = []
    await broker.start()
    async with running(lambda: broker.supervise(lambda up, _: changes.append(up))):
        await until(lambda: changes == [True])
    await broker.stop()
    with pytest.raises(UsageError, match="cannot read"):
        ExternalBroker("mqtts://broker.example", site.folder / "none")


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("mqtt://fleet:secret@broker.example", True),
        ("mqtts://fleet:secret@broker.example", False),
        ("mqtt://127.0.0.1", False),
        ("mqtt://[::1]:1884", False),
    ],
)
def test_a_broker_without_tls_is_a_warning(
    url: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ExternalBroker(url)
    assert ("has no TLS" in caplog.text) == warned
    assert "secret" not in caplog.text
