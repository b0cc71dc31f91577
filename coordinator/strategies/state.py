"""Stores the state of a strategy on disk: one file of arrays for each slot.

A file is canonical safetensors, named by its digest, with the floating-point tensors of the model
as float64 or float32. It is complete and synced before its version, and valid once the ledger's
VersionCommitted names it. After a crash, the same updates give the same bytes under the same name.
So a version and its state always belong to the same round.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from coordinator.storage.object_store import ObjectStore
from protocols.errors import BadWeights, CommonweightError
from protocols.local import atomic_files
from protocols.local.background_unlink import unlink
from protocols.local.safe_paths import path_in
from protocols.model import weights
from protocols.model.weights import DTYPES, FLOAT_DTYPES, Part, Schema, TensorSpec, Weights
from protocols.model.weights_file import WeightsFile, WeightsWriter

Arrays = dict[Part, npt.NDArray[Any]]


def state_schema(model: Schema) -> Schema:
    """The schema of a slot: the model's floating-point tensors as float32 or float64."""
    return {
        name: TensorSpec("F64" if spec.dtype == "F64" else "F32", spec.shape)
        for name, spec in model.items()
        if spec.dtype in FLOAT_DTYPES
    }


class StateStore:
    """The states in a folder, and in `mirror`. `digests` are by slot, here and in the ledger.

    A state is in the mirror before the ledger names it; writing raises StoreUnreachable.
    """

    def __init__(self, folder: Path, mirror: ObjectStore | None = None) -> None:
        self._folder, self._mirror = folder, mirror
        self._verified: set[str] = set()

    def path(self, digest: str) -> Path:
        """The file with this digest, whether or not it exists."""
        return path_in(self._folder, digest, ".safetensors")

    @contextlib.contextmanager
    def open(self, digests: Mapping[str, str], model: Schema) -> Iterator[StateReader]:
        """Read the state of a version. Raises CommonweightError if it is missing or damaged."""
        for slot, digest in digests.items():
            self._verify(slot, digest)
        with contextlib.ExitStack() as stack:
            files = {
                slot: stack.enter_context(WeightsFile(self.path(digest)))
                for slot, digest in digests.items()
            }
            for file in files.values():
                weights.check_schema(file.schema, state_schema(model))
            yield StateReader(files)

    def load(self, slot: str, digest: str) -> Weights:
        """A small state, loaded into memory. Raises CommonweightError as `open` does."""
        self._verify(slot, digest)
        return weights.load(self.path(digest))

    @contextlib.contextmanager
    def write(self, slots: tuple[str, ...], model: Schema) -> Iterator[StateWriter]:
        """Write a state. Its `digests` are complete after the `with` block. Raises BadWeights."""
        schema = state_schema(model)
        temporary = {slot: self._folder / f".new-{slot}.safetensors" for slot in slots}
        with contextlib.ExitStack() as stack:
            files = {
                slot: stack.enter_context(WeightsWriter(path, schema))
                for slot, path in temporary.items()
            }
            writer = StateWriter(files, schema)
            yield writer
            if slots and not writer.is_complete:
                raise BadWeights("the strategy's state lacks parts of the model")
        for slot, path in temporary.items():
            writer.digests[slot] = self.promote(path, files[slot].digest)

    def save(self, arrays: Weights) -> str:
        """Store a small state durably; its digest."""
        temporary = self._folder / ".new.safetensors"
        return self.promote(temporary, weights.save(arrays, temporary))

    def promote(self, temporary: Path, digest: str) -> str:
        """Rename a complete, synced file to its digest."""
        if self._mirror is not None:
            self._mirror.put(digest, temporary)
        temporary.replace(self.path(digest))
        atomic_files.fsync_folder(self._folder)
        self._verified.add(digest)
        return digest

    def drop(self, digests: Iterable[str]) -> None:
        """Delete states."""
        for digest in digests:
            unlink(self.path(digest))
            if self._mirror is not None:
                self._mirror.delete(digest)

    def _verify(self, slot: str, digest: str) -> None:
        """Verify a file once after each start: the disk may have lost or damaged it."""
        if digest in self._verified:
            return
        try:
            sound = weights.file_digest(self.path(digest)) == digest
        except FileNotFoundError:
            sound = False
        if not sound:
            raise CommonweightError(
                f"the strategy's state {slot} ({digest[:12]}) is missing or damaged",
                "restore it from a backup, or start a new run from the last version",
            )
        self._verified.add(digest)


class StateReader:
    """Reads a state piece by piece. Thread-safe. Raises BadWeights."""

    def __init__(self, files: Mapping[str, WeightsFile]) -> None:
        self._files = files
        self._lock = threading.Lock()

    def read(self, parts: Iterable[Part]) -> dict[str, Arrays]:
        """The arrays of these parts by slot; empty if there is no state yet."""
        with self._lock:
            return {
                slot: {part: file.read(part) for part in parts}
                for slot, file in self._files.items()
            }


class StateWriter:
    """Writes a state piece by piece.

    Pieces may come in any order and from several threads. Early pieces wait in memory.
    """

    def __init__(self, files: Mapping[str, WeightsWriter], schema: Schema) -> None:
        self._files = files
        self._sizes = {
            name: spec.nbytes // DTYPES[spec.dtype].itemsize for name, spec in schema.items()
        }
        #: Tensors that are not complete yet, and the next element of the first of them.
        self._names = deque(name for name in sorted(self._sizes) if self._sizes[name])
        self._start = 0
        self._early: dict[tuple[str, int], tuple[Part, dict[str, npt.NDArray[Any]]]] = {}
        self._lock = threading.Lock()
        self.digests: dict[str, str] = {}

    @property
    def is_complete(self) -> bool:
        return not self._names

    def put(self, arrays: Mapping[str, Mapping[Part, npt.NDArray[Any]]]) -> None:
        """Write parts by slot. All slots have the same parts."""
        with self._lock:
            for part in next(iter(arrays.values()), ()):
                by_slot = {slot: arrays[slot][part] for slot in self._files}
                self._early[(part.name, part.start)] = (part, by_slot)
            while self._names and (self._names[0], self._start) in self._early:
                part, by_slot = self._early.pop((self._names[0], self._start))
                for slot, array in by_slot.items():
                    self._files[slot].write({part: array})
                self._start = part.stop
                if self._start >= self._sizes[part.name]:
                    self._names.popleft()
                    self._start = 0
