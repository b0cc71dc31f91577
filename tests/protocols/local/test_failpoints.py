"""Failpoints: each name is reached somewhere, and what is armed happens once, where it should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import checker, failpoint_names
from benchmarks.faults.failpoint_names import NAMES
from coordinator.runs.secure import transitions as secure_transitions
from coordinator.runs.transitions import TRANSITIONS
from protocols.local import failpoints
from protocols.local.failpoints import TRUTH, VARIABLE, parse_failpoints
from tests.e2e import test_secure
from tests.support.fleet_harness import ROOT

_CALL = re.compile(r'\bfailpoint\("([a-z.]+)"(, )?')


def called() -> set[str]:
    """The names in the product's calls; one with a detail stands for all of its kind."""
    found = set()
    for side in ("agent", "coordinator"):
        for path in (ROOT / side).rglob("*.py"):
            for name, detail in _CALL.findall(path.read_text()):
                found |= {n for n in NAMES if n.startswith(f"{name}.")} if detail else {name}
    return found


def test_every_name_is_a_place_and_every_place_has_a_name() -> None:
    assert called() == NAMES


def in_secure_runs() -> set[str]:
    """The names in the code of secure runs, with each step, file and event that they are about."""
    sums = ROOT / "coordinator/runs/secure"
    steps = re.findall(
        r'\.advance\(.*"(\w+)"\)', (ROOT / "agent/clientapp/secure_turns.py").read_text()
    )
    files = re.findall(r'_files\.write\("(\w+)"', (sums / "sums.py").read_text())
    details = {"agent.secure": ["begin", *steps], "secure": files}
    found = {
        f"run.{when}.{event.__name__}"
        for event, (_, transition) in TRANSITIONS.items()
        if transition.__module__ == secure_transitions.__name__
        for when in ("recording", "recorded")
    }
    paths = [*sums.glob("*.py"), *(ROOT / "agent").rglob("secure_*.py")]
    for path in (*paths, ROOT / "coordinator/storage/spool.py"):
        for name, detail in _CALL.findall(path.read_text()):
            kinds = details[name.rpartition(".")[0]] if detail else [""]
            found |= {f"{name}.{kind}".rstrip(".") for kind in kinds}
    return found - set(failpoint_names.COORDINATOR + failpoint_names.AGENT)


def test_a_test_kills_at_every_step_of_a_secure_run() -> None:
    """A new step, file or event of secure runs must be in the list, and so be killed at."""
    assert in_secure_runs() == failpoint_names.OF_SECURE_RUNS
    killed = test_secure.COORDINATOR_POINTS + test_secure.LOST_POINTS + test_secure.AGENT_POINTS
    assert set(killed) == failpoint_names.OF_SECURE_RUNS
    assert len(set(killed)) == len(killed)


def test_without_the_variable_they_are_nothing() -> None:
    assert failpoints.failpoint is failpoints._do_nothing
    assert failpoints.note is failpoints._do_nothing


@pytest.mark.parametrize("spec", ["nowhere", "work.pushed=melt", "work.pushed:x"])
def test_a_slip_in_a_spec_is_told(spec: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_failpoints(failpoint_names.check(spec))


def test_it_happens_the_nth_time_and_once() -> None:
    failpoint = parse_failpoints("work.pushed:2=error,run.recorded.RoundOpened=error")
    failpoint("work.pushed")
    with pytest.raises(OSError, match="disk is full"):
        failpoint("work.pushed")
    failpoint("work.pushed")
    failpoint("run.recorded", "RunEnded")
    with pytest.raises(OSError, match="disk is full"):
        failpoint("run.recorded", "RoundOpened")


def test_with_a_marker_it_happens_in_one_process(tmp_path: Path) -> None:
    spec = f"work.pushed=error@{tmp_path / 'done'}"
    with pytest.raises(OSError, match="disk is full"):
        parse_failpoints(spec)("work.pushed")
    parse_failpoints(spec)("work.pushed")


def test_a_killed_process_has_noted_what_it_saw_before(tmp_path: Path) -> None:
    program = (
        "from protocols.local.failpoints import failpoint, note\n"
        "note('work', run='r', round=1, kind='train')\n"
        "for step in (1, 2, 2):\n"
        "    note('step', phase='train', work=1, step=step)\n"
        "failpoint('agent.claim.sent')\n"
        "note('work', run='r', round=2, kind='train')\n"
    )
    env = os.environ | {
        VARIABLE: "agent.claim.sent",
        TRUTH: str(tmp_path / "truth"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", program], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert checker.read_truth(tmp_path / "truth") == checker.Truth([], repeated=1, steps=2)
