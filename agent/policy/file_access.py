"""Which files a sandboxed process may use: those of the system, and those of its owner's rules."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

Mode = Literal["auto", "require", "off"]
#: `read` includes the names in a folder, and `run` includes `read`. `write` includes all but `run`.
Access = Literal["read", "run", "list", "write", "device", "shared memory"]


class SandboxRules(Struct, frozen=True, kw_only=True):
    """What the owner's settings add to what every process in the sandbox may use.

    `allowed` are the owner's `sandbox_read`; programs there may run too. `listed` are folders whose
    names may be listed. `compile`: compilers may run. `network`: sockets are allowed and Java may
    run, to read tables on a cluster; no process of a task has it. `tasks`: it is a trainer, which
    has a helper. `bwrap`: bubblewrap limits the files, where there is no Landlock.

    What only the trainer's helper uses: `memory`, the file that remembers rows, with the owner's
    `min_count`; and `table`, which `reader` reads with a connection into the folder `spool`.
    """

    mode: Mode = "auto"
    read: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    compile: bool = False
    network: bool = False
    tasks: bool = True
    bwrap: bool = False
    memory: str = ""
    min_count: int = 1
    table: str = ""
    reader: str = ""
    spool: str = ""

    def stamp(self) -> tuple[tuple[int, int] | None, ...]:
        """Changes when a path becomes another file: rules are about files, not about names."""
        return tuple(map(_identity, (*self.read, *self.allowed, *self.write)))


def all_rules(rules: SandboxRules) -> Iterator[tuple[str, Access]]:
    """Each path and what may be done there. A path that does not exist needs no rule."""
    for path in _system_paths():
        yield path, "run" if rules.compile or rules.network else "read"
    for folder in filter(_has_home, sys.path):  # such as by PYTHONPATH: only what can be imported
        yield folder, "list"
        for path in modules(Path(folder)):
            yield path, "read"
    for pattern in ("/lib*/ld-*", "/lib*/*/ld-*", "/usr/lib*/ld-*"):  # what starts programs
        for path in glob.glob(pattern):
            yield path, "run"
    yield sys.executable, "run"
    for pattern in _DEVICES:
        for path in glob.glob(pattern):
            yield path, "device"
    # Shared memory and semaphores of worker processes; the names of others' stay unknown.
    yield "/dev/shm", "shared memory"
    if rules.network:  # a client of a cluster starts other processes, such as Java
        yield "/proc", "read"
        # Names of hosts, and of accounts: Spark does not start without its user's.
        for name in ("hosts", "hostname", "resolv.conf", "gai.conf", "services", "passwd", "group"):
            yield f"/etc/{name}", "read"
    for path in rules.read:
        yield path, "read"
    for path in rules.allowed:
        yield path, "run"
    for path in rules.listed:
        yield path, "list"
    for path in rules.write:
        yield path, "write"


_DEVICES = (
    *("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"),
    *("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/dri", "/dev/kfd", "/dev/dxg"),
)


def _system_paths() -> Iterator[str]:
    """The interpreter, its packages, and what system libraries read. No accounts, no keys."""
    yield from (path for path in sys.path if os.path.isabs(path) and not _has_home(path))
    yield from {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    yield from ("/usr", "/bin", "/sbin", "/nix/store", "/gnu/store", *glob.glob("/lib*"))
    yield from (p for pattern in ("/opt/rocm*", "/opt/cuda*") for p in glob.glob(pattern))
    for name in (
        *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld.so.preload", "localtime", "timezone"),
        *("locale.alias", "os-release", "mime.types", "fonts", "OpenCL", "crypto-policies"),
        *("ssl/openssl.cnf", "ssl/certs", "pki/tls/openssl.cnf", "pki/tls/certs"),
        *("pki/ca-trust", "nsswitch.conf", "host.conf", "alternatives"),
    ):
        yield f"/etc/{name}"
    yield from glob.glob("/etc/java*")
    for name in (
        *("self", "cpuinfo", "meminfo", "stat", "vmstat", "loadavg", "uptime", "version"),
        *("filesystems", "devices", "modules", "sys", "driver", "cgroups"),
    ):
        yield f"/proc/{name}"
    for name in ("devices", "bus/pci", "class/drm", "class/kfd", "fs/cgroup", "module"):
        yield f"/sys/{name}"
    yield os.path.expanduser("~/.keras/keras.json")


def _has_home(folder: str) -> bool:
    """True if the account's home is this folder or in it."""
    return os.path.isabs(folder) and Path.home().resolve().is_relative_to(Path(folder).resolve())


def modules(folder: Path) -> Iterator[str]:
    """The modules and packages in a folder that may have other files, too."""
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return
    for path in found:
        is_package = path.is_dir() and not path.is_symlink() and (path / "__init__.py").is_file()
        if is_package or (path.suffix in (".py", ".so") and path.is_file()):
            yield str(path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
