"""Room on a disk: how a full one is told from other trouble, and how much is left."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from protocols.errors import DiskFull

_FULL = frozenset(
    code for name in ("ENOSPC", "EDQUOT") if (code := getattr(errno, name, None)) is not None
)


def is_disk_full(err: BaseException) -> bool:
    """True if somebody could not write because a disk or a quota has no room left."""
    return isinstance(err, DiskFull) or (isinstance(err, OSError) and err.errno in _FULL)


def free_bytes(folder: Path) -> int:
    """What may still be written where `folder` lies. Raises OSError."""
    return shutil.disk_usage(folder).free


def check_room(folder: Path, wanted_bytes: int) -> None:
    """Raise DiskFull unless so much may be written where `folder` lies."""
    free = free_bytes(folder)
    if free < wanted_bytes:
        raise DiskFull(
            f"the disk has {free / 1e6:,.0f} MB left, and {wanted_bytes / 1e6:,.0f} MB are needed",
            "make room: it goes on by itself",
        )
