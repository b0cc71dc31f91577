"""The physical floor: the time that network, hashes, memory and disk alone need for one round.

    wire    the model over TLS to all agents at once, and an update of the same size back from each:
            plain sockets, one thread per connection here, one process per agent there
    hash    SHA-256 of the data that each agent receives (in a process) and of all updates (a thread
            each), once per direction
    mean    the float64 weighted mean of the updates in memory
    disk    one version written, flushed and renamed

These steps follow each other in a round, so the floor is their sum; overlapping steps could be
faster.

python -m benchmarks.speed.floor PORT BYTES CA     the agent's side of the connection
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.speed.cases import Case
from protocols.enrollment import certificates, identity
from protocols.local.atomic_files import write_private
from tests.support.fleet_harness import HOST, ROOT

_PIECE = 1 << 20
#: Larger models are represented by a sample that fits into any machine.
_IN_MEMORY = 256 * 1024 * 1024


class Floor(NamedTuple):
    """Seconds for each part of one round."""

    wire_s: float
    hash_s: float
    mean_s: float
    disk_s: float

    @property
    def total_s(self) -> float:
        return sum(self)


def measure(case: Case, folder: Path, rounds: int) -> Floor:
    """The median of `rounds` measurements of each part."""
    down_s, up_s, hash_s = _wire_and_hash(case, folder, rounds)
    return Floor(
        wire_s=statistics.median(map(sum, zip(down_s, up_s, strict=True))),
        hash_s=statistics.median(hash_s) + _hash_here(case, rounds),
        mean_s=_median(lambda: _mean(case), rounds),
        disk_s=_disk(case, folder, rounds),
    )


def _wire_and_hash(
    case: Case, folder: Path, rounds: int
) -> tuple[list[float], list[float], list[float]]:
    ca_key, ca_pem = certificates.new_ca("floor")
    key, pem = certificates.new_server_certificate(ca_key, ca_pem, [HOST])
    write_private(folder / "server.key", identity.private_pem(key))
    (folder / "server.pem").write_bytes(pem)
    (folder / "ca.pem").write_bytes(ca_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with socket.create_server((HOST, 0), backlog=case.agents) as listener:
        words = [str(listener.getsockname()[1]), str(case.model_bytes), str(folder / "ca.pem")]
        ends = [
            subprocess.Popen([sys.executable, "-m", "benchmarks.speed.floor", *words], cwd=ROOT)
            for _ in range(case.agents)
        ]
        try:
            links = []
            for _ in ends:
                plain, _ = listener.accept()
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                links.append(context.wrap_socket(plain, server_side=True))
            found = [_one_round(links, case.model_bytes) for _ in range(rounds)]
            for link in links:
                link.close()
        finally:
            for end in ends:
                end.terminate()
                end.wait()
    return [f[0] for f in found], [f[1] for f in found], [f[2] for f in found]


def _one_round(links: list[ssl.SSLSocket], nbytes: int) -> tuple[float, float, float]:
    """Seconds down, up, and for the agents' hashing."""
    piece = os.urandom(min(_PIECE, nbytes))

    def down(link: ssl.SSLSocket) -> None:
        _send(link, piece, nbytes)
        _receive(link, 1)  # the other side has received everything

    def hashed(link: ssl.SSLSocket) -> None:
        link.sendall(b"h")
        _receive(link, 1)

    def up(link: ssl.SSLSocket) -> None:
        link.sendall(b"u")
        _receive(link, nbytes)

    return _at_once(down, links), _at_once(up, links), _at_once(hashed, links)


def _at_once(work: Callable[[ssl.SSLSocket], None], links: list[ssl.SSLSocket]) -> float:
    threads = [threading.Thread(target=work, args=(link,)) for link in links]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def _send(link: ssl.SSLSocket, piece: bytes, nbytes: int) -> None:
    view = memoryview(piece)
    while nbytes > 0:
        part = view[: min(nbytes, len(view))]
        link.sendall(part)
        nbytes -= len(part)


def _receive(link: ssl.SSLSocket, nbytes: int) -> None:
    buffer = memoryview(bytearray(min(_PIECE, nbytes)))
    while nbytes > 0:
        got = link.recv_into(buffer[: min(nbytes, len(buffer))])
        if not got:
            raise ConnectionError("the other end of the floor's wire has closed")
        nbytes -= got


def _hash_here(case: Case, rounds: int) -> float:
    """Seconds for the SHA-256 of all updates, one thread each."""

    def work() -> None:
        threads = [
            threading.Thread(target=_hash, args=(case.model_bytes,)) for _ in range(case.agents)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return _median(work, rounds)


def _hash(nbytes: int) -> None:
    piece, sha = memoryview(bytes(min(_PIECE, nbytes))), hashlib.sha256()
    while nbytes > 0:
        part = piece[: min(nbytes, len(piece))]
        sha.update(part)
        nbytes -= len(part)


def _mean(case: Case) -> float:
    """Seconds for the mean of the updates, 1 MB at a time; extrapolated for large models."""
    held = min(case.model_bytes, max(_IN_MEMORY // case.agents, _PIECE))
    updates = [np.ones(held // 4, np.float32) for _ in range(case.agents)]
    result = np.empty(held // 4, np.float32)
    weight, step = 1.0 / case.agents, _PIECE // 4
    total, term = np.empty(step), np.empty(step)
    began = time.perf_counter()
    for start in range(0, held // 4, step):
        stop = min(start + step, held // 4)
        into, part = total[: stop - start], term[: stop - start]
        np.multiply(updates[0][start:stop], weight, out=into, dtype=np.float64)
        for update in updates[1:]:
            np.multiply(update[start:stop], weight, out=part, dtype=np.float64)
            into += part
        result[start:stop] = into
    return (time.perf_counter() - began) * case.model_bytes / held


def _disk(case: Case, folder: Path, rounds: int) -> float:
    piece = os.urandom(_PIECE)

    def work() -> None:
        left = case.model_bytes
        temporary = folder / "version.new"
        with temporary.open("wb", buffering=0) as file:
            while left > 0:
                left -= file.write(piece[: min(left, _PIECE)])
            os.fsync(file.fileno())
        temporary.replace(folder / "version")
        if os.name == "posix":
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    return _median(work, rounds)


def _median(work: Callable[[], float | None], rounds: int) -> float:
    """The median of the results of `work`, or of its duration."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        told = work()
        found.append(told if told is not None else time.perf_counter() - began)
    return statistics.median(found)


def agent_end(port: int, nbytes: int, ca: str) -> None:
    """An agent: receives a model, confirms it, hashes or sends one on request, until the close."""
    context = ssl.create_default_context(cafile=ca)
    plain = socket.create_connection((HOST, port))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    piece = os.urandom(min(_PIECE, nbytes))
    with context.wrap_socket(plain, server_hostname=HOST) as link:
        while True:
            _receive(link, nbytes)
            link.sendall(b"d")
            _receive(link, 1)
            _send(link, piece, nbytes)
            _receive(link, 1)
            _hash(nbytes)
            link.sendall(b"h")


if __name__ == "__main__":
    try:
        agent_end(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except (ConnectionError, ssl.SSLError):
        sys.exit(0)
