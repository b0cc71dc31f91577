"""The checkpoint file, from which interrupted training resumes.

    magic, 8 bytes | length of the header, u64 | header, msgpack | arrays, as in memory |
    SHA-256 of all before it

It is written to a temporary file, synced and renamed, so a kill or a power cut leaves the previous
checkpoint or the new one. It holds numbers only, never code.
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
from agent.tasks.training import rng_state
from protocols.local.atomic_files import replacing

_MAGIC = b"cwwork1\n"
_SHA_BYTES = 32
_TASK, _RNG = "task/", "rng/"


class _Head(Struct, frozen=True, kw_only=True):
    """`arrays` are names, dtypes and shapes in the order of the file."""

    key: str
    step: int
    values: dict[str, int | float | str]
    arrays: list[tuple[str, str, tuple[int, ...]]]


class CheckpointFile:
    """The checkpoint at `path` of the work with this `key`, written at most every `every_s`."""

    def __init__(self, path: Path, key: str, every_s: float) -> None:
        self._path, self._key, self._every_s = path, key, every_s
        self._saved_at = time.monotonic()
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            leftover.unlink(missing_ok=True)  # of a trainer that was killed while writing

    @property
    def is_due(self) -> bool:
        """True when the last checkpoint is older than the interval."""
        return time.monotonic() - self._saved_at >= self._every_s

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write the state after `step`. An error is logged, and training continues."""
        try:
            write(self._path, self._key, step, snapshot, rng_state.state())
        except OSError as err:
            sys.stderr.write(f"cannot write the checkpoint: {err}\n")
        self._saved_at = time.monotonic()

    def load(self) -> tuple[int, Snapshot, Mapping[str, npt.NDArray[Any]]] | None:
        """The step, the task's state and the RNG state, if the checkpoint is of this work.

        Deletes a checkpoint of other work or a damaged one.
        """
        try:
            key, step, snapshot, rng_arrays = read(self._path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as err:
            sys.stderr.write(f"the checkpoint is deleted: {err}\n")
            key = ""
        if key != self._key:
            self.delete()
            return None
        return step, snapshot, rng_arrays

    def delete(self) -> None:
        """Delete it: training starts from the beginning."""
        self._path.unlink(missing_ok=True)


def write(
    path: Path,
    key: str,
    step: int,
    snapshot: Snapshot,
    rng_arrays: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Write a checkpoint durably. Raises OSError, ValueError for an array of Python objects."""
    named = {f"{_TASK}{name}": np.asarray(a, order="C") for name, a in snapshot.arrays.items()}
    named |= {f"{_RNG}{name}": np.asarray(a, order="C") for name, a in rng_arrays.items()}
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
    """Key, step, the task's state and the RNG state. Raises OSError, ValueError (damaged)."""
    data = path.read_bytes()
    body = memoryview(data)[:-_SHA_BYTES]
    if hashlib.sha256(body).digest() != data[-_SHA_BYTES:] or not data.startswith(_MAGIC):
        raise ValueError("it is damaged")
    offset = len(_MAGIC) + 8
    end = offset + int.from_bytes(data[len(_MAGIC) : offset], "little")
    try:
        head = msgspec.msgpack.decode(body[offset:end], type=_Head)
    except msgspec.DecodeError as err:
        raise ValueError(f"another version wrote it: {err}") from err
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, code, shape in head.arrays:
        dtype, count = np.dtype(code), math.prod(shape)
        # A copy, because the offset may not be aligned to the dtype.
        piece = bytearray(body[end : end + count * dtype.itemsize])
        arrays[name] = np.frombuffer(piece, dtype, count).reshape(shape)
        end += len(piece)
    snapshot = Snapshot(_with_prefix(_TASK, arrays), head.values)
    return head.key, head.step, snapshot, _with_prefix(_RNG, arrays)


def _with_prefix(
    prefix: str, arrays: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
