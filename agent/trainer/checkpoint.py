"""The journal of the work in hand: a file from which training that was cut off goes on.

    magic, 8 bytes | length of the head, u64 | head, msgpack | arrays, as they lie in memory |
    SHA-256 of all before it

Written whole to one side, synced and renamed: a kill or a power cut leaves the last journal or the
next one. It holds numbers only, no code: whatever a stranger puts there is refused or is weights.
"""

from __future__ import annotations

import glob
import hashlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from agent.tasks import Snapshot
from agent.trainer import rng_state
from protocols.local.atomic_files import replacing

_MAGIC = b"cwwork1\n"
_SHA_BYTES = 32
_TASK, _CHANCE = "task/", "chance/"


class _Head(Struct, frozen=True, kw_only=True):
    """`arrays` are names, dtypes and shapes in the order in which they lie in the file."""

    key: str
    step: int
    values: dict[str, int | float | str]
    arrays: list[tuple[str, str, tuple[int, ...]]]


class CheckpointFile:
    """The journal at `path` of the work that `key` names, kept at most every `every_s`."""

    def __init__(self, path: Path, key: str, every_s: float) -> None:
        self._path, self._key, self._every_s = path, key, every_s
        self._kept_at = time.monotonic()
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            leftover.unlink(missing_ok=True)  # of a trainer that was killed while it wrote

    @property
    def is_due(self) -> bool:
        """True when the last journal is old enough for another."""
        return time.monotonic() - self._kept_at >= self._every_s

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write down that the work has come to `step`. A full disk costs the journal only."""
        try:
            write(self._path, self._key, step, snapshot, rng_state.state())
        except OSError as err:
            sys.stderr.write(f"cannot keep the journal: {err}\n")
        self._kept_at = time.monotonic()

    def load(self) -> tuple[int, Snapshot, Mapping[str, npt.NDArray[Any]]] | None:
        """The step, the task's state and that of chance, if the journal is of this very work.

        Any other, or a damaged one, is dropped.
        """
        try:
            key, step, snapshot, chances = read(self._path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as err:
            sys.stderr.write(f"the journal is dropped: {err}\n")
            key = ""
        if key != self._key:
            self.delete()
            return None
        return step, snapshot, chances

    def delete(self) -> None:
        """The next trainer begins anew."""
        self._path.unlink(missing_ok=True)


def write(
    path: Path,
    key: str,
    step: int,
    snapshot: Snapshot,
    chances: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Write a journal, durably. Raises OSError, ValueError for an array of Python objects."""
    named = {f"{_TASK}{name}": np.asarray(a, order="C") for name, a in snapshot.arrays.items()}
    named |= {f"{_CHANCE}{name}": np.asarray(a, order="C") for name, a in chances.items()}
    if odd := [name for name, array in named.items() if array.dtype.hasobject]:
        raise ValueError(f"the array {odd[0]!r} holds Python objects")
    head = msgspec.msgpack.encode(
        _Head(
            key=key,
            step=step,
            values=dict(snapshot.values),
            arrays=[(name, array.dtype.str, array.shape) for name, array in named.items()],
        )
    )
    sha = hashlib.sha256()
    with replacing(path) as file:
        for piece in _pieces(head, named):
            sha.update(piece)
            file.write(piece)
        file.write(sha.digest())


def _pieces(
    head: bytes, named: Mapping[str, npt.NDArray[Any]]
) -> Iterator[bytes | memoryview[int]]:
    yield _MAGIC + len(head).to_bytes(8, "little") + head
    for array in named.values():
        yield array.reshape(-1).view(np.uint8).data


def read(path: Path) -> tuple[str, int, Snapshot, Mapping[str, npt.NDArray[Any]]]:
    """Key, step, the task's state and that of chance. Raises OSError, ValueError (damaged)."""
    data = path.read_bytes()
    body = memoryview(data)[:-_SHA_BYTES]
    if hashlib.sha256(body).digest() != data[-_SHA_BYTES:] or not data.startswith(_MAGIC):
        raise ValueError("its bytes are not those that were written")
    offset = len(_MAGIC) + 8
    end = offset + int.from_bytes(data[len(_MAGIC) : offset], "little")
    try:
        head = msgspec.msgpack.decode(body[offset:end], type=_Head)
    except msgspec.DecodeError as err:
        raise ValueError(f"it is of another version: {err}") from err
    found: dict[str, npt.NDArray[Any]] = {}
    for name, code, shape in head.arrays:
        dtype, count = np.dtype(code), math.prod(shape)
        # A copy: what follows a head of any length lies across the boundaries of its type.
        piece = bytearray(body[end : end + count * dtype.itemsize])
        found[name] = np.frombuffer(piece, dtype, count).reshape(shape)
        end += len(piece)
    snapshot = Snapshot(_with_prefix(_TASK, found), head.values)
    return head.key, head.step, snapshot, _with_prefix(_CHANCE, found)


def _with_prefix(prefix: str, found: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {
        name.removeprefix(prefix): array for name, array in found.items() if name.startswith(prefix)
    }
