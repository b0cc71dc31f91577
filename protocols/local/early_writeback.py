"""Starts to write a file to disk while it still grows, so that the final fsync is short.

This is a hint, and for Linux only. fsync alone makes a file durable.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable

#: Bytes between two hints. A shorter file gets none.
STEP_BYTES = 4 * 1024 * 1024
_SYNC_FILE_RANGE_WRITE = 2  # start, and wait for nothing


class EarlyWriteback:
    """Hints for one file that grows at its end from the offset `start`."""

    def __init__(self, descriptor: int, start: int = 0) -> None:
        self._descriptor = descriptor
        self._hinted = self._written = start

    def wrote(self, nbytes: int) -> None:
        """Call after each write."""
        self._written += nbytes
        if (size := self._written - self._hinted) >= STEP_BYTES:
            if (sync_file_range := _sync_file_range()) is not None:
                # An error shows up in the fsync too.
                sync_file_range(self._descriptor, self._hinted, size, _SYNC_FILE_RANGE_WRITE)
            self._hinted = self._written


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The system call; only a process that writes large files imports ctypes."""
    if sys.platform != "linux":
        return None
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        call = ctypes.CDLL(None).sync_file_range
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        return lambda *arguments: int(call(*arguments))
    return None
