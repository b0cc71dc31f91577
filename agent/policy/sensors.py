"""Sensors for the policy: battery, load, user activity, network, temperature, memory.

A missing sensor reads None, which means unknown to the policy; `doctor` lists it. Each sensor is
read only as often as its value may change, so that an idle agent costs nearly nothing. The folder
in COMMONWEIGHT_AGENT_SYSFS replaces /sys.
"""

from __future__ import annotations

import glob
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

import psutil

from agent.policy.rules import SensorReadings
from protocols.errors import CommonweightError
from protocols.local.programs import run_program

SYSFS_VARIABLE = "COMMONWEIGHT_AGENT_SYSFS"
#: The windows in which the CPU use of other programs is measured. The short one limits the delay of
#: a pause: one busy core of two reaches 25 % after half of the window.
SHORT_WINDOW_S, LONG_WINDOW_S = 0.8, 30.0
_COMMAND_TIMEOUT_S = 2.0

T = TypeVar("T")


class _CachedReading(Generic[T]):
    """A reading that is refreshed at most every `every_s` seconds."""

    def __init__(self, every_s: float, read: Callable[[], T]) -> None:
        self._every_s, self._read = every_s, read
        self._due = -1.0
        self._last: T

    def expire(self) -> None:
        """Refresh with the next call."""
        self._due = -1.0

    def __call__(self, now: float) -> T:
        if now >= self._due:
            self._last, self._due = self._read(), now + self._every_s
        return self._last


class Sensors:
    """The sensors of this machine. `own_pids()` returns the agent's processes.

    `read` is cheap enough for five calls a second. Sensors that run a program do so at most three
    times a minute.
    """

    def __init__(
        self, home: Path, own_pids: Callable[[], Iterable[int]] = tuple, *, gpu: bool = False
    ) -> None:
        root = sysfs()
        self._gpu = gpu
        self._others = OtherProcesses(own_pids)
        self._battery = _CachedReading(0.2, lambda: battery(root))
        self._hottest = _CachedReading(5.0, lambda: hottest_c(root))
        self._memory = _CachedReading(2.0, memory_free_percent)
        self._idle = _CachedReading(20.0, user_idle_s)
        self._metered = _CachedReading(60.0, metered)
        self._home_bytes = _CachedReading(60.0, lambda: home_bytes(home))

    def invalidate_home_bytes(self) -> None:
        """Measure the agent's folder with the next `read`."""
        self._home_bytes.expire()

    def read(self, up_today_bytes: int = 0, down_today_bytes: int = 0) -> SensorReadings:
        """Read all sensors."""
        now, local = time.monotonic(), time.localtime()
        short, long = self._others.percent(now)
        on_battery, charge = self._battery(now)
        return SensorReadings(
            minute=(local.tm_wday * 24 + local.tm_hour) * 60 + local.tm_min,
            on_battery=on_battery,
            battery_percent=charge,
            others_percent=short,
            others_long_percent=long,
            user_idle_s=self._idle(now),
            metered=self._metered(now),
            hottest_c=self._hottest(now),
            memory_free_percent=self._memory(now),
            gpu=self._gpu,
            up_today_bytes=up_today_bytes,
            down_today_bytes=down_today_bytes,
            home_bytes=self._home_bytes(now),
        )


class OtherProcesses:
    """The CPU use of other programs, without those in the background.

    Programs with a raised `nice` yield to all others, so the agent need not yield to them. Among
    them are the trainers of other agents.
    """

    def __init__(self, own_pids: Callable[[], Iterable[int]]) -> None:
        self._own_pids = own_pids
        self._readings: deque[tuple[float, float, float]] = deque()
        self._own_s_by_pid: dict[int, float] = {}
        self._total_own_s = 0.0

    def percent(self, now: float) -> tuple[float | None, float | None]:
        """Percent of all cores in the short and in the long window; None before two readings."""
        self._readings.append((now, *self._read()))
        while len(self._readings) > 2 and self._readings[1][0] <= now - LONG_WINDOW_S:
            self._readings.popleft()
        return self._over(now, SHORT_WINDOW_S), self._over(now, LONG_WINDOW_S)

    def _over(self, now: float, window_s: float) -> float | None:
        """The use since the newest reading that is `window_s` old, or since the oldest."""
        _, busy_now, all_now = self._readings[-1]
        old = [reading for reading in self._readings if reading[0] <= now - window_s]
        _, busy, everything = old[-1] if old else self._readings[0]
        passed = all_now - everything
        return max(0.0, min(100.0, 100.0 * (busy_now - busy) / passed)) if passed > 0 else None

    def _read(self) -> tuple[float, float]:
        """CPU seconds of other programs, and of all cores together, since some fixed time."""
        times = psutil.cpu_times()
        everything = float(sum(times[: min(8, len(times))]))  # later fields are included in these
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "nice", 0.0)
        return everything - idle - getattr(times, "steal", 0.0) - self._own_s(), everything

    def _own_s(self) -> float:
        """CPU seconds of our processes that the system does not count as `nice`."""
        spent_s = {}
        for pid in self._own_pids():
            try:
                process = psutil.Process(pid)
                times, is_nice = process.cpu_times(), process.nice() > 0
            except psutil.Error:
                continue
            spent_s[pid] = times.system
            if not is_nice or sys.platform == "win32":
                spent_s[pid] += times.user
        before = self._own_s_by_pid
        self._total_own_s += sum(max(0.0, s - before.get(pid, 0.0)) for pid, s in spent_s.items())
        self._own_s_by_pid = spent_s
        return self._total_own_s


# --- single sensors --------------------------------------------------------------------------


def sysfs() -> Path:
    """The folder of the system's sensors."""
    return Path(os.environ.get(SYSFS_VARIABLE) or "/sys")


def battery(root: Path) -> tuple[bool | None, float | None]:
    """True on battery, and the charge in percent. Without a battery: on mains."""
    supplies = root / "class/power_supply"
    if not supplies.is_dir():
        sensor = getattr(psutil, "sensors_battery", lambda: None)()
        if sensor is not None and sensor.power_plugged is not None:
            return not sensor.power_plugged, float(sensor.percent)
        return None, None
    mains, charges, discharging = [], [], False
    for supply in supplies.iterdir():
        kind = _read_text(supply / "type")
        if kind == "Battery" and _read_text(supply / "scope") != "Device":  # not a mouse's
            capacity = _read_text(supply / "capacity")
            charges += [float(capacity)] if capacity.isdigit() else []
            discharging |= _read_text(supply / "status") == "Discharging"
        elif kind in ("Mains", "USB"):
            mains.append(_read_text(supply / "online") == "1")
    charge = sum(charges) / len(charges) if charges else None
    return discharging and not any(mains), charge


def hottest_c(root: Path) -> float | None:
    """The highest reading of the thermal sensors, in degrees Celsius."""
    degrees = []
    for pattern in ("class/thermal/thermal_zone*/temp", "class/hwmon/hwmon*/temp*_input"):
        for path in glob.iglob(str(root / pattern)):
            value = _read_text(Path(path))
            if value.lstrip("-").isdigit() and 0 < int(value) < 150_000:
                degrees.append(int(value) / 1000)
    return max(degrees, default=None)


def memory_free_percent() -> float:
    """Memory available without swapping, in percent of all."""
    memory = psutil.virtual_memory()
    return float(100.0 * memory.available / memory.total)


def user_idle_s() -> float | None:
    """Seconds since the last user input, if known; infinite if no user is logged in."""
    if sys.platform == "darwin":
        return _idle_by_ioreg(_run("ioreg", "-c", "IOHIDSystem", "-d", "4"))
    idle_s = []
    for user in psutil.users():
        if user.terminal:
            try:
                idle_s.append(time.time() - Path("/dev", user.terminal).stat().st_atime)
            except OSError:  # a display, not a terminal
                continue
    logind = _run("loginctl", "show-user", "--property=IdleHint", "--property=IdleSinceHint")
    if logind is not None:
        values = dict(line.split("=", 1) for line in logind.splitlines() if "=" in line)
        since = values.get("IdleSinceHint", "0")
        if values.get("IdleHint") == "no":
            idle_s.append(0.0)
        elif since.isdigit() and int(since):
            idle_s.append(time.time() - int(since) / 1e6)
    if not idle_s and logind is None:
        return None
    return max(0.0, min(idle_s, default=float("inf")))


def _idle_by_ioreg(output: str | None) -> float | None:
    for line in (output or "").splitlines():
        if '"HIDIdleTime"' in line and (value := line.rpartition("=")[2].strip()).isdigit():
            return int(value) / 1e9
    return None


def metered() -> bool | None:
    """True if NetworkManager knows or guesses that the network bills by volume."""
    if not sys.platform.startswith("linux"):
        return None
    name = "org.freedesktop.NetworkManager"
    path = "/org/freedesktop/NetworkManager"
    output = _run("busctl", "get-property", name, path, name, "Metered")
    return {"u 1": True, "u 3": True, "u 2": False, "u 4": False}.get((output or "").strip())


def home_bytes(home: Path) -> int | None:
    """Bytes of all files under `home`."""
    try:
        stats = (entry.stat() for entry in home.rglob("*") if not entry.is_symlink())
        return sum(s.st_blocks * 512 if hasattr(s, "st_blocks") else s.st_size for s in stats)
    except OSError:  # a file was deleted since
        return None


def has_gpu(device: str) -> bool:
    """True if training runs on a GPU, found out without importing torch."""
    if device == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        return apple or Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()
    return device != "cpu"


def missing_sensors(sensed: SensorReadings) -> list[str]:
    """The names of the sensors that this machine does not have."""
    named = {
        "battery": sensed.on_battery,
        "user": sensed.user_idle_s,
        "metered": sensed.metered,
        "hot": sensed.hottest_c,
        "memory": sensed.memory_free_percent,
    }
    return [name for name, value in named.items() if value is None]


def _run(*command: str) -> str | None:
    """The output of a program; None if it is missing or fails."""
    try:
        return run_program(command, "no reading", within_s=_COMMAND_TIMEOUT_S).decode()
    except (CommonweightError, UnicodeDecodeError):
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
