"""The sandbox of the trainer on Linux: Landlock limits its files, seccomp its system calls.

A task gets no network, reads what `file_access` names, and writes only its work folders.
`agent.trainer.sandboxed` enforces the rules on itself, before any library starts a thread, and
becomes the trainer. Both mechanisms (`landlock`, `seccomp`) pass on to its children and cannot be
lifted.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec
from msgspec.structs import replace

from agent.policy import bubblewrap, landlock, seccomp
from agent.policy.file_access import Mode, SandboxRules, all_rules
from agent.policy.system_calls import libc, must
from protocols.errors import CommonweightError, TrainerFailed

#: The rules travel to the child in its environment, where other users cannot read them.
VARIABLE = "COMMONWEIGHT_AGENT_TRAINER_SANDBOX"
_INSIDE = "COMMONWEIGHT_AGENT_TRAINER_SANDBOX_INSIDE"
KIND = "sandbox"
#: Where a trainer puts temporary files: a folder in its work folder.
TEMPORARY = "tmp"
_PR_SET_NO_NEW_PRIVS = 38
HINT = "if you trust the task with it: commonweight-agent policy set sandbox_read PATH"


class Support(NamedTuple):
    """The version of Landlock (0: none), and whether seccomp filters work, and bubblewrap if there
    is no Landlock."""

    landlock: int
    seccomp: bool
    bwrap: bool = False

    def lacks(self) -> list[str]:
        """What is needed and missing on this machine."""
        if sys.platform != "linux":
            return ["Linux"]
        found = []
        if self.landlock < landlock.MIN_VERSION and not self.bwrap:
            least = landlock.MIN_VERSION
            found.append(
                f"Landlock {least} (Linux 6.2, with landlock in /sys/kernel/security/lsm) or "
                "bubblewrap that may make namespaces (apt install bubblewrap)"
            )
        if not self.seccomp:
            found.append("seccomp filters (on x86_64 or aarch64)")
        return found

    def limits(self) -> list[str]:
        """A text about the limits of a trainer on this machine."""
        has_own_signals = self.bwrap or self.landlock >= landlock.SIGNALS_VERSION
        files = ["reads only its data, models and packages, writes only its work folder"]
        return [
            *(files if self.landlock or self.bwrap else []),
            *(["no network"] if self.seccomp or self.bwrap else []),
            *(["no signals to others"] if has_own_signals else []),
        ]


def support() -> Support:
    """What this machine can enforce. Changes nothing."""
    if sys.platform != "linux":
        return Support(0, False)
    found = landlock.version()
    is_old = found < landlock.MIN_VERSION
    return Support(found, seccomp.is_supported(), is_old and bubblewrap.works())


def describe(mode: Mode, found: Support) -> tuple[str, str]:
    """A text about the sandbox on this machine, and a hint ("" for none)."""
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
    # Java ignores TMPDIR, and must not use the account's home folder.
    own = " ".join(f"-D{name}={folder / TEMPORARY}" for name in ("java.io.tmpdir", "user.home"))
    java = {"JAVA_TOOL_OPTIONS": own} if rules.network else {}
    return {
        VARIABLE: _encode(replace(rules, bwrap=rules.bwrap or support().bwrap)),
        "TMPDIR": str(folder / TEMPORARY),
        "USER": user,
        **caches,
        **java,
    }


def take_rules() -> SandboxRules:
    """The rules of this process, from its environment."""
    return msgspec.json.decode(os.environ.pop(VARIABLE), type=SandboxRules)


def restart(rules: SandboxRules, module: str) -> NoReturn:
    """Run this module again, with the environment as it is now."""
    program = _again(rules, module)
    os.execv(program[0], program)


def restart_in_bubblewrap(rules: SandboxRules, module: str) -> NoReturn:
    """Run this module again where only the files of the rules exist."""
    program = _again(rules, module)
    words = bubblewrap.command(all_rules(rules), network=rules.network, program=program)
    os.execv(words[0], words)


def _again(rules: SandboxRules, module: str) -> list[str]:
    os.environ |= {VARIABLE: _encode(rules), _INSIDE: "1"}
    return [sys.executable, "-P", "-m", module, *sys.argv[1:]]


def has_restarted() -> bool:
    """True after `restart` or `restart_in_bubblewrap`."""
    return os.environ.pop(_INSIDE, "") != ""


def enforce(rules: SandboxRules) -> None:
    """Limit this process and its later children for good. Raises CommonweightError."""
    global _enforced
    has_landlock, has_seccomp = landlock.version() > 0, seccomp.is_supported()
    if rules.mode == "off" or not (has_landlock or has_seccomp):
        return
    if len(os.listdir("/proc/self/task")) > 1:
        raise CommonweightError("the sandbox must start before other threads do")
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    must(libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if has_landlock and not rules.bwrap:
        landlock.restrict_files(all_rules(rules), network=rules.network)
    if has_seccomp:
        seccomp.restrict_calls(network=rules.network)
    _enforced = True


_enforced = False


def _encode(rules: SandboxRules) -> str:
    return msgspec.json.encode(rules).decode()


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
    """The mode of the file forbids it. `access` does not consider Landlock."""
    if not isinstance(err.filename, str | bytes | os.PathLike):
        return False
    name = os.fsdecode(err.filename)
    path = name if os.path.exists(name) else shutil.which(name) or os.path.dirname(name) or "."
    return os.path.exists(path) and not os.access(path, os.R_OK)
