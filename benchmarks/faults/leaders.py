"""python -m benchmarks.faults.leaders [--seeds N…] [--points P…] [--ways W…] [--add]

The leader of two replicas is lost at every step of a round: killed, stopped, or cut off from its
database. The ledger is in a real PostgreSQL. The other replica must lead within 10 s, no update may
be lost or counted twice, and the weights must be the same as without the fault. A leader that was
stopped or cut off goes on as soon as the other one leads, and must change nothing.

Writes docs/faults/leader-results.json and the table in docs/cluster.md. Needs the extra `cluster`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks import figures
from benchmarks.faults import checker, crashes, results
from benchmarks.faults.results import Entry, Row
from benchmarks.faults.site import NO_BROKER, Site
from coordinator.storage.ledger_place import VARIABLE
from tests.extras.__main__ import python_with
from tests.support import postgres
from tests.support.fault_proxy import BLACKHOLE, CLEAR, Proxy
from tests.support.fleet_harness import (
    COORDINATOR,
    HOST,
    Program,
    closing,
    run_program,
    two_free_ports,
)
from tests.support.waiting import wait_for

OUT = Path(__file__).resolve().parents[2] / "docs" / "faults" / "leader-results.json"
LEADS_WITHIN_S = 10.0
REPLICAS = ("one", "two")
#: How the leader is lost, and what the table calls it.
WAYS = {
    "kill": "kill -9 of the leader",
    "stop": "SIGSTOP of the leader, which continues once the other one leads",
    "cut": "the leader is cut off from its database, until the run has ended",
}
_WAITS, _WAITS_AGAIN = "is led by", "waiting to lead again"


class Pair(Site):
    """Two replicas, each of which reaches the database through a proxy of its own, and agents."""

    def __init__(self, folder: Path, server: postgres.Server, proxies: Sequence[Proxy]) -> None:
        versions = folder / "mirror" / "versions"
        versions.mkdir(parents=True)
        self.ports = dict(zip(REPLICAS, two_free_ports(), strict=True))
        self.proxies = dict(zip(REPLICAS, proxies, strict=True))
        addresses = [f"{HOST}:{port}" for port in self.ports.values()]
        settings = {
            "COMMONWEIGHT_VERSIONS": versions.as_uri(),
            "COMMONWEIGHT_PUBLIC_ADDRESSES": json.dumps(addresses),
            "PGPASSWORD": postgres.PASSWORD,
        }
        super().__init__(folder, settings)
        self.options = NO_BROKER
        self._server = server
        self._undisturbed: dict[tuple[int, int], list[str]] = {}
        self.led_by("one")

    def led_by(self, name: str) -> None:
        """Commands go to this replica from now on."""
        self.leader, self.home = name, self.folder / name

    @property
    def follower(self) -> str:
        """The replica that does not lead."""
        return next(name for name in REPLICAS if name != self.leader)

    def _env(self, name: str = "coordinator") -> dict[str, str]:
        name = self.leader if name == "coordinator" else name
        env = super()._env(name)
        if name in REPLICAS:
            del env["COMMONWEIGHT_AGENT_HOME"]
            env["COMMONWEIGHT_HOME"] = str(self.folder / name)
            port = self.proxies[name].port
            env[VARIABLE] = self._server.url.replace(str(self._server.port), str(port))
        return env

    # --- replicas ---

    def start_replica(self, name: str, spec: str = "") -> Program:
        """Start a replica, with its failpoints, and do not wait."""
        self.proxies[name].fault = CLEAR
        (self.folder / name / "up.json").unlink(missing_ok=True)
        words = ("up", "--replica", "--host", HOST, "--port", str(self.ports[name]), *self.options)
        self.armed[name] = spec
        program = self._start(name, [COORDINATOR, *words], self._env(name))
        self.armed[name] = ""
        return program

    def until_waits(self, name: str, said: int = 0, words: str = _WAITS) -> None:
        """Wait until this replica says after the first `said` characters of its log that it waits
        to lead."""
        program = self.programs[name]

        def waits() -> bool:
            assert program.process.poll() is None, f"{name} ended: {program.log[said:]}"
            return words in program.log[said:]

        wait_for(waits, f"{name} waits to lead: {words}")

    def until_leads(self, name: str) -> None:
        """Wait until this replica leads; commands go to it from now on."""
        wait_for((self.folder / name / "up.json").exists, f"{name} leads", every_s=0.02)
        self.led_by(name)

    def found(self, *peers: str) -> None:
        """Make the fleet: the keys in both homes, one leader, one that waits, and agents."""
        self.start_replica("one")
        self.until_leads("one")
        keys = self.folder / "keys.backup"
        assert self.ask("admin", "backup", str(keys)).returncode == 0
        words = [COORDINATOR, "admin", "restore", str(keys), "--replica"]
        done = run_program(words, self._env("two"))
        assert done.returncode == 0, done.stderr
        self.start_replica("two")
        self.until_waits("two")
        self.enlist(*peers)

    def hand_over(self, spec: str = "") -> None:
        """Have the other replica lead, with its failpoints, and this one wait."""
        leader, follower = self.leader, self.follower
        if self.programs[follower].process.poll() is None:
            self.programs[follower].stop()
        said = len(self.programs[follower].log)
        self.start_replica(follower, spec)
        self.until_waits(follower, said)
        self.programs[leader].stop()
        said = len(self.programs[leader].log)
        self.start_replica(leader)
        self.until_leads(follower)
        self.until_waits(leader, said)

    def undisturbed(self, seed: int, rounds: int = crashes.ROUNDS) -> list[str]:
        """The versions of a run without a fault."""
        if (seed, rounds) not in self._undisturbed:
            run = self.order(seed=seed, rounds=rounds, quorum=len(crashes.PEERS))
            self._undisturbed[seed, rounds] = checker.digests(self.outcome(run))
        return self._undisturbed[seed, rounds]

    # --- the ledger ---

    def ledger_home(self) -> Path:
        """A copy of the ledger beside the shared versions, read without the product's code."""
        import psycopg

        home = self.folder / "mirror"
        with psycopg.connect(self._server.url, password=postgres.PASSWORD) as db:
            query = "SELECT seq, at, subject, body, hash FROM commonweight_log"
            rows = db.execute(query, binary=True).fetchall()
        file = home / f"{threading.get_ident()}.db"
        file.unlink(missing_ok=True)
        copy = sqlite3.connect(file)
        copy.execute("CREATE TABLE log (seq INTEGER, at REAL, subject TEXT, body BLOB, hash BLOB)")
        copy.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?)", rows)
        copy.commit()
        copy.close()
        file.replace(home / "ledger.db")
        return home


@contextmanager
def pair(folder: Path, server: postgres.Server) -> Iterator[Pair]:
    """A Pair whose processes end with the block. Its ledger is in the database's default schema."""
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(server.port)) for _ in REPLICAS]
        made = Pair(folder, server, proxies)
        stack.enter_context(closing(made))
        yield made


# --- the fault -------------------------------------------------------------------------------


@dataclass
class LostLeader(Row):
    """`went_on_s`: the longest time until the run went on."""

    went_on_s: float = 0.0

    def entry(self) -> Entry:
        figure = f"{self.worst:.1f} s; {self.went_on_s:.1f} s"
        return super().entry() | {"figure": figure, "went_on": round(self.went_on_s, 2)}

    def entry_with(self, before: Entry) -> Entry:
        both = super().entry_with(before)
        went_on = max(self.went_on_s, before["went_on"])
        figure = f"{both['worst']:.1f} s; {went_on:.1f} s"
        return both | {"figure": figure, "went_on": round(went_on, 2)}


def points(seed: int) -> list[str]:
    """Every step of a round on the coordinator; the seed selects the round."""
    return [*crashes.coordinator_points(seed), "version.uploaded"]


class Loss(NamedTuple):
    """What came of it: findings, and seconds until the other one led and the run went on."""

    found: list[str]
    led_s: float
    went_on_s: float


def lose_leader(fleet: Pair, seed: int, way: str, point: str) -> Loss:
    """Lose the leader at a failpoint; the run must not notice."""
    undisturbed = fleet.undisturbed(seed)
    fleet.hand_over(f"{point}={'kill' if way == 'kill' else 'stop'}")
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
        f"{point}: the run goes on",
        every_s=0.1,
    )
    went_on_s = time.monotonic() - lost_at
    facts = fleet.outcome(run)
    if way != "kill":
        fleet.proxies[former].fault = CLEAR
        fleet.until_waits(former, said, _WAITS_AGAIN)
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


def play(fleet: Pair, row: LostLeader, seed: int, way: str, point: str) -> None:
    """Play one case. A case that fails counts as a violation; raises what it raised."""
    try:
        loss = lose_leader(fleet, seed, way, point)
    except Exception as err:
        row.add(f"{point}, {way}", seed, [f"{type(err).__name__}: {str(err)[:300]}"])
        raise
    if loss.led_s > LEADS_WITHIN_S:
        loss.found.append(f"the other one led after {loss.led_s:.1f} s")
    row.went_on_s = max(row.went_on_s, loss.went_on_s)
    words = f"{point}, {way}, the run went on after {loss.went_on_s:.1f} s"
    row.add(words, seed, loss.found, loss.led_s)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.leaders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--points", nargs="+", default=[], help="only these failpoints")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
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
        row = LostLeader(WAYS[way], "another one leads; the run goes on")
        with (
            tempfile.TemporaryDirectory(prefix="cwf", ignore_cleanup_errors=True) as folder,
            postgres.running(programs) as server,
            contextlib.suppress(Exception),  # counted, and printed with the logs of the fleet
            pair(Path(folder), server) as fleet,
        ):
            fleet.found(*crashes.PEERS)
            for point in asked.points or points(seed):
                play(fleet, row, seed, way, point)
        results.write(asked.out, [row], {}, add=True)
        wrong += row.violations
    print("\n".join(f"VIOLATION {text}" for text in wrong))
    if asked.out == OUT:
        figures.write_tables()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
