"""The requests of a trainer in the sandbox to its helper (`agent.trainer.helper`).

The helper has the record of rows, and reads a table that needs a connection. It does only what
these requests say, so a task cannot remove or change what was recorded, and has no network.
Processes outside the sandbox have no helper and open files and tables directly.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
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


class _Helper:
    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def ask(self, request: Request) -> Reply:
        with self._lock:
            try:
                self._pipe.send_bytes(encode(request))
                reply = _decode_reply(self._pipe.recv_bytes())
            except EOFError as err:  # this trainer cannot continue, and another one is started
                raise OSError("the helper of the trainer has ended") from err
        if reply.error is not None:
            _raise(*reply.error)
        return reply


_helper: _Helper | None = None


def connect(pipe: Connection) -> None:
    """From now on this process asks its helper at the other end of the pipe."""
    global _helper
    _helper = _Helper(pipe)


class RemoteRows:
    """A `RowStore` of the helper."""

    def __init__(self, helper: _Helper) -> None:
        self._ask = helper.ask

    def close(self) -> None: ...

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


class RemoteAdmission:
    """An `AdmissionStore` of the helper, which knows the owner's `min_rows` itself."""

    def __init__(self, helper: _Helper) -> None:
        self._ask = helper.ask

    def close(self) -> None: ...

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


class RemoteSets:
    """A `DisclosedSets` of the helper, which knows the owner's `min_rows` itself."""

    def __init__(self, helper: _Helper) -> None:
        self._ask = helper.ask

    def close(self) -> None: ...

    def tell(self, sets: Sequence[ToldSet], min_rows: int) -> None:
        for told in sets:
            self._ask(Tell(told.use, told.rows.tobytes()))


def open_rows(path: Path) -> RemoteRows | None:
    """The helper's rows; None in a process that opens the file itself."""
    return RemoteRows(_helper) if _helper else None


def open_admission(path: Path) -> RemoteAdmission | None:
    """The helper's admitted rows; None in a process that opens the file itself."""
    return RemoteAdmission(_helper) if _helper else None


def open_sets(path: Path) -> RemoteSets | None:
    """The helper's sets; None in a process that opens the file itself."""
    return RemoteSets(_helper) if _helper else None


def spooled_table() -> str | None:
    """The folder into which the helper has read the owner's table; None outside the sandbox."""
    return _helper.ask(ReadTable()).texts[0] if _helper else None


def _mask(found: bytes) -> Mask:
    return np.frombuffer(found, np.bool_).copy()


def _raise(code: str, message: str, hint: str) -> NoReturn:
    if code in _ERRORS:
        raise _ERRORS[code](message, hint)
    error = CommonweightError(message, hint)
    error.code = code
    raise error
