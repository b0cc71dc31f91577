"""Runs other programs: one to its end in bounded time, or a child process of ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from protocols.errors import CommonweightError

#: Names of variables with a password, token or key, or an address that may contain one.
_SECRETS = re.compile(
    r"SECRET|PASSW|CREDENTIAL|CONNECTION_STRING|(^|_)(TOKENS?|SAS)(_|$)|_PROXY$|_DSN$"
    r"|(^|_)(API|ACCESS|AUTH|PRIVATE)_?KEY|_KEY$|DATABASE_URL$|^SSH_",
    re.IGNORECASE,
)


def child_environment(keep: Collection[str] = ()) -> dict[str, str]:
    """This environment for a child process that imports our packages.

    It has none of our own settings, which may hold secrets, except those in `keep`.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("COMMONWEIGHT") or name in keep
    }
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):  # run from a source tree
        paths = filter(None, [str(root), environment.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def forget_secrets(environment: MutableMapping[str, str]) -> bool:
    """Delete the variables that look like logins of other programs. True if there were any."""
    found = [name for name in environment if _SECRETS.search(name)]
    for name in found:
        del environment[name]
    return bool(found)


def take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Private copies of standard input and output, over which a child of ours is asked and answers.

    What foreign code in this process prints then goes to standard error, and it reads nothing.
    """
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb")


def signal_group(leader: int, sent: signal.Signals) -> None:
    """Send it to a process that began a session, and to all that it started. POSIX only."""
    with suppress(ProcessLookupError, PermissionError):  # ended; macOS raises the latter
        os.killpg(leader, sent)


def run_program(
    command: Sequence[str],
    failure: str,
    *,
    within_s: float,
    hint: str = "",
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    error_line: int = -1,
) -> bytes:
    """What the program writes to standard output.

    Raises CommonweightError if it is missing, fails, or takes longer than `within_s`. The message
    starts with `failure` and quotes the program's error, by default the last line of it.
    """
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=within_s, env=env, check=False
        )
    except OSError as err:
        raise CommonweightError(
            f"{failure}: there is no usable {command[0]} on this machine", hint
        ) from err
    except subprocess.TimeoutExpired as err:
        raise CommonweightError(f"{failure}: no result within {within_s:.0f} s", hint) from err
    if done.returncode:
        lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        why = lines[error_line] if lines else f"status {done.returncode}"
        raise CommonweightError(f"{failure}: {why}", hint)
    return done.stdout
