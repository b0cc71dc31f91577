"""Calls the Linux kernel where Python has no function for it."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from protocols.errors import CommonweightError


def libc() -> Any:
    """The C library of this process."""
    return ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: Any) -> int:
    """The result of a system call, or -1; then `ctypes.get_errno` tells why."""
    given = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    function = libc().syscall
    function.restype = ctypes.c_long
    return int(function(ctypes.c_long(number), *given))


def must(result: int, what: str) -> int:
    """The result, unless it is an error. Raises CommonweightError."""
    if result < 0:
        why = os.strerror(ctypes.get_errno())
        raise CommonweightError(
            f"the sandbox cannot start: {what}: {why}",
            "commonweight-agent policy set sandbox off, if you trust all tasks",
        )
    return result
