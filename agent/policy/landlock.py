"""Limits the files of this process by Landlock, a part of Linux that needs no privileges.

Source: https://docs.kernel.org/userspace-api/landlock.html. Importing this module changes nothing.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from agent.policy.file_access import Access
from agent.policy.system_calls import call, must

#: The first version that is used: that of Linux 6.2, which limits truncation.
MIN_VERSION = 3
#: The version that limits abstract Unix sockets and signals: that of Linux 6.12.
SIGNALS_VERSION = 6
_NET_VERSION = 4

# Rights over files, by the version that brought them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (
    1 << bit for bit in range(6)
)
_MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE, _IOCTL_DEV = (1 << bit for bit in (7, 8, 13, 14, 15))
_ALL_OF_FIRST = (1 << 13) - 1
_LATER = {2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEV}
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READ = _READ_FILE | _READ_DIR
#: No links, sockets, pipes or devices: the agent reads these folders and would follow a link.
_WRITE = (
    _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
)
_NET_TCP, _SCOPE = 0b11, 0b11  # bind and connect; abstract Unix sockets and signals
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RIGHTS: dict[Access, int] = {
    "read": _READ,
    "run": _READ | _EXECUTE,
    "list": _READ_DIR,
    "write": _WRITE,
    "device": _READ | _WRITE_FILE | _IOCTL_DEV,
    "shared memory": _READ_FILE | _WRITE_FILE | _TRUNCATE | _MAKE_REG | _REMOVE_FILE,
}


def version() -> int:
    """The version of Landlock in this kernel; 0 for none."""
    return max(0, call(_CREATE_RULESET, None, 0, 1))


def restrict_files(rules: Iterable[tuple[str, Access]], *, network: bool) -> None:
    """Allow this process only these files, and TCP only with `network`; for good."""
    found = version()
    handled = _ALL_OF_FIRST
    for since, right in _LATER.items():
        handled |= right if found >= since else 0
    net = _NET_TCP if found >= _NET_VERSION and not network else 0
    scope = _SCOPE if found >= SIGNALS_VERSION else 0
    size = 24 if found >= SIGNALS_VERSION else 16 if found >= _NET_VERSION else 8
    attributes = struct.pack("=QQQ", handled, net, scope)[:size]
    ruleset = must(call(_CREATE_RULESET, attributes, size, 0), "Landlock rules")
    try:
        for path, access in rules:
            _allow(ruleset, path, _RIGHTS[access] & handled)
        must(call(_RESTRICT_SELF, ruleset, 0), "Landlock")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Allow what is beneath a path. One that does not exist needs no rule."""
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(f"/proc/self/fd/{file}"):
            rights &= _ON_FILES
        beneath = struct.pack("=Qi", rights, file)
        must(call(_ADD_RULE, ruleset, 1, beneath, 0), f"a rule for {path}")
    finally:
        os.close(file)
