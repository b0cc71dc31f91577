"""Memory given back: glibc keeps what a run has freed, for a next run that may be days away."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def trim() -> None:
    """Return what is free to the system. Does nothing where the C library has no such call."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)
