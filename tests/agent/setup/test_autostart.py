"""The agent as a service: the exact files, their check by systemd, and the commands."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.setup.autostart import (
    Launchd,
    ServiceSpec,
    Systemd,
    find_manager,
    launchd_plist,
    service_spec,
    systemd_unit,
)
from protocols.errors import CommonweightError, NotRunning, UsageError
from protocols.local.checks import Advice
from tests.support.fleet_harness import AGENT, ROOT, environment, run_program

USUAL = ServiceSpec("/opt/cw/bin/python", Path("/home/ann/.local/share/commonweight/agent"), False)
OTHER = ServiceSpec('/opt/a "b"/bin/py$1', Path("/srv/50% of it/agent"), True)

UNIT = """\
[Unit]
Description=commonweight agent: trains here, keeps the data here

[Service]
ExecStart=/opt/cw/bin/python -P -m agent.cli run
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=2 4 5
TimeoutStopSec=300
KillMode=mixed
UMask=0077
Nice=10
IOSchedulingClass=idle
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
ReadWritePaths=/home/ann/.local/share/commonweight/agent

[Install]
WantedBy=default.target
"""


def test_the_unit_of_the_usual_home() -> None:
    assert systemd_unit(USUAL) == UNIT
    assert USUAL.name == "commonweight-agent"


def test_a_custom_home_and_special_characters_are_quoted() -> None:
    lines = systemd_unit(OTHER).splitlines()
    assert lines[4] == 'ExecStart="/opt/a \\"b\\"/bin/py$$1" -P -m agent.cli run'
    assert lines[5] == 'Environment="COMMONWEIGHT_AGENT_HOME=/srv/50%% of it/agent"'
    assert 'ReadWritePaths="/srv/50%% of it/agent"' in lines
    assert OTHER.name == "commonweight-agent-9d5ab524"
    assert ServiceSpec("", Path("/srv/x"), True).name != OTHER.name


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("odd", [False, True])
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path, odd: bool) -> None:
    home = tmp_path / ("50% of it" if odd else "home")
    home.mkdir()
    file = tmp_path / "commonweight-agent.service"
    file.write_text(systemd_unit(ServiceSpec(sys.executable, home, odd)))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(file)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # It may also report faults of other units of this machine.
    assert file.name not in done.stderr
    assert done.returncode == 0, done.stderr


_UNITS = [("commonweight", 1.1), ("commonweight-agent", 1.2), ("commonweight-mosquitto", 1.1)]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize(("unit", "exposure"), _UNITS)
def test_the_system_units_expose_little(unit: str, exposure: float) -> None:
    file = ROOT / "deploy" / f"{unit}.service"
    words = ["systemd-analyze", "security", "--offline=true", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if "offline" in done.stderr:
        pytest.skip("this systemd rates only units that are installed")
    found = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= exposure


def test_the_launchd_agent() -> None:
    assert plistlib.loads(launchd_plist(USUAL)) == {
        "Label": "org.commonweight-agent",
        "ProgramArguments": ["/opt/cw/bin/python", "-P", "-m", "agent.cli", "run"],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 60,
        "ExitTimeOut": 300,
        "ProcessType": "Background",
        "Nice": 10,
        "LowPriorityIO": True,
        "Umask": 0o077,
    }
    other = plistlib.loads(launchd_plist(OTHER))
    assert other["Label"] == "org.commonweight-agent-9d5ab524"
    assert other["EnvironmentVariables"] == {"COMMONWEIGHT_AGENT_HOME": "/srv/50% of it/agent"}


def test_each_platform_has_its_manager_or_an_error(tmp_path: Path) -> None:
    assert isinstance(find_manager(USUAL, "linux"), Systemd)
    assert isinstance(find_manager(USUAL, "darwin"), Launchd)
    with pytest.raises(UsageError, match="no service on win32") as caught:
        find_manager(USUAL, "win32")
    assert "-P -m agent.cli run" in caught.value.hint
    made = service_spec({"COMMONWEIGHT_AGENT_HOME": "/srv/x"})
    assert (made.python, made.is_custom_home) == (sys.executable, True)


# --- calls of systemctl -----------------------------------------------------------------------

Asked = Callable[[], list[str]]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A script in place of `systemctl`, which needs a booted systemd; returns its calls."""
    heard = tmp_path / "asked"
    script = tmp_path / "bin" / "systemctl"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {heard}\ncase "$2" in show) echo active;; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return lambda: heard.read_text().splitlines()


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for systemctl")
def test_the_life_cycle_of_a_service(tmp_path: Path, asked: Asked) -> None:
    system = Systemd(USUAL)
    for early in (system.uninstall, system.start, system.stop, system.status):
        with pytest.raises(NotRunning, match="not installed"):
            early()
    system.install(start=True)
    assert system.file == tmp_path / "config/systemd/user/commonweight-agent.service"
    assert system.file.read_text() == UNIT
    system.stop()
    system.start()
    assert system.status() == "active"
    system.install(start=False)
    system.uninstall()
    assert not system.file.exists()
    assert asked() == [
        "--user show-environment",
        "--user daemon-reload",
        "--user enable --now commonweight-agent.service",
        "--user stop commonweight-agent.service",
        "--user start commonweight-agent.service",
        "--user show --property=ActiveState --value commonweight-agent.service",
        "--user show-environment",
        "--user daemon-reload",
        "--user enable commonweight-agent.service",
        "--user disable --now commonweight-agent.service",
        "--user daemon-reload",
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd is Linux's")
def test_without_a_systemd_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    system = Systemd(USUAL)
    with pytest.raises(CommonweightError, match="no usable systemctl on this machine") as caught:
        system.install(start=True)
    assert "commonweight-agent up" in caught.value.hint
    assert not system.file.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd is Linux's")
def test_the_doctor_checks_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.setup import autostart

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    said = autostart.check()
    assert isinstance(said, str)
    assert "not installed" in said
    file = find_manager(service_spec()).file
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(autostart, "_LINGER", tmp_path / "linger")
    advice = autostart.check()
    assert isinstance(advice, Advice)
    assert advice.fix.startswith("loginctl enable-linger ")


def test_a_service_needs_an_enrolled_machine(tmp_path: Path) -> None:
    env = environment(tmp_path, COMMONWEIGHT_AGENT_HOME=str(tmp_path / "home"))
    done = run_program([AGENT, "service", "install"], env)
    assert (done.returncode, done.stdout) == (5, "")
    assert "there is no agent in" in done.stderr
    status = run_program([AGENT, "service", "status"], env)
    assert status.returncode == 5
    assert "commonweight-agent service install" in status.stderr


def test_a_dry_run_shows_the_file_and_writes_nothing(tmp_path: Path) -> None:
    env = environment(tmp_path, COMMONWEIGHT_AGENT_HOME=str(tmp_path / "box"))
    done = run_program([AGENT, "service", "install", "--dry-run"], env)
    assert done.returncode == 0, done.stderr
    assert "this would be written to " in done.stderr
    assert "agent.cli" in done.stdout
    file = Path(done.stderr.strip().removeprefix("this would be written to ").rstrip(":"))
    assert not file.exists()
    assert not (tmp_path / "box").exists()
