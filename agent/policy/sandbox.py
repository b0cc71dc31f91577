"""The sandbox of the trainer on Linux: Landlock limits its files, seccomp its system calls.

A task gets no network, reads what `SandboxRules` and `_system_rules` name, and writes only its work
folders. `agent.trainer.sandboxed` enforces the rules on itself, before any library starts a thread,
and becomes the trainer; both mechanisms pass on to its children and cannot be lifted.

Sources: https://docs.kernel.org/userspace-api/landlock.html and seccomp_filter.html there.
Importing this module touches nothing of Linux.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import platform
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct

from protocols.errors import CommonweightError, TrainerFailed

Mode = Literal["auto", "require", "off"]

#: The rules travel to the child in its environment, where other users cannot read them.
VARIABLE = "COMMONWEIGHT_AGENT_TRAINER_SANDBOX"
KIND = "sandbox"
#: Where a trainer puts temporary files: a folder in its work folder.
TEMPORARY = "tmp"
HINT = "if you trust the task with it: commonweight-agent policy set sandbox_read PATH"

# --- Landlock: rights over files by the version (ABI) that brought them ---------------------------

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (
    1 << bit for bit in range(6)
)
_MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE, _IOCTL_DEV = (1 << bit for bit in (7, 8, 13, 14, 15))
_ALL_OF_ABI_1 = (1 << 13) - 1
_LATER = {2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEV}
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READ = _READ_FILE | _READ_DIR
#: No links, sockets, pipes or devices: the agent reads these folders and would follow a link.
_WRITE = (
    *(_READ, _WRITE_FILE, _REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE),
)
_NET_TCP, _SCOPE = 0b11, 0b11  # bind and connect; abstract Unix sockets and signals
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_MIN_ABI, _NET_ABI, _SCOPE_ABI = 3, 4, 6  # the first is that of Linux 6.2, with truncation

_PR_SET_NO_NEW_PRIVS = 38

# --- seccomp: system calls that fail, on x86_64 and aarch64 ---------------------------------------

#: Audit architecture, and the numbers of `seccomp`, `clone`, `socketpair` and `prlimit64`.
_MACHINES = {
    "x86_64": (0xC000003E, 317, 56, 53, 302),
    "aarch64": (0xC00000B7, 277, 220, 199, 261),
}
#: socket, connect, accept, bind, listen, accept4.
_NETWORK = {"x86_64": (41, 42, 43, 49, 50, 288), "aarch64": (198, 203, 202, 200, 201, 242)}
_DENIED = {
    "x86_64": (
        *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
        *(90, 91, 92, 93, 94, 260, 268),  # chmod and chown: Landlock does not limit them
        *(188, 189, 190, 197, 198, 199),  # setxattr, removexattr
        *(165, 166, 155, 161, 272, 308),  # mount, umount2, pivot_root, chroot, unshare, setns
        *(303, 304, 298, 321, 323, 300),  # handles, perf_event_open, bpf, userfaultfd, fanotify
        *(248, 249, 250, 103),  # add_key, request_key, keyctl, syslog
        *(246, 320, 175, 313, 176, 169),  # kexec, modules, reboot
        *(167, 168, 163, 164, 227, 170, 171, 172, 173, 179),  # swap, acct, clocks, names, ports
    ),
    "aarch64": (
        *(117, 270, 271, 272),
        *(52, 53, 54, 55),
        *(5, 6, 7, 14, 15, 16),
        *(40, 39, 41, 51, 97, 268),
        *(264, 265, 241, 280, 282, 262),
        *(217, 218, 219, 116),
        *(104, 294, 105, 273, 106, 142),
        *(224, 225, 89, 170, 112, 161, 162, 60),
    ),
}
#: The same numbers everywhere: pidfds, io_uring, mounts, process_madvise, quotas, later chmods.
_DENIED_EVERYWHERE = (
    *(424, 425, 426, 427, 428, 429, 430, 431, 432, 433),
    *(434, 438, 440, 442, 443, 448, 452, 463, 466),
)
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020000
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _AND, _EQUAL, _BELOW_X32, _ANY_OF, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_X32 = 0x40000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24  # struct seccomp_data


class SandboxRules(Struct, frozen=True, kw_only=True):
    """What the owner's settings add to what every trainer may use.

    `allowed` are the owner's `sandbox_read`; programs there may run too. `listed` are folders whose
    names may be listed. `compile`: compilers may run. `network`: sockets are allowed and Java may
    run, for tables on a cluster.
    """

    mode: Mode = "auto"
    read: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    compile: bool = False
    network: bool = False

    def stamp(self) -> tuple[tuple[int, int] | None, ...]:
        """Changes when a path becomes another file: rules are about files, not about names."""
        return tuple(map(_identity, (*self.read, *self.allowed, *self.write)))


class Support(NamedTuple):
    """The version of Landlock (0: none), and whether seccomp filters work."""

    landlock: int
    seccomp: bool

    def lacks(self) -> list[str]:
        """What is needed and missing on this machine."""
        if sys.platform != "linux":
            return ["Linux"]
        found = []
        if self.landlock < _MIN_ABI:
            found.append(
                f"Landlock {_MIN_ABI} (Linux 6.2, with landlock in /sys/kernel/security/lsm)"
            )
        if not self.seccomp:
            found.append("seccomp filters (on x86_64 or aarch64)")
        return found

    def limits(self) -> list[str]:
        """What a trainer may not do here, in words."""
        files = ["reads only its data, models and packages, writes only its work folder"]
        return [
            *(files if self.landlock else []),
            *(["no network"] if self.seccomp else []),
            *(["no signals to others"] if self.landlock >= _SCOPE_ABI else []),
        ]


def support() -> Support:
    """What this machine can enforce. Changes nothing."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES or struct.calcsize("P") != 8:
        return Support(0, False)
    action = ctypes.c_uint32(_ERRNO)
    has_errno = _call(_MACHINES[machine][1], 2, 0, ctypes.byref(action)) == 0
    return Support(max(0, _call(_CREATE_RULESET, None, 0, 1)), has_errno)


def describe(mode: Mode, found: Support) -> tuple[str, str]:
    """What the sandbox does here, and what to do about it ("" if nothing)."""
    if mode == "off":
        return "off: tasks can use this account's files and network", (
            "commonweight-agent policy set sandbox auto"
        )
    lacks, limits = found.lacks(), "; ".join(found.limits())
    if not lacks:
        return f"the trainer {limits}", ""
    detail = f"this machine lacks {' and '.join(lacks)}; the trainer "
    detail += limits or "can use this account's files and network"
    if mode == "require":
        return f"{detail}; sandbox is require, so nothing is trained", (
            "use such a Linux, or: commonweight-agent policy set sandbox auto"
        )
    return detail, "use such a Linux, or run only tasks that you trust"


def uses_network(reader: str) -> bool:
    """True if this reader of tables needs connections: to a cluster, or to Spark's own Java."""
    return reader.startswith(("dask:", "spark"))


def check(rules: SandboxRules) -> None:
    """Raise TrainerFailed if the owner requires more than this machine can enforce."""
    if rules.mode == "require" and support().lacks():
        raise TrainerFailed(KIND, *describe(rules.mode, support()))


def environment(rules: SandboxRules, work_dir: Path) -> dict[str, str]:
    """The variables of the child: its rules, and a private place for the caches of libraries."""
    folder = work_dir.absolute()
    caches = {
        name: str(folder / "caches" / name.lower())
        for name in (
            *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR", "MPLCONFIGDIR"),
            *("CUDA_CACHE_PATH", "XDG_CACHE_HOME"),
        )
    }
    user = os.environ.get("LOGNAME") or os.environ.get("USER") or "trainer"  # not from /etc/passwd
    # Java does not know TMPDIR, and the account's home folder is not for it.
    own = " ".join(f"-D{name}={folder / TEMPORARY}" for name in ("java.io.tmpdir", "user.home"))
    java = {"JAVA_TOOL_OPTIONS": own} if rules.network else {}
    return {
        VARIABLE: msgspec.json.encode(rules).decode(),
        "TMPDIR": str(folder / TEMPORARY),
        "USER": user,
        **caches,
        **java,
    }


def enforce(rules: SandboxRules) -> None:
    """Limit this process and its later children for good. Raises CommonweightError."""
    global _enforced
    found = support()
    if rules.mode == "off" or not (found.landlock or found.seccomp):
        return
    if len(os.listdir("/proc/self/task")) > 1:
        raise CommonweightError("the sandbox must start before other threads do")
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _must(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if found.landlock:
        _restrict_files(rules, found.landlock)
    if found.seccomp:
        _restrict_calls(platform.machine(), rules.network)
    _enforced = True


_enforced = False


def refusal(err: BaseException) -> str | None:
    """What the sandbox refused, if `err` or a cause of it is such a refusal."""
    seen: set[int] = set()
    cause: BaseException | None = err
    while _enforced and cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, PermissionError) and not _is_forbidden_anyway(cause):
            if cause.filename:
                return f"the sandbox refused the task the file {os.fsdecode(cause.filename)}"
            return (
                "the sandbox refused the task a system call, such as a network connection or a "
                "signal to another program"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _is_forbidden_anyway(err: PermissionError) -> bool:
    """The mode of the file forbids it. `access` knows nothing of Landlock."""
    if not isinstance(err.filename, str | bytes | os.PathLike):
        return False
    name = os.fsdecode(err.filename)
    path = name if os.path.exists(name) else shutil.which(name) or os.path.dirname(name) or "."
    return os.path.exists(path) and not os.access(path, os.R_OK)


# --- files ----------------------------------------------------------------------------------------


def _restrict_files(rules: SandboxRules, abi: int) -> None:
    handled = _ALL_OF_ABI_1
    for since, right in _LATER.items():
        handled |= right if abi >= since else 0
    net = _NET_TCP if abi >= _NET_ABI and not rules.network else 0
    scope = _SCOPE if abi >= _SCOPE_ABI else 0
    size = 24 if abi >= _SCOPE_ABI else 16 if abi >= _NET_ABI else 8
    attributes = struct.pack("=QQQ", handled, net, scope)[:size]
    ruleset = _must(_call(_CREATE_RULESET, attributes, size, 0), "Landlock rules")
    try:
        for path, rights in _all_rules(rules):
            _allow(ruleset, path, rights & handled)
        _must(_call(_RESTRICT_SELF, ruleset, 0), "Landlock")
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
        _must(_call(_ADD_RULE, ruleset, 1, beneath, 0), f"a rule for {path}")
    finally:
        os.close(file)


def _all_rules(rules: SandboxRules) -> Iterator[tuple[str, int]]:
    run = _EXECUTE if rules.compile or rules.network else 0
    for path in _system_paths():
        yield path, _READ | run
    for pattern in ("/lib*/ld-*", "/lib*/*/ld-*", "/usr/lib*/ld-*"):  # what starts programs
        for path in glob.glob(pattern):
            yield path, _READ_FILE | _EXECUTE
    yield sys.executable, _READ_FILE | _EXECUTE
    for pattern in _DEVICES:
        for path in glob.glob(pattern):
            yield path, _READ | _WRITE_FILE | _IOCTL_DEV
    # Shared memory and semaphores of worker processes; the names of others' stay unknown.
    yield "/dev/shm", _READ_FILE | _WRITE_FILE | _TRUNCATE | _MAKE_REG | _REMOVE_FILE
    if rules.network:  # a cluster's client starts other processes, such as Java
        yield "/proc", _READ
        # Names of hosts, and of accounts: Spark does not start without its user's.
        for name in ("hosts", "hostname", "resolv.conf", "gai.conf", "services", "passwd", "group"):
            yield f"/etc/{name}", _READ_FILE
    for path in rules.read:
        yield path, _READ
    for path in rules.allowed:
        yield path, _READ | _EXECUTE
    for path in rules.listed:
        yield path, _READ_DIR
    for path in rules.write:
        yield path, _bits(_WRITE)


_DEVICES = (
    *("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"),
    *("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/dri", "/dev/kfd", "/dev/dxg"),
)


def _system_paths() -> Iterator[str]:
    """The interpreter, its packages, and what system libraries read. No accounts, no keys."""
    yield from (path for path in sys.path if os.path.isabs(path))
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


# --- system calls ---------------------------------------------------------------------------------


def _restrict_calls(machine: str, network: bool) -> None:
    program = b"".join(_filter(machine, network))
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code))
    _must(_call(_MACHINES[machine][1], 1, 1, header), "seccomp")  # on all threads


def _filter(machine: str, network: bool) -> Iterator[bytes]:
    """A BPF program: each instruction is struct sock_filter, 8 bytes."""
    architecture, _, clone, socketpair, prlimit = _MACHINES[machine]
    deny = _step(_RETURN, _ERRNO | errno.EPERM)
    allow = _step(_RETURN, _ALLOW)
    yield from (_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, architecture, 1, 0), deny)
    yield from (_step(_LOAD, _NUMBER), _step(_BELOW_X32, _X32, 0, 1), deny)
    denied = (*_DENIED[machine], *_DENIED_EVERYWHERE, *(() if network else _NETWORK[machine]))
    for number in denied:
        yield from (_step(_EQUAL, number, 0, 1), deny)
    # Its flags are in memory, which a filter cannot read; the C library then uses `clone`.
    yield from (_step(_EQUAL, _CLONE3, 0, 1), _step(_RETURN, _ERRNO | errno.ENOSYS))
    flags = [_step(_LOAD, _FIRST_ARGUMENT), _step(_ANY_OF, _NEW_NAMESPACES, 0, 1), deny, allow]
    yield from (_step(_EQUAL, clone, 0, len(flags)), *flags)
    # Limits of this process only: a limit of CPU time kills another one.
    own = [_step(_LOAD, _FIRST_ARGUMENT), _step(_EQUAL, 0, 1, 0), deny, allow]
    yield from (_step(_EQUAL, prlimit, 0, len(own)), *own)
    if not network:
        # Unix stream (1) and packet (5) pairs: a datagram socket could send to any other one.
        pair = [
            *(_step(_LOAD, _FIRST_ARGUMENT), _step(_EQUAL, 1, 1, 0), deny),
            *(_step(_LOAD, _SECOND_ARGUMENT), _step(_AND, 0xF)),
            *(_step(_EQUAL, 1, 2, 0), _step(_EQUAL, 5, 1, 0), deny, allow),
        ]
        yield from (_step(_EQUAL, socketpair, 0, len(pair)), *pair)
    yield allow


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


# --- the kernel -----------------------------------------------------------------------------------


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: Any) -> int:
    """The result of a system call, or -1; then `ctypes.get_errno` tells why."""
    given = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    call = _libc().syscall
    call.restype = ctypes.c_long
    return int(call(ctypes.c_long(number), *given))


def _must(result: int, what: str) -> int:
    if result < 0:
        why = os.strerror(ctypes.get_errno())
        raise CommonweightError(
            f"the sandbox cannot start: {what}: {why}",
            "commonweight-agent policy set sandbox off, if you trust all tasks",
        )
    return result


def _bits(rights: Iterable[int]) -> int:
    found = 0
    for right in rights:
        found |= right
    return found


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
