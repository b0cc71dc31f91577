"""The agent as a service of its owner: a systemd user unit on Linux, a launchd agent on macOS.

Nothing here needs root. The texts are pure; `choose` gives the system that runs them.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import plistlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from protocols.errors import CommonweightError, NotRunning, UsageError
from protocols.local import homes
from protocols.local.checks import Advice

_HOME_VARIABLE = "COMMONWEIGHT_AGENT_HOME"
STOP_TIMEOUT_S = 300
_LINGER = Path("/var/lib/systemd/linger")


class ServiceSpec(NamedTuple):
    """What is to run: `chosen_home` is set only if the variable names the home."""

    python: str
    home: Path
    is_custom_home: bool

    @property
    def name(self) -> str:
        """One name for the usual home, others for others: several agents fit on a machine."""
        if not self.is_custom_home:
            return "commonweight-agent"
        return f"commonweight-agent-{hashlib.sha256(os.fsencode(self.home)).hexdigest()[:8]}"

    @property
    def command(self) -> list[str]:
        # -P: a folder named `agent` in the place of the start must not be taken for ours.
        return [self.python, "-P", "-m", "agent.cli", "run"]


def service_spec(environment: Mapping[str, str] = os.environ) -> ServiceSpec:
    """The agent of this Python and this home."""
    return ServiceSpec(
        sys.executable, homes.home_path("agent"), bool(environment.get(_HOME_VARIABLE))
    )


# --- texts -----------------------------------------------------------------------------------


def systemd_unit(spec: ServiceSpec) -> str:
    """The systemd user unit. Not restarted when it could not work: 2 usage, 4 refused, 5 no home.

    KillMode=mixed: only the agent is asked to end, and it ends its trainer; whoever is left is
    killed.
    """
    command = " ".join(_quoted(word).replace("$", "$$") for word in spec.command)
    variable = f"Environment={_quoted(f'{_HOME_VARIABLE}={spec.home}')}\n" * spec.is_custom_home
    return f"""\
[Unit]
Description=commonweight agent: trains here, keeps the data here

[Service]
ExecStart={command}
{variable}Restart=on-failure
RestartSec=10
RestartPreventExitStatus=2 4 5
TimeoutStopSec={STOP_TIMEOUT_S}
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
ReadWritePaths={_quoted(str(spec.home))}

[Install]
WantedBy=default.target
"""


def _quoted(word: str) -> str:
    """`word` as one word of a unit file: quoted where needed, `%` told from a specifier."""
    word = word.replace("%", "%%")
    if word and not any(letter.isspace() or letter in "\"'\\;" for letter in word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def launchd_plist(spec: ServiceSpec) -> bytes:
    """The launchd agent. No exit status ends its restarts for good, hence the long wait."""
    fields: dict[str, Any] = {
        "Label": _label(spec),
        "ProgramArguments": spec.command,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 60,
        "ExitTimeOut": STOP_TIMEOUT_S,
        "ProcessType": "Background",
        "Nice": 10,
        "LowPriorityIO": True,
        "Umask": 0o077,
    }
    if spec.is_custom_home:
        fields["EnvironmentVariables"] = {_HOME_VARIABLE: str(spec.home)}
    return plistlib.dumps(fields)


def _label(spec: ServiceSpec) -> str:
    return f"org.{spec.name}"


# --- systems ---------------------------------------------------------------------------------


class ServiceManager(Protocol):
    """What can start the agent with the machine. Each raises CommonweightError."""

    file: Path

    def install(self, start: bool) -> None: ...
    def uninstall(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def status(self) -> str: ...


def find_manager(spec: ServiceSpec, platform: str = sys.platform) -> ServiceManager:
    """This machine's system. Raises UsageError where there is none that we know."""
    if platform == "darwin":
        return Launchd(spec)
    if platform.startswith("linux"):
        return Systemd(spec)
    raise UsageError(
        f"commonweight can install no service on {platform}",
        "let your system start it at log-in: " + subprocess.list2cmdline(spec.command),
    )


class Systemd:
    """`systemctl --user` and a file in ~/.config/systemd/user."""

    def __init__(self, spec: ServiceSpec) -> None:
        self._spec = spec
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        self.file = Path(config) / "systemd" / "user" / f"{spec.name}.service"

    def install(self, start: bool) -> None:
        self._systemctl("show-environment")  # says what is wrong before a file is written
        _write(self.file, systemd_unit(self._spec).encode())
        self._systemctl("daemon-reload")
        self._systemctl("enable", *(["--now"] if start else []), self.file.name)

    def uninstall(self) -> None:
        self._check_installed()
        self._systemctl("disable", "--now", self.file.name)
        self.file.unlink()
        self._systemctl("daemon-reload")

    def start(self) -> None:
        self._check_installed()
        self._systemctl("start", self.file.name)

    def stop(self) -> None:
        self._check_installed()
        self._systemctl("stop", self.file.name)

    def status(self) -> str:
        """systemd's word: active, inactive, failed, activating. Raises NotRunning: not installed"""
        self._check_installed()
        return self._systemctl("show", "--property=ActiveState", "--value", self.file.name)

    def _check_installed(self) -> None:
        _check_installed(self.file)

    def _systemctl(self, *words: str) -> str:
        return _run(
            ["systemctl", "--user", *words],
            "is a systemd running for this user (log in on the machine itself, not by su or in a "
            "container)? Without it: commonweight-agent run",
        )


class Launchd:
    """`launchctl` and a file in ~/Library/LaunchAgents."""

    def __init__(self, spec: ServiceSpec) -> None:
        self._spec = spec
        self.file = Path.home() / "Library" / "LaunchAgents" / f"{_label(spec)}.plist"
        self._domain = f"gui/{os.getuid()}" if sys.platform != "win32" else ""
        self._target = f"{self._domain}/{_label(spec)}"

    def install(self, start: bool) -> None:
        if self.file.exists() and self._is_loaded():
            self._launchctl("bootout", self._target)
        _write(self.file, launchd_plist(self._spec))
        if start:
            self._launchctl("bootstrap", self._domain, str(self.file))

    def uninstall(self) -> None:
        _check_installed(self.file)
        if self._is_loaded():
            self._launchctl("bootout", self._target)
        self.file.unlink()

    def start(self) -> None:
        _check_installed(self.file)
        if self._is_loaded():
            self._launchctl("kickstart", self._target)
        else:
            self._launchctl("bootstrap", self._domain, str(self.file))

    def stop(self) -> None:
        _check_installed(self.file)
        if self._is_loaded():
            self._launchctl("bootout", self._target)

    def status(self) -> str:
        _check_installed(self.file)
        if not self._is_loaded():
            return "inactive"
        lines = (line.strip() for line in self._launchctl("print", self._target).splitlines())
        state = next((line for line in lines if line.startswith("state = ")), "")
        return "active" if state == "state = running" else "inactive"

    def _is_loaded(self) -> bool:
        try:
            self._launchctl("print", self._target)
        except CommonweightError:
            return False
        return True

    def _launchctl(self, *words: str) -> str:
        return _run(["launchctl", *words], "log in on the Mac's own screen, then try again")


def _check_installed(file: Path) -> None:
    if not file.exists():
        raise NotRunning("the service is not installed", "commonweight-agent service install")


def _write(file: Path, text: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)
    except OSError as err:
        raise CommonweightError(
            f"cannot write {file}: {err.strerror}", "look at its folder"
        ) from err


def _run(command: list[str], hint: str) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STOP_TIMEOUT_S + 20,
            check=False,
        )
    except FileNotFoundError as err:
        raise CommonweightError(f"there is no {command[0]} on this machine", hint) from err
    except subprocess.TimeoutExpired as err:
        raise CommonweightError(f"{' '.join(command)} does not come back", hint) from err
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise CommonweightError(f"{' '.join(command)}: {said[0]}", hint)
    return done.stdout.strip()


# --- for the doctor --------------------------------------------------------------------------


def check() -> str | Advice:
    """Whether the agent starts with the machine, and stays when its owner logs out."""
    try:
        system = find_manager(service_spec())
    except UsageError as err:
        return Advice("none on this system", err.hint)
    if not system.file.exists():
        return "not installed: it runs while somebody lets it run"
    if isinstance(system, Systemd) and not (_LINGER / getpass.getuser()).exists():
        return Advice(
            "installed, and ends when you log out", f"loginctl enable-linger {getpass.getuser()}"
        )
    return f"installed: {system.file}"
