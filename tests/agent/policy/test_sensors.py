"""The sensors, on a folder that replaces /sys and on this machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.policy import sensors
from agent.policy.sensors import OtherProcesses, Sensors


def supply(root: Path, name: str, **files: object) -> None:
    folder = root / "class/power_supply" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in files.items():
        (folder / file).write_text(f"{value}\n")


def test_battery_on_linux(tmp_path: Path) -> None:
    (tmp_path / "class/power_supply").mkdir(parents=True)
    assert sensors.battery(tmp_path) == (False, None), "without a battery the machine is on mains"
    supply(tmp_path, "BAT0", type="Battery", status="Discharging", capacity=41)
    assert sensors.battery(tmp_path) == (True, 41.0)
    supply(tmp_path, "mouse", type="Battery", scope="Device", status="Discharging", capacity=3)
    assert sensors.battery(tmp_path) == (True, 41.0), "the battery of a mouse does not count"
    supply(tmp_path, "AC", type="Mains", online=1)
    assert sensors.battery(tmp_path) == (False, 41.0)
    supply(tmp_path, "AC", type="Mains", online=0)
    supply(tmp_path, "BAT0", type="Battery", status="Full", capacity="?")
    assert sensors.battery(tmp_path) == (False, None)


def test_the_hottest_sensor_counts(tmp_path: Path) -> None:
    assert sensors.hottest_c(tmp_path) is None
    for name, value in (("class/thermal/thermal_zone0", "45000"), ("class/hwmon/hwmon1", "61500")):
        (tmp_path / name).mkdir(parents=True)
        file = "temp" if "thermal" in name else "temp1_input"
        (tmp_path / name / file).write_text(value)
    assert sensors.hottest_c(tmp_path) == 61.5
    (tmp_path / "class/hwmon/hwmon1/temp1_input").write_text("-274000")
    assert sensors.hottest_c(tmp_path) == 45.0


def test_readings_are_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sensors.SYSFS_VARIABLE, str(tmp_path))
    supply(tmp_path, "BAT0", type="Battery", status="Discharging", capacity=41)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    feeling = Sensors(tmp_path)
    assert feeling.read().on_battery is True
    supply(tmp_path, "AC", type="Mains", online=1)
    clock[0] += 1.0
    sensed = feeling.read(5, 6)
    assert (sensed.on_battery, sensed.up_today_bytes, sensed.down_today_bytes) == (False, 5, 6)
    assert sensed.memory_free_percent is not None
    assert 0 < sensed.memory_free_percent <= 100
    assert sensed.home_bytes is not None
    assert set(sensors.missing_sensors(sensed)) <= {"user", "metered", "hot"}


def spin(seconds: float, nice: int = 0) -> subprocess.Popen[bytes]:
    code = f"import os,time\nos.nice({nice})\nend=time.process_time()+{seconds}\n"
    code += "while time.process_time() < end: sum(range(10_000))"  # few system calls
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize(("nice", "ours_s"), [(0, 0.5), (10, 0.0)])
def test_our_own_processes_do_not_count_as_others(nice: int, ours_s: float) -> None:
    """Two meters on one machine: for one of them the busy process is ours.

    What is nice is in neither: it yields to everybody.
    """
    pids: list[int] = []
    knowing, ignorant = OtherProcesses(lambda: pids), OtherProcesses(lambda: ())
    process = spin(0.5, nice)
    pids.append(process.pid)
    before = [look._read()[0] for look in (knowing, ignorant)]
    while process.poll() is None:
        told = [look._read()[0] for look in (knowing, ignorant)]  # read while the process lives
        time.sleep(0.005)
    process.wait()
    known_s = (told[1] - before[1]) - (told[0] - before[0])
    # The clock of the kernel ticks in hundredths, and the process starts and ends in the system.
    assert known_s == pytest.approx(ours_s, abs=0.24)


def test_use_by_others_is_a_percentage_of_all_cores() -> None:
    others = OtherProcesses(lambda: ())
    assert others.percent(0.0) == (None, None), "this needs two readings"
    time.sleep(0.05)
    short, long = others.percent(1.0)
    assert short == long
    assert short is None or 0 <= short <= 100
