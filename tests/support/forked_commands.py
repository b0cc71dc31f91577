"""Runs commands as processes that are forked after the imports, which take most of their time.

One parent process per command line has imported its `main` module and nothing else. For each
command it forks a child, which has its own process id, arguments, environment and files, runs the
package as `python -P -m` does, and exits. What a command imports later it still imports itself.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
_MAX_REQUEST = 1 << 20
#: Python and its libraries read these when they start, so a forked process cannot change them.
_READ_AT_START = ("PYTHON", "LC_", "LANG", "OMP_", "OPENBLAS_", "MKL_", "LD_", "COVERAGE_")


def can_fork(env: Mapping[str, str]) -> bool:
    """Whether a forked process with this environment is like a new one."""

    def at_start(names: Mapping[str, str]) -> dict[str, str]:
        found = {name: names[name] for name in names if name.startswith(_READ_AT_START)}
        return found | {"PYTHONPATH": str(ROOT)}

    return (
        sys.platform == "linux"
        and env.get("PYTHONPATH") == str(ROOT)
        and at_start(env) == at_start(os.environ)
    )


def run(
    words: Sequence[str], env: Mapping[str, str], given: str, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run `words`, whose first one is a package with a `main` module, and wait until it ends.

    Raises TimeoutExpired, after the process was killed.
    """
    with (
        tempfile.TemporaryFile("w+") as entered,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        entered.write(given)
        entered.seek(0)
        told, tells = os.pipe()
        try:
            _parent(words[0]).ask(words, env, (entered, out, err), tells)
        finally:
            os.close(tells)
        with open(told) as answer:
            pid = int(answer.readline())
            ended, _, _ = select.select([answer], [], [], timeout_s)
            if not ended:
                os.kill(pid, signal.SIGKILL)
                answer.read()
                raise subprocess.TimeoutExpired(list(words), timeout_s)
            code = int(answer.readline())
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(words), code, out.read(), err.read())


class _Parent:
    """The caller's side of the process that forks. That process ends when this one does."""

    def __init__(self, package: str) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-P", "-m", __name__, package, str(theirs.fileno())]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        atexit.register(self._end)

    def ask(
        self, words: Sequence[str], env: Mapping[str, str], files: Sequence[IO[str]], tells: int
    ) -> None:
        """Have `words` run with these three files; it writes pid and exit status to `tells`."""
        status = Path("/proc/self/status").read_text()
        (umask,) = re.findall(r"^Umask:\s+(\d+)$", status, re.MULTILINE)
        request = {
            "words": list(words),
            "env": dict(env),
            "cwd": os.getcwd(),
            "umask": int(umask, 8),
        }
        fds = [*(file.fileno() for file in files), tells]
        socket.send_fds(self._requests, [json.dumps(request).encode()], fds)

    def _end(self) -> None:
        self._requests.close()
        self._process.wait()


@functools.cache
def _parent(package: str) -> _Parent:
    return _Parent(package)


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a process for each request; return in that process alone, with the request."""
    woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 16)
            for pid in [*running]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    _tell(running[pid], os.waitstatus_to_exitcode(status))
                    os.close(running.pop(pid))
        if requests in ready:
            data, fds, _, _ = socket.recv_fds(requests, _MAX_REQUEST, 4)
            if not data:
                os._exit(0)
            *files, tells = fds
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number, file in enumerate(files):
                    os.dup2(file, number)
                for fd in (*fds, requests.detach(), woken, wakes, *running.values()):
                    os.close(fd)
                request: dict[str, Any] = json.loads(data)
                return request
            running[pid] = tells
            _tell(tells, pid)
            for fd in files:
                os.close(fd)


def _tell(to: int, number: int) -> None:
    with suppress(BrokenPipeError):  # the caller has gone
        os.write(to, b"%d\n" % number)


def _main(package: str, requests: int) -> None:
    importlib.import_module(f"{package}.main")
    gc.collect()
    gc.freeze()
    request = _serve(socket.socket(fileno=requests))
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["words"]
    runpy.run_module(package, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
