"""Predictions in real time under load: throughput, latency, and changes of the version.

    python -m benchmarks.speed.serve [--seconds 10] [--clients 1 8 32] [--keep]

A real fleet of one agent with the digits, and `commonweight-agent serve` on a core of its own.
Clients on another core request one digit after another over keep-alive connections. Then a run
continues training, so new versions are loaded during requests; no request may fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.speed import report
from tests.support.fleet_harness import AGENT, Fleet, closing
from tests.support.waiting import wait_for

ROUNDS = 6
FAILED = "failed"


class Site(Fleet):
    """Starts the service on the first core."""

    def serve(self, name: str) -> str:
        """Its address, HOST:PORT."""
        program = self._start("serve", [AGENT, "serve", "--port", "0"], self._env(name))
        os.sched_setaffinity(program.process.pid, {0})
        found = wait_for(lambda: re.search(r"http://(\S+?),", program.log), "the service is up")
        return str(found[1])


def _request(address: str) -> bytes:
    digit = ",".join(str(value) for value in np.random.default_rng(1).integers(0, 256, 784))
    names = ",".join(f"p{n}" for n in range(784))
    body = f"{names}\n{digit}\n".encode()
    head = f"POST /predict HTTP/1.1\r\nhost: {address}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _client(address: str, end: asyncio.Event, told: list[tuple[float, str]]) -> None:
    """Send requests until the end; return seconds, and version or error, of each one."""
    host, _, port = address.partition(":")
    request = _request(address)
    reader, writer = await asyncio.open_connection(host, int(port))
    while not end.is_set():
        began = time.monotonic()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        assert length is not None
        body = json.loads(await reader.readexactly(int(length[1])))
        is_good = head.startswith(b"HTTP/1.1 200") and len(body["answers"]["class"]) == 1
        if not is_good:
            sys.stderr.write(f"{body}\n")
        told.append((time.monotonic() - began, body["version"] if is_good else FAILED))
    writer.close()


async def _load(address: str, clients: int, wait: Callable[[], object]) -> dict[str, Any]:
    """Send requests while `wait` runs."""
    told: list[tuple[float, str]] = []
    began, end = time.monotonic(), asyncio.Event()

    async def finish() -> None:
        try:
            await asyncio.to_thread(wait)
        finally:
            end.set()

    *results, _ = await asyncio.gather(
        *(_client(address, end, told) for _ in range(clients)), finish(), return_exceptions=True
    )
    for result in results:
        if isinstance(result, BaseException):
            sys.stderr.write(f"a client ended: {result!r}\n")
    took = np.array([one for one, _ in told] or [0.0]) * 1000
    versions = dict.fromkeys(version for _, version in told)
    return {
        "clients": clients,
        "requests_per_s": round(len(told) / (time.monotonic() - began)),
        "p50_ms": round(float(np.percentile(took, 50)), 2),
        "p99_ms": round(float(np.percentile(took, 99)), 2),
        "failed": sum(version == FAILED for _, version in told)
        + sum(isinstance(result, BaseException) for result in results),
        "versions": len(versions.keys() - {FAILED}),
    }


def measure(folder: Path, seconds: float, clients: list[int]) -> Iterator[dict[str, Any]]:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    fleet = Site(folder, {"COMMONWEIGHT_AGENT_THREADS": "1", "OMP_NUM_THREADS": "1"})
    with closing(fleet):
        fleet.up()
        fleet.join("ada")
        fleet.start("ada")
        fleet.ended_run(fleet.start_run("mnist", "--rounds", "1"))
        address = fleet.serve("ada")
        asyncio.run(_load(address, 1, lambda: time.sleep(1)))  # warm-up
        for count in clients:
            yield asyncio.run(_load(address, count, lambda: time.sleep(seconds)))
        run = fleet.start_run("mnist", "--rounds", str(ROUNDS), "--set", "epochs=10")
        swapped = asyncio.run(_load(address, max(clients), lambda: fleet.ended_run(run)))
        health = httpx.get(f"http://{address}/healthz").json()
        yield {"while a run trains": swapped, "swaps": health["swaps"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.serve", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="commonweight-") as folder:
        for line in measure(Path(folder), options.seconds, options.clients):
            found.append(line)
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    if options.keep:
        report.keep("serve", {"rows": found})


if __name__ == "__main__":
    main()
