"""What the leader sends, with 0, 1 and 2 replicas that wait and send versions in its place.

    python -m benchmarks.speed.downloads [--agents 32] [--megabytes 40]

A leader and two replicas are processes over one PostgreSQL and one folder. The agents are
threads of this process: each downloads a version to the disk and checks it, with the agent's own
code. Needs the extra `cluster`. Prints a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import ssl
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import psutil

from agent.home.credentials import Credentials
from agent.transport.weight_transfer import WeightTransfer
from coordinator.storage.ledger_place import VARIABLE
from protocols import VERSION
from protocols.enrollment import tickets
from protocols.enrollment.joining import JOIN_PATH, JoinResponse
from tests.extras.__main__ import python_with
from tests.support import postgres
from tests.support.fleet_harness import COORDINATOR, HOST, Fleet, closing, free_port, run_program
from tests.support.https_site import Machine
from tests.support.waiting import wait_for

REPLICAS = ("two", "three")


class Replicas(Fleet):
    """A leader, whose home is `home`, and replicas that wait."""

    def __init__(self, folder: Path, server: postgres.Server) -> None:
        self.ports = {name: free_port() for name in REPLICAS}
        self.places = [f"{HOST}:{port}" for port in self.ports.values()]
        (folder / "versions").mkdir()
        settings = {
            VARIABLE: server.url,
            "PGPASSWORD": postgres.PASSWORD,
            "COMMONWEIGHT_VERSIONS": (folder / "versions").as_uri(),
            "COMMONWEIGHT_DOWNLOAD_ADDRESSES": json.dumps(self.places),
            "COMMONWEIGHT_METRICS_PORT": str(free_port()),
            "COMMONWEIGHT_HOST": HOST,
        }
        super().__init__(folder, settings)

    def _env(self, name: str = "coordinator") -> dict[str, str]:
        env = super()._env(name)
        if name in REPLICAS:
            env["COMMONWEIGHT_HOME"] = env.pop("COMMONWEIGHT_AGENT_HOME")
            env["COMMONWEIGHT_DOWNLOAD_PORT"] = str(self.ports[name])
            env["COMMONWEIGHT_PORT"] = str(free_port())
        return env

    def found(self) -> None:
        """Start the leader, then the replicas, with its keys."""
        self.up()
        keys = str(self.folder / "keys.backup")
        assert self.ask("admin", "backup", keys).returncode == 0
        for name in REPLICAS:
            done = run_program(
                [COORDINATOR, "admin", "restore", keys, "--replica"], self._env(name)
            )
            assert done.returncode == 0, done.stderr
            self._start(name, [COORDINATOR, "up", "--replica"], self._env(name))
        for name in REPLICAS:
            program = self.programs[name]
            wait_for(lambda program=program: "sending versions" in program.log, f"{name} waits")

    def versions(self, count: int, megabytes: int) -> list[Path]:
        """So many versions of one run, in the shared folder."""
        self.join("maker")
        self.start("maker")
        size = ("--set", f"kilobytes={round(megabytes * 1e6 / 1024)}")
        self.ended_run(self.start_run("ping", *size, "--rounds", str(count), "--quorum", "1"))
        self.programs["maker"].stop()
        found = sorted((self.folder / "versions").rglob("*.safetensors"), key=_modified)
        return [one for one in found if one.stat().st_size > megabytes * 9e5][-count:]


class Used(NamedTuple):
    """CPU (s) and bytes sent of the leader, and CPU of the replicas together."""

    leader_s: float
    sent: float
    replicas_s: float


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def measured(agents: int, megabytes: int, folder: Path, server: postgres.Server) -> list[str]:
    fleet = Replicas(folder, server)
    with closing(fleet):
        fleet.found()
        links = _enrolled(fleet, agents)
        rows = []
        for count, version in enumerate(fleet.versions(len(REPLICAS) + 1, megabytes)):
            time.sleep(2.0)  # the replicas read the ledger each second
            for link in links:
                link.replicas.use(fleet.places[:count])
            before, began = _used(fleet), time.monotonic()
            _all_download(links, version, folder)
            took, after = time.monotonic() - began, _used(fleet)
            used = Used(*(a - b for a, b in zip(after, before, strict=True)))
            rows.append(
                f"| {count} | {used.sent / 1e6:,.0f} MB | {used.leader_s:.1f} s "
                f"| {used.replicas_s:.1f} s | {took:.1f} s |"
            )
            print(rows[-1], flush=True)
        return rows


def _enrolled(fleet: Replicas, agents: int) -> list[WeightTransfer]:
    ca_pem = (fleet.home / "ca.pem").read_bytes()
    address = str(json.loads((fleet.home / "up.json").read_bytes())["address"])
    ticket = tickets.decode(fleet.ticket(agents))
    found = []
    with httpx.Client(verify=ssl.create_default_context(cadata=ca_pem.decode())) as http:
        for number in range(agents):
            machine = Machine(f"load{number}")
            body = msgspec.json.encode(machine.joining(ticket, version=VERSION))
            answer = http.post(f"https://{address}{JOIN_PATH}", content=body)
            told = msgspec.json.decode(answer.content, type=JoinResponse)
            keys = machine.node_key, machine.sign_key
            found.append(
                WeightTransfer(Credentials(address, ca_pem, machine.peer, *keys, told.fleet))
            )
    return found


def _all_download(links: Sequence[WeightTransfer], version: Path, folder: Path) -> None:
    digest, nbytes = version.stem, version.stat().st_size

    def download(numbered: tuple[int, WeightTransfer]) -> None:
        number, link = numbered
        target = folder / f"taken-{number}"
        link.download(digest, nbytes, target)
        target.unlink()

    with ThreadPoolExecutor(len(links)) as pool:
        list(pool.map(download, enumerate(links)))


def _used(fleet: Replicas) -> Used:
    def cpu(name: str) -> float:
        return sum(psutil.Process(fleet.programs[name].process.pid).cpu_times()[:2])

    url = f"http://{HOST}:{fleet._settings['COMMONWEIGHT_METRICS_PORT']}/metrics"
    (sent,) = re.findall(r'run_bytes_total{direction="down"} (\S+)', httpx.get(url).text)
    return Used(cpu("up"), float(sent), sum(map(cpu, REPLICAS)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.downloads")
    parser.add_argument("--agents", type=int, default=32)
    parser.add_argument("--megabytes", type=int, default=40)
    asked = parser.parse_args()
    if importlib.util.find_spec("psycopg") is None:
        python = str(python_with("cluster"))
        os.execv(python, [python, "-m", "benchmarks.speed.downloads", *sys.argv[1:]])
    programs = postgres.programs()
    assert programs is not None, "PostgreSQL is not on this machine (make cluster-setup)"
    print(
        "| replicas that send | the leader sends | its CPU | CPU of replicas | until all have it |"
    )
    with tempfile.TemporaryDirectory(prefix="cwd") as folder, postgres.running(programs) as server:
        measured(asked.agents, asked.megabytes, Path(folder), server)
    return 0


if __name__ == "__main__":
    sys.exit(main())
