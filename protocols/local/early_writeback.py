"""Has the disk begin with a file while it is written: the sync at its end has little left to do.

Only a hint, and only on Linux: what is durable, and when, is still for fsync to say.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable

#: So much at a time; a shorter file is left to its sync.
STEP_BYTES = 4 * 1024 * 1024
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and wait for nothing


class Early:
    """One file that grows at its end."""

    def __init__(self, descriptor: int, start: int = 0) -> None:
        self._descriptor = descriptor
        self._begun = self._written = start

    def wrote(self, nbytes: int) -> None:
        """So many bytes more are written."""
        self._written += nbytes
        if self._written - self._begun >= STEP_BYTES:
            _begin(self._descriptor, self._begun, self._written - self._begun)
            self._begun = self._written


def _begin(descriptor: int, start: int, nbytes: int) -> None:
    if (call := _call()) is not None:
        call(descriptor, start, nbytes, _WRITE)  # whatever it says, the sync says it better


@functools.cache
def _call() -> Callable[[int, int, int, int], int] | None:
    """The system's call; ctypes is loaded by who writes much alone."""
    if sys.platform != "linux":
        return None
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        call = ctypes.CDLL(None).sync_file_range
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        return lambda *arguments: int(call(*arguments))
    return None
