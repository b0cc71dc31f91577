"""Carries out the requests of a trainer in the sandbox to its helper, and nothing else.

The trainer runs tasks, so its requests are not trusted: `min_rows` is the owner's, and only numbers
of the registry count. What was recorded stays. A record is on disk before the reply is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import numpy.typing as npt

from agent.data import helper_requests as asked
from agent.data.admission import AdmissionStore
from agent.data.disclosed_sets import DisclosedSets, Numbers, ToldSet, Use
from agent.data.helper_requests import Reply, Request
from agent.data.row_registry import RowStore
from protocols.errors import CommonweightError, NotAllowed

#: What a trainer may record. The rows of analytics answers are recorded by another process.
_USES = frozenset(get_args(Use)) - {"cell"}


class MemoryService:
    """The memory in the file `path`; for one thread. `read_table` gives the folder of the table."""

    def __init__(self, path: Path, min_rows: int, read_table: Callable[[], Path]) -> None:
        self._path, self._min_rows, self._read_table = path, min_rows, read_table

    @cached_property
    def _rows(self) -> RowStore:
        return RowStore(self._path)

    @cached_property
    def _admission(self) -> AdmissionStore:
        return AdmissionStore(self._path)

    @cached_property
    def _sets(self) -> DisclosedSets:
        return DisclosedSets(self._path)

    def answer(self, frame: bytes) -> bytes:
        """The encoded reply to an encoded request; errors go into it."""
        try:
            reply = self._do(asked.decode_request(frame))
        except CommonweightError as err:
            reply = Reply(error=(err.code, err.message, err.hint))
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as err:
            reply = Reply(error=(NotAllowed.code, f"not a valid request: {err}", ""))
        except OSError as err:
            reply = Reply(error=("file", f"a file cannot be used: {err}", ""))
        return asked.encode(reply)

    def _do(self, request: Request) -> Reply:
        match request:
            case asked.RegistryState():
                return Reply(arrays=(self._rows.secret(),), texts=tuple(self._rows.columns()))
            case asked.KnownTable(fingerprint):
                known = self._rows.known_table(fingerprint)
                return Reply() if known is None else _arrays(known)
            case asked.Register(fingerprint, full, narrow, names):
                hashes = np.frombuffer(full, np.uint64)
                older = None if narrow is None else np.frombuffer(narrow, np.uint64)
                if older is not None and len(older) != len(hashes):
                    raise ValueError("hashes of another number of rows")
                return _arrays(self._rows.register(fingerprint, hashes, older, names))
            case asked.Admit(numbers, whole):
                rows = self._numbers(numbers)
                return _arrays(self._admission.admit(rows, self._min_rows, whole))
            case asked.FindNew(name, numbers, usable):
                rows = self._numbers(numbers)
                new, groups = self._admission.find_new(name, rows, _mask(usable, rows))
                return Reply(arrays=(new.tobytes(),), counts=(groups,))
            case asked.Divide(name, numbers, usable, drawn):
                rows = self._numbers(numbers)
                mask, out = _mask(usable, rows), np.frombuffer(drawn, np.bool_)
                return _arrays(*self._admission.divide(name, rows, mask, self._min_rows, out))
            case asked.ReadTable():
                return Reply(texts=(str(self._read_table()),))
            case asked.Tell(use, numbers):
                if use not in _USES:
                    raise ValueError(f"a trainer tells no {use}")
                told = ToldSet(use, np.unique(self._numbers(numbers)))
                self._sets.tell([told], self._min_rows)
                return Reply()

    def _numbers(self, encoded: bytes) -> Numbers:
        """Row numbers that the registry has given. Raises ValueError."""
        rows = np.frombuffer(encoded, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._rows.count():
            raise ValueError("rows without a number")
        return rows


def _mask(encoded: bytes, rows: Numbers) -> npt.NDArray[np.bool_]:
    mask = np.frombuffer(encoded, np.bool_)
    if len(mask) != len(rows):
        raise ValueError("a mask of another number of rows")
    return mask


def _arrays(*arrays: npt.NDArray[np.generic]) -> Reply:
    return Reply(arrays=tuple(array.tobytes() for array in arrays))
