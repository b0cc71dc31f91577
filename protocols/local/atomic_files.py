"""Reads files, and writes them atomically: a file is complete or absent, even after a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from protocols.local.background_unlink import freeing_in_thread

T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[IO[bytes]]:
    """A binary file (0600) that replaces `path` when the block ends without an error.

    `synced`: fsync it before.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    descriptor = _create(temporary)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        with freeing_in_thread(path):
            os.replace(temporary, path)
    except BaseException:  # also a full disk
        Path(temporary).unlink(missing_ok=True)
        raise
    if synced:
        fsync_folder(path.parent)


def _create(path: str) -> int:
    """The descriptor of a new file in place of any that is there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags, 0o600)
    except FileExistsError:  # others may write to the folder: a link or a file of theirs
        Path(path).unlink(missing_ok=True)
        return os.open(path, flags, 0o600)


def write_private(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Write a file atomically that only its owner can read. Raises OSError."""
    with replacing(path, synced=synced) as file:
        file.write(data)


def read_json(path: Path, kind: type[T]) -> T | None:
    """What is in a file of JSON; None if it is missing, damaged, or cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def fsync_files(*paths: Path) -> None:
    """Fsync files of one folder that were written before, if they still exist. Raises OSError."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR)  # opened for writing, as Windows requires
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    fsync_folder(paths[0].parent)


def write_all(file: IO[bytes], data: memoryview) -> None:
    """Write all of `data` to an unbuffered file, whose `write` may write less."""
    while data:
        data = data[file.write(data) :]


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Does nothing on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
