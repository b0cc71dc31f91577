"""Limits the heap of the C library: glibc keeps much more memory than this process needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def limit_arenas() -> None:
    """Let all threads share two heaps: one heap per thread keeps what each once needed."""
    m_arena_max = -8
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(m_arena_max, 2)


def trim() -> None:
    """Return free memory to the system, as the next run may be days away."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)
