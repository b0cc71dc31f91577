"""Fetching a version piece by piece: from several peers at once, and from the coordinator.

Each piece is checked against the coordinator's list when it comes, so a holder that sends wrong
bytes, endless bytes or none costs time only: it is left out, told of, and the others go on. With no
holder left the coordinator sends the rest. Blocking; one thread a holder.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.shelf import Book, Shelf
from protocols import identity, sharing
from protocols.errors import BadWeights, Refused
from protocols.sharing import Held, Holder, Plan, host_of

log = logging.getLogger("commonweight.share")

_CONNECT_S = 3.0
#: For one piece, whole: a slower holder is no help.
_PIECE_S = 8.0
_LOOK_S = 0.2
#: So often a holder may say that it has not got a piece itself yet.
_PATIENCE = 3
#: How often the coordinator is asked for other holders before it has to send the rest itself.
_PLANS = 4

#: `sign(method, path)`: the headers of a request in this agent's name.
SignRequest = Callable[[str, str], dict[str, str]]


class _NotYet(Exception):
    """The holder waits for the piece itself."""


class Parts:
    """A version's file while its pieces come, in any order and from several threads.

    What an earlier try has left in the file is checked and kept.
    """

    def __init__(self, path: Path, plan: Plan, book: Book) -> None:
        self._plan, self._book = plan, book
        self._lock = threading.Lock()
        self._file_lock = threading.Lock()
        total = sharing.count(plan.nbytes, plan.piece_bytes)
        self._wanted = set(range(total))  # neither here nor asked of anybody
        self._missing = set(range(total))
        self._file = path.open("r+b", buffering=0)
        for piece in range(total):
            data = self._file.read(plan.piece_bytes)
            if self._is_right(piece, data):
                self._have(piece)
        self._file.truncate(plan.nbytes)

    @property
    def complete(self) -> bool:
        return not self._missing

    def take(self) -> int | None:
        """The first piece that is not here yet and that nobody else is fetching."""
        with self._lock:
            if not self._wanted:
                return None
            piece = min(self._wanted)
            self._wanted.discard(piece)
            return piece

    def give_back(self, piece: int) -> None:
        """A piece that was taken does not come."""
        with self._lock:
            if piece in self._missing:
                self._wanted.add(piece)

    def span(self, piece: int) -> tuple[int, int]:
        """Bytes `start` to `stop` of a piece."""
        size = self._plan.piece_bytes
        return piece * size, min((piece + 1) * size, self._plan.nbytes)

    def put(self, piece: int, data: bytes) -> bool:
        """Keep a piece; False if these are not its bytes."""
        if not self._is_right(piece, data):
            return False
        with self._file_lock:
            self._file.seek(piece * self._plan.piece_bytes)
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        self._have(piece)
        return True

    def _is_right(self, piece: int, data: bytes) -> bool:
        expected = self._plan.pieces[32 * piece : 32 * piece + 32]
        return hashlib.sha256(data).digest() == expected

    def _have(self, piece: int) -> None:
        with self._lock:
            self._wanted.discard(piece)
            self._missing.discard(piece)
        self._book.add(piece)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """What is missing, as pieces `first` to `end` in a row."""
        missing = sorted(self._missing)
        while missing:
            first = end = missing[0]
            while missing and missing[0] == end:
                end += 1
                missing.pop(0)
            yield first, end

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Pinned(http.client.HTTPSConnection):
    """A TLS connection to whoever holds this node key, and to nobody else."""

    def __init__(self, holder: Holder) -> None:
        port = int(holder.address.rpartition(":")[2])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The key decides, not a name that a CA vouches for; it is looked at before we say a word.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        super().__init__(host_of(holder.address), port, timeout=_CONNECT_S, context=context)
        self._expected = holder.node_public
        self.due = float("inf")

    def end_if_overdue(self, now: float) -> None:
        """Break the connection off, from another thread, if what is under way takes too long.

        A time-out of the socket alone never ends a holder that sends a byte now and then.
        """
        if now > self.due and (sock := self.sock) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        super().connect()
        shown = self.sock.getpeercert(binary_form=True)
        if shown is None or not identity.is_of_key(shown, self._expected):
            self.close()
            raise Refused("somebody else answers at a holder's address")


def fetch(
    digest: str,
    nbytes: int,
    part: Path,
    *,
    shelf: Shelf,
    ask: Callable[[tuple[str, ...]], Plan],
    stream: Callable[[str, int, int], Iterator[bytes]],
    sign: SignRequest,
) -> Held:
    """Bring the version into `part`; who helped, and who failed.

    `ask(faulty)` gets a plan from the coordinator, `stream(digest, start, stop)` those bytes.
    Raises BadMessage, BadWeights, OSError and what these two raise; what has come stays in `part`.
    """
    faulty: set[str] = set()
    rates: dict[str, float] = {}
    plan = ask(())
    sharing.check_plan(plan, digest, nbytes)
    part.touch(mode=0o600)
    book = shelf.begin(digest, part, nbytes)
    parts = Parts(part, plan, book)
    try:
        for _ in range(_PLANS):
            if parts.complete or not plan.holders:
                break
            before = len(faulty)
            _from_holders(parts, plan, sign, faulty, rates)
            if parts.complete or len(faulty) == before:
                break
            plan = ask(tuple(faulty))
            sharing.check_plan(plan, digest, nbytes)
        for first, end in parts.gaps():
            _from_coordinator(parts, digest, first, end, stream)
        parts.sync()
    except BaseException:
        shelf.drop(digest)
        raise
    finally:
        parts.close()
    return Held(rates=rates, faulty=tuple(sorted(faulty)))


def _from_holders(
    parts: Parts, plan: Plan, sign: SignRequest, faulty: set[str], rates: dict[str, float]
) -> None:
    """Until all is here, or no holder of the plan gives any more."""

    def work(holder: Holder, connection: _Pinned) -> None:
        began, got, patience = time.monotonic(), 0, _PATIENCE
        try:
            while patience and (piece := parts.take()) is not None:
                try:
                    data = _piece(connection, plan, sign, *parts.span(piece))
                    if not parts.put(piece, data):
                        raise BadWeights("wrong bytes")
                except _NotYet:
                    parts.give_back(piece)
                    patience -= 1
                    continue
                except BaseException:
                    parts.give_back(piece)
                    raise
                got, patience = got + len(data), _PATIENCE
        except (OSError, http.client.HTTPException, Refused, BadWeights) as err:
            faulty.add(holder.peer)
            log.info("peer %s is no help with %s: %s", holder.peer, plan.digest[:12], err)
        finally:
            connection.close()
            if got:
                rates[holder.peer] = got / max(time.monotonic() - began, 1e-3)

    connections = [_Pinned(holder) for holder in plan.holders]
    threads = [
        threading.Thread(target=work, args=pair, name=f"holder {pair[0].peer}", daemon=True)
        for pair in zip(plan.holders, connections, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(_LOOK_S)
            for connection in connections:
                connection.end_if_overdue(time.monotonic())


def _piece(connection: _Pinned, plan: Plan, sign: SignRequest, start: int, stop: int) -> bytes:
    """One piece from a holder, in time or not at all."""
    path = f"/cw/v1/weights/{plan.digest}"
    connection.due = time.monotonic() + _PIECE_S
    headers = sign("GET", path)
    headers[sharing.PERMIT] = b64encode(plan.permit).decode()
    headers["range"] = f"bytes={start}-{stop - 1}"
    connection.request("GET", path, headers=headers)
    connection.sock.settimeout(_PIECE_S)
    answer = connection.getresponse()
    if answer.status == 503:
        connection.close()
        connection.due = float("inf")
        raise _NotYet
    if answer.status != 206:
        raise Refused(f"it answers {answer.status}")
    if answer.length != stop - start:
        raise Refused("it sends another number of bytes than it was asked for")
    data = bytearray()
    while len(data) < stop - start:
        got = answer.read1(stop - start - len(data))
        if not got:
            raise ConnectionError("it broke off")
        data += got
    answer.read()  # nothing is left; only so the connection can be used again
    connection.due = float("inf")
    return bytes(data)


def _from_coordinator(
    parts: Parts,
    digest: str,
    first: int,
    end: int,
    stream: Callable[[str, int, int], Iterator[bytes]],
) -> None:
    """Pieces `first` to `end` in one request, each passed on as soon as it is whole."""
    piece, waiting = first, bytearray()
    start, stop = parts.span(first)[0], parts.span(end - 1)[1]
    for data in stream(digest, start, stop):
        waiting += data
        while piece < end and len(waiting) >= (size := _size(parts, piece)):
            if not parts.put(piece, bytes(waiting[:size])):
                raise BadWeights("the coordinator's bytes are not those of its own list")
            del waiting[:size]
            piece += 1
    if piece < end:
        raise ConnectionError("the coordinator broke off")


def _size(parts: Parts, piece: int) -> int:
    start, stop = parts.span(piece)
    return stop - start
