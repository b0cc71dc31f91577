"""Stores the state of a strategy on disk: one file of arrays for each slot.

A file is canonical safetensors, named by its digest, with the floating-point tensors of the model
as float64 or float32. It is complete and synced before its version, and valid once the ledger's
VersionCommitted names it. After a crash, the same updates give the same bytes under the same name.
So a version and its state always belong to the same round.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from protocols.errors import BadWeights, CommonweightError
from protocols.local import atomic_files
from protocols.local.background_unlink import unlink
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
    """The states in a folder. `digests` are by slot, here and in the ledger."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._verified: set[str] = set()

    def path(self, digest: str) -> Path:
        """The file with this digest, whether or not it exists."""
        return self._folder / f"{digest}.safetensors"

    def open(self, digests: Mapping[str, str], model: Schema) -> StateReader:
        """The state of a version. Raises CommonweightError if it is missing or damaged."""
        for slot, digest in digests.items():
            self._verify(slot, digest)
        return StateReader({slot: self.path(digest) for slot, digest in digests.items()}, model)

    def load(self, slot: str, digest: str) -> Weights:
        """A small state, loaded into memory. Raises CommonweightError as `open` does."""
        self._verify(slot, digest)
        return weights.load(self.path(digest))

    def write(self, slots: tuple[str, ...], model: Schema) -> StateWriter:
        """A writer for a state, piece by piece."""
        return StateWriter(self, slots, model)

    def save(self, arrays: Weights) -> str:
        """Store a small state durably; its digest."""
        temporary = self._folder / ".new.safetensors"
        return self.promote(temporary, weights.save(arrays, temporary))

    def promote(self, temporary: Path, digest: str) -> str:
        """Rename a complete, synced file to its digest."""
        temporary.replace(self.path(digest))
        atomic_files.fsync_folder(self._folder)
        self._verified.add(digest)
        return digest

    def drop(self, digests: Iterable[str]) -> None:
        """Delete states."""
        for digest in digests:
            unlink(self.path(digest))

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

    def __init__(self, paths: Mapping[str, Path], model: Schema) -> None:
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._files: dict[str, WeightsFile] = {}
        with contextlib.ExitStack() as stack:
            for slot, path in paths.items():
                self._files[slot] = stack.enter_context(WeightsFile(path))
                weights.check_schema(self._files[slot].schema, state_schema(model))
            self._stack = stack.pop_all()

    def read(self, parts: Iterable[Part]) -> dict[str, Arrays]:
        """The arrays of these parts by slot; empty if there is no state yet."""
        with self._lock:
            return {
                slot: {part: file.read(part) for part in parts}
                for slot, file in self._files.items()
            }

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class StateWriter:
    """Writes a state piece by piece. `digests` by slot are complete after the `with` block.

    Pieces may come in any order and from several threads. Early pieces wait in memory.
    """

    def __init__(self, states: StateStore, slots: tuple[str, ...], model: Schema) -> None:
        self._states, self._slots = states, slots
        self._schema = state_schema(model)
        self._sizes = {
            name: spec.nbytes // DTYPES[spec.dtype].itemsize for name, spec in self._schema.items()
        }
        self._order = [name for name in sorted(self._sizes) if self._sizes[name]]
        self._at = 0
        self._next = (self._order[0], 0) if self._order else ("", 0)
        self._early: dict[tuple[str, int], tuple[Part, dict[str, npt.NDArray[Any]]]] = {}
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._writers: dict[str, WeightsWriter] = {}
        self.digests: dict[str, str] = {}

    def __enter__(self) -> StateWriter:
        with contextlib.ExitStack() as stack:
            for slot in self._slots:
                self._writers[slot] = stack.enter_context(
                    WeightsWriter(self._temporary(slot), self._schema)
                )
            self._stack = stack.pop_all()
        return self

    def _temporary(self, slot: str) -> Path:
        return self._states.path(f".new-{slot}")

    def put(self, arrays: Mapping[str, Mapping[Part, npt.NDArray[Any]]]) -> None:
        """Write parts by slot. All slots have the same parts."""
        with self._lock:
            for part in arrays[self._slots[0]] if self._slots else ():
                by_slot = {slot: arrays[slot][part] for slot in self._slots}
                self._early[(part.name, part.start)] = (part, by_slot)
            while self._next in self._early:
                part, by_slot = self._early.pop(self._next)
                for slot, array in by_slot.items():
                    self._writers[slot].write({part: array})
                self._next = self._after(part)

    def _after(self, part: Part) -> tuple[str, int]:
        if part.stop < self._sizes[part.name]:
            return part.name, part.stop
        self._at += 1
        return (self._order[self._at], 0) if self._at < len(self._order) else ("", 0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._slots and self._at < len(self._order):
            kind, err = BadWeights, BadWeights("the strategy's state lacks parts of the model")
            self._stack.__exit__(kind, err, None)
            raise err
        self._stack.__exit__(kind, err, trace)
        if kind is None:
            for slot, writer in self._writers.items():
                self.digests[slot] = self._states.promote(self._temporary(slot), writer.digest)
