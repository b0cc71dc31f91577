"""python -m benchmarks.faults.leaders [--seeds N…] [--points P…] [--ways W…] [--rest S] [--add]

The leader of two replicas is lost at every step of a round: killed, stopped, or cut off from its
database. The ledger is in a real PostgreSQL. The other replica must lead within 10 s, no update may
be lost or counted twice, and the weights must be the same as without the fault. A leader that comes
back must change nothing.

An agent that has lost its coordinator many times in a row waits longer, so the time until the run
continues counts only with --rest.

Writes docs/faults/leader-results.json and the table in docs/cluster.md. Needs the extra `cluster`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks import figures
from benchmarks.faults import checker, crashes, results
from benchmarks.faults.replicas import WAITS_AGAIN, Pair, pair
from benchmarks.faults.results import Row
from tests.extras.__main__ import python_with
from tests.support import postgres
from tests.support.fault_proxy import BLACKHOLE, CLEAR
from tests.support.waiting import wait_for

OUT = Path(__file__).resolve().parents[2] / "docs" / "faults" / "leader-results.json"
LEADS_WITHIN_S = 10.0
#: How the leader is lost, and what the table calls it.
WAYS = {
    "kill": "kill -9 of the leader",
    "stop": "SIGSTOP of the leader, which continues once the other one leads",
    "hang": "SIGSTOP of the leader, until the run has ended",
    "cut": "the leader is cut off from its database, until the run has ended",
}


class Loss(NamedTuple):
    """What came of it: findings, and seconds until the other one led and the run went on."""

    found: list[str]
    led_s: float
    went_on_s: float


def lose_leader(fleet: Pair, seed: int, way: str, point: str) -> Loss:
    """Lose the leader at a failpoint; the run must not notice."""
    undisturbed = fleet.undisturbed(seed)
    fleet.arm(f"{point}={'kill' if way == 'kill' else 'stop'}")
    former, successor = fleet.leader, fleet.follower
    process = psutil.Process(fleet.programs[former].process.pid)
    run = _ordered(fleet, seed)
    is_lost = _is_dead if way == "kill" else _is_stopped
    wait_for(lambda: is_lost(process), f"{former} is lost at {point}", every_s=0.02)
    lost_at = time.monotonic()
    said = len(fleet.programs[former].log)
    if way == "cut":
        fleet.proxies[former].fault = BLACKHOLE
        process.send_signal(signal.SIGCONT)
    fleet.until_leads(successor)
    led_s = time.monotonic() - lost_at
    lines = len(checker.read_ledger(fleet.ledger_home()))
    if way == "stop":
        process.send_signal(signal.SIGCONT)
    wait_for(
        lambda: fleet.ended(run) or len(checker.read_ledger(fleet.ledger_home())) > lines,
        f"{point}: the run continues",
        every_s=0.1,
    )
    went_on_s = time.monotonic() - lost_at
    facts = fleet.outcome(run)
    if way == "hang":
        process.send_signal(signal.SIGCONT)
    if way != "kill":
        fleet.proxies[former].fault = CLEAR
        fleet.until_waits(former, said, WAITS_AGAIN)
    found = fleet.violations(crashes.PEERS)
    if checker.digests(facts) != undisturbed:
        found.append(f"{run} has other weights than without the fault")
    return Loss(found, led_s, went_on_s)


def _ordered(fleet: Pair, seed: int) -> str:
    """Start a run at a leader that may not answer; return its id from the ledger."""
    known = checker.run_names(fleet.ledger_home())

    def order() -> None:
        # A leader that is lost does not answer, and its successor may have ended the run.
        try:
            fleet.order(seed=seed, rounds=crashes.ROUNDS, quorum=len(crashes.PEERS))
        except AssertionError:
            return

    threading.Thread(target=order, daemon=True).start()
    new: set[str] = set()

    def is_begun() -> bool:
        new.update(checker.run_names(fleet.ledger_home()) - known)
        return bool(new)

    wait_for(is_begun, "the ledger has the run")
    (run,) = new
    return run


def _is_dead(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _is_stopped(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_STOPPED)


def play(fleet: Pair, rows: Sequence[Row], seed: int, way: str, point: str) -> None:
    """Play one case: the first row is about the other replica, a second one about the run."""
    loss = lose_leader(fleet, seed, way, point)
    if loss.led_s > LEADS_WITHIN_S:
        loss.found.append(f"the other one led after {loss.led_s:.1f} s")
    case = f"{point}, {way}, the run went on after {loss.went_on_s:.1f} s"
    for row, seconds in zip(rows, (loss.led_s, loss.went_on_s), strict=False):
        row.add(case, seed, loss.found, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.leaders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--points", nargs="+", default=[], help="only these failpoints")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--rest", type=float, default=0.0, help="seconds before each case, to time the run as well"
    )
    parser.add_argument("--add", action="store_true", help="to the cases that the results hold")
    parser.add_argument("--out", type=Path, default=OUT, help="where the results go")
    asked = parser.parse_args()
    if importlib.util.find_spec("psycopg") is None:
        python = str(python_with("cluster"))
        os.execv(python, [python, "-m", "benchmarks.faults.leaders", *sys.argv[1:]])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    programs = postgres.programs()
    assert programs is not None, "PostgreSQL is not on this machine (make cluster-setup)"
    if asked.out.exists() and not asked.add:
        asked.out.unlink()
    wrong: list[str] = []
    for seed, way in itertools.product(asked.seeds, asked.ways):
        rows = [Row(WAYS[way], "until the other one leads", figure="{worst:.1f} s")]
        if asked.rest:
            words = f"{WAYS[way]}, after {asked.rest:g} s without a fault"
            rows.append(Row(words, "until the run continues", figure="{worst:.1f} s"))
        point = "the start"
        with (
            tempfile.TemporaryDirectory(prefix="cwf", ignore_cleanup_errors=True) as folder,
            postgres.running(programs) as server,
        ):
            try:
                with pair(Path(folder), server) as fleet:
                    fleet.found(*crashes.PEERS)
                    fleet.rest_s = asked.rest
                    for point in asked.points or crashes.coordinator_points(seed):
                        play(fleet, rows, seed, way, point)
            except Exception as err:  # counts as a violation and ends this fleet
                failed = f"{type(err).__name__}: {str(err)[:300]}"
                rows[0].add(f"{point}, {way}", seed, [failed])
        results.write(asked.out, rows, {}, add=True)
        wrong += rows[0].violations
    print("\n".join(f"VIOLATION {text}" for text in wrong))
    if asked.out == OUT:
        figures.write_tables()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
