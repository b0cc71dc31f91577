"""Limits the system calls of this process by a seccomp filter, on x86_64 and aarch64.

Source: https://docs.kernel.org/userspace-api/seccomp_filter.html. Importing this changes nothing.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Iterator

from agent.policy.system_calls import call, must

# The numbers of system calls.

#: Audit architecture, and `seccomp`, `clone`, `socketpair` and `prlimit64`.
_MACHINES = {
    "x86_64": (0xC000003E, 317, 56, 53, 302),
    "aarch64": (0xC00000B7, 277, 220, 199, 261),
}
#: socket, connect, accept, bind, listen, accept4.
_NETWORK = {"x86_64": (41, 42, 43, 49, 50, 288), "aarch64": (198, 203, 202, 200, 201, 242)}
#: setpgid, setsid: the agent ends a trainer with its process group.
_PROCESS_GROUPS = {"x86_64": (109, 112), "aarch64": (154, 157)}
#: mknod, symlink: the agent reads the trainer's folders and would follow a link.
_SPECIAL_FILES = {"x86_64": (133, 259, 88, 266), "aarch64": (33, 36)}
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
#: Flags of `clone`: new namespaces, and a child of the agent in place of this process.
_NEW_NAMESPACES, _CLONE_PARENT = 0x7E020000, 0x8000
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _AND, _EQUAL, _BELOW_X32, _ANY_OF, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_X32 = 0x40000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24  # struct seccomp_data


def is_supported() -> bool:
    """True if this machine has filters that can refuse a call with an error."""
    machine = platform.machine()
    if machine not in _MACHINES or struct.calcsize("P") != 8:
        return False
    action = ctypes.c_uint32(_ERRNO)
    return call(_MACHINES[machine][1], 2, 0, ctypes.byref(action)) == 0


def restrict_calls(*, network: bool) -> None:
    """Refuse the calls of attacks; without `network` also those of sockets, groups and links."""
    machine = platform.machine()
    program = b"".join(_filter(machine, network))
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code))
    must(call(_MACHINES[machine][1], 1, 1, header), "seccomp")  # on all threads


def _filter(machine: str, network: bool) -> Iterator[bytes]:
    """A BPF program: each instruction is struct sock_filter, 8 bytes."""
    architecture, _, clone, socketpair, prlimit = _MACHINES[machine]
    deny = _step(_RETURN, _ERRNO | errno.EPERM)
    allow = _step(_RETURN, _ALLOW)
    yield from (_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, architecture, 1, 0), deny)
    yield from (_step(_LOAD, _NUMBER), _step(_BELOW_X32, _X32, 0, 1), deny)
    denied = (*_DENIED[machine], *_DENIED_EVERYWHERE)
    if not network:  # of programs that read tables on a cluster, and of no task
        denied += (*_NETWORK[machine], *_PROCESS_GROUPS[machine], *_SPECIAL_FILES[machine])
    for number in denied:
        yield from (_step(_EQUAL, number, 0, 1), deny)
    # Its flags are in memory, which a filter cannot read; the C library then uses `clone`.
    yield from (_step(_EQUAL, _CLONE3, 0, 1), _step(_RETURN, _ERRNO | errno.ENOSYS))
    refused = _NEW_NAMESPACES | _CLONE_PARENT
    flags = [_step(_LOAD, _FIRST_ARGUMENT), _step(_ANY_OF, refused, 0, 1), deny, allow]
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
