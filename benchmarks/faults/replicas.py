"""Two replicas over one ledger in a real PostgreSQL, and the agents of their fleet."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.faults import checker, crashes
from benchmarks.faults.site import NO_BROKER, Site
from coordinator.storage.ledger_place import VARIABLE
from tests.support import postgres
from tests.support.fault_proxy import CLEAR, Proxy
from tests.support.fleet_harness import (
    COORDINATOR,
    HOST,
    Program,
    closing,
    run_program,
    two_free_ports,
)
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from psycopg import Connection

REPLICAS = ("one", "two")
#: What a replica logs when it waits, and when it waits after it has led.
WAITS, WAITS_AGAIN = "is led by", "waiting to lead again"


class Pair(Site):
    """Two replicas, each of which reaches the database through a proxy of its own, and agents."""

    def __init__(self, folder: Path, server: postgres.Server, proxies: Sequence[Proxy]) -> None:
        versions = folder / "mirror" / "versions"
        versions.mkdir(parents=True)
        self.ports = dict(zip(REPLICAS, two_free_ports(), strict=True))
        #: Where the one that waits sends versions.
        self.download_ports = dict(zip(REPLICAS, two_free_ports(), strict=True))
        self.proxies = dict(zip(REPLICAS, proxies, strict=True))
        addresses = [f"{HOST}:{port}" for port in self.ports.values()]
        downloads = [f"{HOST}:{port}" for port in self.download_ports.values()]
        settings = {
            "COMMONWEIGHT_VERSIONS": versions.as_uri(),
            "COMMONWEIGHT_PUBLIC_ADDRESSES": json.dumps(addresses),
            "COMMONWEIGHT_DOWNLOAD_ADDRESSES": json.dumps(downloads),
            "PGPASSWORD": postgres.PASSWORD,
            "COMMONWEIGHT_AGENT_COMPARE": "off",  # training after each run
        }
        super().__init__(folder, settings)
        self.options = NO_BROKER
        #: Before each fault: agents that lose their coordinator often wait longer.
        self.rest_s = 0.0
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
            env["COMMONWEIGHT_DOWNLOAD_PORT"] = str(self.download_ports[name])
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

    def until_waits(self, name: str, said: int = 0, words: str = WAITS) -> None:
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

    def hand_over(self) -> None:
        """Stop the leader, and start it again once the other replica leads."""
        leader = self.leader
        self.programs[leader].stop()
        said = len(self.programs[leader].log)
        self.until_leads(self.follower)
        self.start_replica(leader)
        self.until_waits(leader, said)

    def arm(self, spec: str) -> None:
        """Have the other replica lead, with these failpoints, and this one wait."""
        leader, follower = self.leader, self.follower
        if self.programs[follower].process.poll() is None:
            self.programs[follower].stop()
        said = len(self.programs[follower].log)
        self.start_replica(follower, spec)
        self.until_waits(follower, said)
        said = len(self.programs[leader].log)
        # Quicker than to end and start it. It stands still, so that it does not lead again first.
        self.programs[leader].process.send_signal(signal.SIGSTOP)
        with self._database() as db:
            db.execute("UPDATE commonweight_fleet SET holder = '', expires = clock_timestamp()")
        self.until_leads(follower)
        self.programs[leader].process.send_signal(signal.SIGCONT)
        self.until_waits(leader, said)
        time.sleep(self.rest_s)

    def undisturbed(self, seed: int, rounds: int = crashes.ROUNDS) -> list[str]:
        """The versions of a run without a fault."""
        if (seed, rounds) not in self._undisturbed:
            run = self.order(seed=seed, rounds=rounds, quorum=len(crashes.PEERS))
            self._undisturbed[seed, rounds] = checker.digests(self.outcome(run))
        return self._undisturbed[seed, rounds]

    # --- the ledger ---

    def ledger_home(self) -> Path:
        """A copy of the ledger beside the shared versions, read without the product's code."""
        home = self.folder / "mirror"
        with self._database() as db:
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

    def _database(self) -> Connection[Any]:
        import psycopg

        return psycopg.connect(self._server.url, password=postgres.PASSWORD)


@contextmanager
def pair(folder: Path, server: postgres.Server) -> Iterator[Pair]:
    """A Pair whose processes end with the block. Its ledger is in the database's default schema."""
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(server.port)) for _ in REPLICAS]
        made = Pair(folder, server, proxies)
        stack.enter_context(closing(made))
        yield made
