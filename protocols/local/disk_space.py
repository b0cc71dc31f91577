"""Free disk space, sizes of files, and how to recognize a full disk."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from protocols.errors import DiskFull, Refused

_FULL = frozenset(
    code for name in ("ENOSPC", "EDQUOT") if (code := getattr(errno, name, None)) is not None
)


def is_disk_full(err: BaseException) -> bool:
    """True if the error means that a disk or a quota is full."""
    return isinstance(err, DiskFull) or (isinstance(err, OSError) and err.errno in _FULL)


def file_bytes(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`. Raises OSError."""
    return shutil.disk_usage(folder).free


def check_room(folder: Path, wanted_bytes: int) -> None:
    """Raise DiskFull unless the disk of `folder` has `wanted_bytes` free.

    Raises Refused for more than the whole disk, for which it is no use to wait.
    """
    total, _, free = shutil.disk_usage(folder)
    if wanted_bytes > total:
        raise Refused(
            f"{wanted_bytes / 1e6:,.0f} MB are needed, which is more than the whole disk has"
        )
    if free < wanted_bytes:
        raise DiskFull(
            f"the disk has {free / 1e6:,.0f} MB free, but {wanted_bytes / 1e6:,.0f} MB are needed",
            "free disk space; work then continues without a restart",
        )
