"""The requests of a trainer in the sandbox to its helper (`agent.trainer.helper`).

The helper has the record of rows, and reads a table that needs a connection. It does only what
these requests say, so a task cannot remove or change what was recorded, and has no network.
Processes outside the sandbox have no helper and open files and tables directly.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NoReturn

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from agent.data.disclosed_sets import Numbers, ToldSet, Use
from protocols.errors import CommonweightError, DataError, HomeError, NotAllowed

Mask = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]


class RegistryState(Struct, frozen=True, tag=True):
    """The key of the hashes (`arrays[0]`) and the columns of the last table (`texts`)."""


class KnownTable(Struct, frozen=True, tag=True):
    """The numbers of a table's rows; none if it is not known."""

    fingerprint: str


class Register(Struct, frozen=True, tag=True):
    """The numbers of rows by their hashes, uint64[n]."""

    fingerprint: str
    full: bytes
    narrow: bytes | None
    names: tuple[str, ...]


class Admit(Struct, frozen=True, tag=True):
    """Which of these rows, int64[n], may be used: bool[n]."""

    numbers: bytes
    whole: bool


class FindNew(Struct, frozen=True, tag=True):
    """Which rows are not divided: bool[n], and how many groups were: `counts`."""

    name: str
    numbers: bytes
    usable: bytes


class Divide(Struct, frozen=True, tag=True):
    """The rows to train on and those held out: two of bool[n]."""

    name: str
    numbers: bytes
    usable: bytes
    drawn: bytes


class Tell(Struct, frozen=True, tag=True):
    """Record rows, int64[n], before an answer about them leaves."""

    use: Use
    rows: bytes


class ReadTable(Struct, frozen=True, tag=True):
    """Read the owner's table into a folder of Parquet files: its path (`texts`)."""


Request = RegistryState | KnownTable | Register | Admit | FindNew | Divide | Tell | ReadTable


class Reply(Struct, frozen=True, kw_only=True):
    """The answer to a request, or its error: code, message and hint."""

    arrays: tuple[bytes, ...] = ()
    counts: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    error: tuple[str, str, str] | None = None


encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode
_ERRORS = {kind.code: kind for kind in (NotAllowed, DataError, HomeError)}


class HelperStores:
    """What the helper keeps, as a `RowStore`, an `AdmissionStore` and a `DisclosedSets`. It knows
    the owner's `min_rows` itself."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def _ask(self, request: Request) -> Reply:
        with self._lock:
            try:
                self._pipe.send_bytes(encode(request))
                reply = _decode_reply(self._pipe.recv_bytes())
            except EOFError as err:  # this trainer cannot continue, and another one is started
                raise OSError("the helper of the trainer has ended") from err
        if reply.error is not None:
            _raise(*reply.error)
        return reply

    def close(self) -> None:
        """The helper closes its files when this process ends."""

    def secret(self) -> bytes:
        return self._ask(RegistryState()).arrays[0]

    def columns(self) -> list[str]:
        return list(self._ask(RegistryState()).texts)

    def known_table(self, fingerprint: str) -> Numbers | None:
        found = self._ask(KnownTable(fingerprint)).arrays
        return np.frombuffer(found[0], np.int64) if found else None

    def register(
        self, fingerprint: str, full: Hashes, narrow: Hashes | None, names: Sequence[str]
    ) -> Numbers:
        older = None if narrow is None else narrow.tobytes()
        reply = self._ask(Register(fingerprint, full.tobytes(), older, tuple(names)))
        return np.frombuffer(reply.arrays[0], np.int64)

    def admit(self, numbers: Numbers, min_rows: int, whole: bool) -> Mask:
        return _mask(self._ask(Admit(numbers.tobytes(), whole)).arrays[0])

    def find_new(self, name: str, numbers: Numbers, usable: Mask) -> tuple[Mask, int]:
        reply = self._ask(FindNew(name, numbers.tobytes(), usable.tobytes()))
        return _mask(reply.arrays[0]), reply.counts[0]

    def divide(
        self, name: str, numbers: Numbers, usable: Mask, min_rows: int, drawn: Mask
    ) -> tuple[Mask, Mask]:
        asked = (part.tobytes() for part in (numbers, usable, drawn))
        train, held = map(_mask, self._ask(Divide(name, *asked)).arrays)
        return train, held

    def tell(self, sets: Sequence[ToldSet], min_rows: int) -> None:
        for told in sets:
            self._ask(Tell(told.use, told.rows.tobytes()))

    def spooled_table(self) -> str:
        """The folder into which the helper has read the owner's table."""
        return self._ask(ReadTable()).texts[0]


_stores: HelperStores | None = None


def connect(pipe: Connection) -> None:
    """From now on this process asks its helper at the other end of the pipe."""
    global _stores
    _stores = HelperStores(pipe)


def stores() -> HelperStores | None:
    """What the helper keeps; None in a process that opens the files itself."""
    return _stores


def _mask(found: bytes) -> Mask:
    return np.frombuffer(found, np.bool_).copy()


def _raise(code: str, message: str, hint: str) -> NoReturn:
    if code in _ERRORS:
        raise _ERRORS[code](message, hint)
    error = CommonweightError(message, hint)
    error.code = code
    raise error
