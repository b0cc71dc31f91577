"""The sensors on a folder that stands in for /sys, and on this machine as it is."""

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


def test_power_as_linux_tells_it(tmp_path: Path) -> None:
    (tmp_path / "class/power_supply").mkdir(parents=True)
    assert sensors.battery(tmp_path) == (False, None), "no battery: a machine on mains"
    supply(tmp_path, "BAT0", type="Battery", status="Discharging", capacity=41)
    assert sensors.battery(tmp_path) == (True, 41.0)
    supply(tmp_path, "mouse", type="Battery", scope="Device", status="Discharging", capacity=3)
    assert sensors.battery(tmp_path) == (True, 41.0), "a mouse's battery is not the machine's"
    supply(tmp_path, "AC", type="Mains", online=1)
    assert sensors.battery(tmp_path) == (False, 41.0)
    supply(tmp_path, "AC", type="Mains", online=0)
    supply(tmp_path, "BAT0", type="Battery", status="Full", capacity="?")
    assert sensors.battery(tmp_path) == (False, None)


def test_the_hottest_of_all(tmp_path: Path) -> None:
    assert sensors.hottest_c(tmp_path) is None
    for name, value in (("class/thermal/thermal_zone0", "45000"), ("class/hwmon/hwmon1", "61500")):
        (tmp_path / name).mkdir(parents=True)
        file = "temp" if "thermal" in name else "temp1_input"
        (tmp_path / name / file).write_text(value)
    assert sensors.hottest_c(tmp_path) == 61.5
    (tmp_path / "class/hwmon/hwmon1/temp1_input").write_text("-274000")
    assert sensors.hottest_c(tmp_path) == 45.0


def test_what_is_sensed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    code += "while time.process_time() < end: sum(range(10_000))"  # hardly a call of the system
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize(("nice", "ours_s"), [(0, 0.5), (10, 0.0)])
def test_our_own_work_is_not_that_of_others(nice: int, ours_s: float) -> None:
    """Two looks at the same machine: one knows the busy process for ours, one does not.

    What is nice is in neither: it yields to everybody.
    """
    pids: list[int] = []
    knowing, ignorant = OtherProcesses(lambda: pids), OtherProcesses(lambda: ())
    process = spin(0.5, nice)
    pids.append(process.pid)
    before = [look._read()[0] for look in (knowing, ignorant)]
    while process.poll() is None:
        told = [look._read()[0] for look in (knowing, ignorant)]  # what was ours while it lives
        time.sleep(0.005)
    process.wait()
    known_s = (told[1] - before[1]) - (told[0] - before[0])
    # The clock of the kernel ticks in hundredths, and the process starts and ends in the system.
    assert known_s == pytest.approx(ours_s, abs=0.24)


def test_use_by_others_is_a_part_of_all_cores() -> None:
    others = OtherProcesses(lambda: ())
    assert others.percent(0.0) == (None, None), "it takes two looks"
    time.sleep(0.05)
    short, long = others.percent(1.0)
    assert short == long
    assert short is None or 0 <= short <= 100
