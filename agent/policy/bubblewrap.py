"""Limits the files of a process by bubblewrap (`bwrap`), on a Linux without Landlock.

Landlock comes first, as it needs no other program, no namespaces and no privileges. Here a process
sees only the files of its rules, in namespaces of its own. Programs among them can be run.
Source: https://github.com/containers/bubblewrap.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache

from agent.policy.file_access import Access

_OPTIONS: dict[Access, str] = {
    "read": "--ro-bind-try",
    "run": "--ro-bind-try",
    "write": "--bind-try",
    "device": "--dev-bind-try",
}
#: Mounted new for the namespaces of the process.
_OWN = ("/proc", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/shm")
_TRIAL_WITHIN_S = 10.0


@cache
def works() -> bool:
    """True if bwrap is installed, and may make namespaces here."""
    if (program := shutil.which("bwrap")) is None:
        return False
    trial = [program, "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev"]
    try:
        done = subprocess.run(
            [*trial, "--proc", "/proc", "true"],
            capture_output=True,
            timeout=_TRIAL_WITHIN_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def command(rules: Iterable[tuple[str, Access]], *, network: bool, program: list[str]) -> list[str]:
    """The command that runs a program under these rules, in the present folder."""
    bwrap = shutil.which("bwrap") or "bwrap"
    namespaces = ["--unshare-all", *(["--share-net"] if network else []), "--die-with-parent"]
    own = ["--proc", "/proc", "--dev", "/dev", "--chdir", os.getcwd()]
    return [bwrap, *namespaces, *own, *_binds(rules), "--", *program]


def _binds(rules: Iterable[tuple[str, Access]]) -> Iterator[str]:
    """The options for paths: outer ones first, and of two for one path the wider one last."""
    strength = list(_OPTIONS)
    chosen = {(path, access) for path, access in rules if access in _OPTIONS}
    there: list[str] = []
    for path, access in sorted(chosen, key=lambda one: (one[0], strength.index(one[1]))):
        is_there = any(path.startswith(f"{outer}/") for outer in there)
        if path.startswith(_OWN) or (is_there and access in ("read", "run")):
            continue
        there.append(path.rstrip("/"))
        yield from (_OPTIONS[access], path, path)
