"""Installs the agent as a service of its user: a systemd unit on Linux, launchd on macOS.

Nothing here needs root. The texts are pure; `find_manager` returns what installs them.
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
from typing import Any, NamedTuple

from protocols.errors import CommonweightError, NotRunning, UsageError
from protocols.local import homes
from protocols.local.checks import Advice
from protocols.local.os_errors import os_errors_as
from protocols.local.programs import run_program

_HOME_VARIABLE = "COMMONWEIGHT_AGENT_HOME"
STOP_TIMEOUT_S = 300
_LINGER = Path("/var/lib/systemd/linger")


class ServiceSpec(NamedTuple):
    """What to run. `is_custom_home` is true if the environment variable names the home."""

    python: str
    home: Path
    is_custom_home: bool

    @property
    def name(self) -> str:
        """The service's name, which depends on the home: a machine can run several agents."""
        if not self.is_custom_home:
            return "commonweight-agent"
        return f"commonweight-agent-{hashlib.sha256(os.fsencode(self.home)).hexdigest()[:8]}"

    @property
    def command(self) -> list[str]:
        # -P: a folder named `agent` in the current folder must not be imported.
        return [self.python, "-P", "-m", "agent.cli", "run"]


def service_spec(environment: Mapping[str, str] = os.environ) -> ServiceSpec:
    """The agent with this Python and this home."""
    return ServiceSpec(
        sys.executable, homes.home_path("agent"), bool(environment.get(_HOME_VARIABLE))
    )


# --- texts -----------------------------------------------------------------------------------


def systemd_unit(spec: ServiceSpec) -> str:
    """The systemd user unit.

    It does not restart after the exit codes 2 (usage), 4 (refused) and 5 (no home). With
    KillMode=mixed only the agent gets SIGTERM, and ends its trainer; remaining processes are
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
    """Quote a word for a unit file if it needs that, and escape `%`."""
    word = word.replace("%", "%%")
    if word and not any(letter.isspace() or letter in "\"'\\;" for letter in word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def launchd_plist(spec: ServiceSpec) -> bytes:
    """The launchd agent. launchd restarts after every exit code, so the interval is long."""
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


# --- service managers ------------------------------------------------------------------------


class _Service:
    """The service of one agent, and the file that describes it to the system."""

    def __init__(self, spec: ServiceSpec, file: Path) -> None:
        self._spec, self.file = spec, file

    def _check_installed(self) -> None:
        if not self.file.exists():
            raise NotRunning("the service is not installed", "commonweight-agent service install")


class Systemd(_Service):
    """`systemctl --user` and a file in ~/.config/systemd/user. Methods raise CommonweightError."""

    def __init__(self, spec: ServiceSpec) -> None:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        super().__init__(spec, config / "systemd" / "user" / f"{spec.name}.service")

    @property
    def text(self) -> str:
        """What `install` writes into the file."""
        return systemd_unit(self._spec)

    def install(self, start: bool) -> None:
        self._systemctl("show-environment")  # fails before a file is written
        _write(self.file, self.text.encode())
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
        self._check_installed()
        return self._systemctl("show", "--property=ActiveState", "--value", self.file.name)

    def _systemctl(self, *words: str) -> str:
        return _run(
            ["systemctl", "--user", *words],
            "is systemd running for this user (log in on the machine itself, not with su or in a "
            "container)? Without it: commonweight-agent up",
        )


class Launchd(_Service):
    """`launchctl` and a file in ~/Library/LaunchAgents. Methods raise CommonweightError."""

    def __init__(self, spec: ServiceSpec) -> None:
        super().__init__(spec, Path.home() / "Library/LaunchAgents" / f"{_label(spec)}.plist")
        self._domain = f"gui/{os.getuid()}" if sys.platform != "win32" else ""
        self._target = f"{self._domain}/{_label(spec)}"

    @property
    def text(self) -> str:
        """What `install` writes into the file."""
        return launchd_plist(self._spec).decode()

    def install(self, start: bool) -> None:
        if self.file.exists():
            self._unload()
        _write(self.file, self.text.encode())
        if start:
            self._launchctl("bootstrap", self._domain, str(self.file))

    def uninstall(self) -> None:
        self.stop()
        self.file.unlink()

    def start(self) -> None:
        self._check_installed()
        if self._is_loaded():
            self._launchctl("kickstart", self._target)
        else:
            self._launchctl("bootstrap", self._domain, str(self.file))

    def stop(self) -> None:
        self._check_installed()
        self._unload()

    def status(self) -> str:
        self._check_installed()
        if not self._is_loaded():
            return "inactive"
        lines = (line.strip() for line in self._launchctl("print", self._target).splitlines())
        state = next((line for line in lines if line.startswith("state = ")), "")
        return "active" if state == "state = running" else "inactive"

    def _unload(self) -> None:
        if self._is_loaded():
            self._launchctl("bootout", self._target)

    def _is_loaded(self) -> bool:
        try:
            self._launchctl("print", self._target)
        except CommonweightError:
            return False
        return True

    def _launchctl(self, *words: str) -> str:
        return _run(["launchctl", *words], "log in at the Mac itself, then try again")


ServiceManager = Systemd | Launchd


def find_manager(spec: ServiceSpec, platform: str = sys.platform) -> ServiceManager:
    """The service manager of this platform. Raises UsageError if there is none."""
    if platform == "darwin":
        return Launchd(spec)
    if platform.startswith("linux"):
        return Systemd(spec)
    raise UsageError(
        f"commonweight can install no service on {platform}",
        "let your system start it at log-in: " + subprocess.list2cmdline(spec.command),
    )


def _write(file: Path, text: bytes) -> None:
    with os_errors_as(
        CommonweightError, f"cannot write {file}", "check the permissions of its folder"
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)


def _run(command: list[str], hint: str) -> str:
    within_s = STOP_TIMEOUT_S + 20
    # The first line of an error is the reason; more lines only name further commands.
    output = run_program(command, " ".join(command), within_s=within_s, hint=hint, error_line=0)
    return output.decode(errors="replace").strip()


# --- for the doctor --------------------------------------------------------------------------


def check() -> str | Advice:
    """Check that the agent starts with the machine and runs after its owner has logged out."""
    try:
        system = find_manager(service_spec())
    except UsageError as err:
        return Advice("none on this system", err.hint)
    if not system.file.exists():
        return "not installed: the agent runs only when you start it"
    if isinstance(system, Systemd) and not (_LINGER / getpass.getuser()).exists():
        return Advice(
            "installed, but stops when you log out", f"loginctl enable-linger {getpass.getuser()}"
        )
    return f"installed: {system.file}"
