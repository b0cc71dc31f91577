"""Finds what a crash of the coordinator left of an app's run: files for the ServerApp, and
versions.

A version is noted in a file beside the folder of the run before the version exists, because the
ledger names it only later, or never. The next start deletes those that no run keeps.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from coordinator.runs.apps import frames
from protocols.local.atomic_files import fsync_folder

_SUFFIX = ".versions"
_LINE = re.compile(r"^([0-9a-f]{64})$", re.MULTILINE)


def note_version(folder: Path, digest: str) -> None:
    """Note that this version belongs to the run of this folder, durably. Raises OSError."""
    descriptor = os.open(_file(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(f"\n{digest}\n".encode())  # after a line that was cut off
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder.parent)


def versions(folder: Path) -> set[str]:
    """The digests that were noted. Raises OSError."""
    return set(_LINE.findall(_file(folder).read_text())) if exist(folder) else set()


def exist(folder: Path) -> bool:
    """True if the run has noted versions, and has not ended in order."""
    return _file(folder).exists()


def delete(folder: Path) -> None:
    """The run has ended, and its versions are pruned. Raises OSError."""
    for name in (frames.OUT, frames.IN):
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _file(folder).unlink()


def _file(folder: Path) -> Path:
    return folder.with_name(folder.name + _SUFFIX)
