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


#: Computes for a while between two lines on its input, so that both readings find it alive.
_SPIN = """
import os, sys, time
os.nice({nice})
print(os.nice(0), flush=True)
sys.stdin.readline()
end = time.process_time() + {seconds}
while time.process_time() < end: sum(range(10_000))
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("nice", [0, 10])
def test_our_own_processes_do_not_count_as_others(nice: int) -> None:
    """Two meters on one machine: for one of them the busy process is ours.

    What is nice is in neither: it yields to everybody. So is all that this test starts, if it is
    nice itself.
    """
    pids: list[int] = []
    knowing, ignorant = OtherProcesses(lambda: pids), OtherProcesses(lambda: ())

    def read() -> tuple[float, float]:
        """Both meters at about the same time, as other processes work meanwhile."""
        for _ in range(200):
            begun = time.monotonic()
            found = knowing._read()[0], ignorant._read()[0]
            if time.monotonic() - begun < 0.02:
                break
        return found

    code = _SPIN.format(nice=nice, seconds=0.5)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        is_nice = int(process.stdout.readline()) > 0
        pids.append(process.pid)
        before = read()
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        after = read()
        process.stdin.close()
    known_s = (after[1] - before[1]) - (after[0] - before[0])
    # The clock of the kernel ticks in hundredths.
    assert known_s == pytest.approx(0.0 if is_nice else 0.5, abs=0.24)


def test_use_by_others_is_a_percentage_of_all_cores() -> None:
    others = OtherProcesses(lambda: ())
    assert others.percent(0.0) == (None, None), "this needs two readings"
    time.sleep(0.05)
    short, long = others.percent(1.0)
    assert short == long
    assert short is None or 0 <= short <= 100
