"""Faults that other tests cover, and faults without a case."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.faults.results import Row
from tests.support.fleet_harness import ROOT

_HOSTILE, _E2E, _COORDINATOR = "tests/hostile", "tests/e2e", "tests/coordinator"

#: Row of the fault list -> (the meaning of its figure, its tests).
TESTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "11 broker killed in a run": (
        "rounds go on, the monitor hears of it",
        (
            f"{_E2E}/test_restarts.py::test_a_killed_broker_stops_no_run_and_the_monitor_hears_of_it",
        ),
    ),
    "12 broker lies or replays": (
        "state changes: 0",
        (f"{_HOSTILE}/test_rogue_publisher.py", f"{_HOSTILE}/test_replays.py"),
    ),
    "13 retained presence stale after a crash": (
        "wrong rows after the will: 0",
        (
            f"{_COORDINATOR}/test_feed.py::test_the_will_of_a_killed_agent_arrives_signed",
            f"{_COORDINATOR}/test_fleet.py",
        ),
    ),
    "18 clock ±1 h": (
        "refusals named",
        (
            f"{_COORDINATOR}/test_auth.py",
            f"{_COORDINATOR}/test_coordinator_doctor.py::test_a_clock_that_was_set_back_is_found",
            "tests/agent/setup/test_doctor.py::test_a_wrong_clock_is_a_fault",
            "tests/agent/setup/test_doctor.py::test_limits_of_the_clock_skew",
        ),
    ),
    "19–21 NaN, wrong shape, dtype or key, hostile counts": (
        "model finite, runs stopped: 0",
        (
            f"{_E2E}/test_hostile.py",
            f"{_COORDINATOR}/test_gate.py",
            f"{_HOSTILE}/test_poison.py::test_the_result_is_that_of_the_run_without_the_rogue",
        ),
    ),
    "23, 24, 25 replayed, stale or foreign update": (
        "accepted against policy: 0",
        (
            f"{_HOSTILE}/test_replays.py::test_an_update_sent_again_counts_no_second_time",
            f"{_HOSTILE}/test_replays.py::test_nobody_claims_anothers_update_or_answers_in_its_name",
            f"{_COORDINATOR}/test_run_loop.py::"
            "test_every_trick_is_refused_by_its_word_and_the_round_goes_on",
            f"{_COORDINATOR}/test_run_loop.py::"
            "test_a_straggler_is_left_behind_refused_as_late_and_asked_again",
        ),
    ),
    "26 poisoned updates": ("a peer's share is bounded", (f"{_HOSTILE}/test_poison.py",)),
    "27 huge message, lying length": ("memory bounded", (f"{_HOSTILE}/test_sizes.py",)),
    "28 zip or pickle bomb": (
        "code run: 0",
        (
            f"{_HOSTILE}/test_secrets.py::test_no_bytes_become_code",
            f"{_HOSTILE}/test_mutations.py::test_safetensors",
            f"{_HOSTILE}/test_mutations.py::test_safetensors_headers",
        ),
    ),
    "29 a newer format on disk": (
        "refused clearly, kept",
        (
            f"{_COORDINATOR}/test_ledger.py::test_a_newer_format_is_refused_and_kept",
            "tests/protocols/local/test_homes.py::test_a_newer_format_is_refused_and_kept",
        ),
    ),
    "29 version N±1": (
        "works one minor version apart, refuses beyond and names both",
        ("tests/protocols/network/test_version_check.py", f"{_E2E}/upgrade.py"),
    ),
    "30 300 slow-loris": (
        "the honest are served",
        (
            f"{_HOSTILE}/test_half_open.py::"
            "test_an_honest_agent_is_served_beside_300_half_open_connections",
        ),
    ),
    "32 slow reader": (
        "memory bounded",
        (
            f"{_HOSTILE}/test_sizes.py::test_a_slow_sender_is_shown_the_door",
            f"{_COORDINATOR}/test_feed.py::test_the_waiting_messages_are_bounded",
        ),
    ),
    "33, 34 trainer out of memory, trainer hangs": (
        "agent alive",
        (
            "tests/agent/trainer/test_process.py::test_out_of_memory_and_exit_cost_the_child_only",
            "tests/agent/trainer/test_process.py::test_hang_is_noticed_and_stop_takes_grandchildren",
        ),
    ),
    "35 key revoked in a run": (
        "out at once",
        (
            f"{_HOSTILE}/test_strangers.py::"
            "test_a_peer_removed_in_the_middle_of_a_round_is_out_at_once",
        ),
    ),
}

NOT_COVERED = {
    "5 power loss": "on a real disk: a test cannot cut the power. The simulator drops what was "
    "not synced; that SQLite and the file system keep their word is taken on trust.",
    "18 clock jump": "of a running process: there is no libfaketime. The simulator moves clocks "
    "under the pure cores; deadlines and heartbeats use the monotonic clock.",
    "35 certificate expired": "node certificates last a year and renew themselves in the last two "
    "months; a test would need another clock for the whole process.",
}


def run(folder: Path) -> list[Row]:
    """Run all tests; a failed test is a violation."""
    rows = []
    for fault, (about, tests) in TESTS.items():
        row = Row(fault, about)
        began, report = time.monotonic(), folder / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n0", f"--junitxml={report}", *tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if report.exists():
            suite = next(ElementTree.parse(report).iter("testsuite"))
            row.cases = int(suite.get("tests", "0")) - int(suite.get("skipped", "0"))
            report.unlink()
        if done.returncode != 0:
            row.violations = [line for line in done.stdout.splitlines() if "FAILED" in line] or [
                f"pytest ended with {done.returncode}"
            ]
        row.figure = "as it should be" if not row.violations else "see violations"
        row.seed = "hypothesis's own"
        print(f"  {fault}: {row.cases} tests, {time.monotonic() - began:.0f} s", flush=True)
        rows.append(row)
    return rows
