"""The process of a ServerApp: its pipes, its log and its end. The coordinator runs no app itself.

It works in a folder of its run, in a process group of its own and without variables that look like
logins. `commonweight.flower_apps.server` puts it into the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from coordinator.runs.apps import frames
from coordinator.runs.apps.frames import AppFrame, CoordinatorFrame, End
from protocols.errors import CommonweightError
from protocols.local.flower_apps import InstalledApp
from protocols.local.programs import child_environment, forget_secrets, signal_group

MODULE = "commonweight.flower_apps.server"
LOG = "server.log"
MAX_LOG_BYTES = 4 * 1024 * 1024
#: How long a process may take to end after it has closed its pipe.
END_WITHIN_S = 5.0
_READ_BYTES = 64 * 1024
_LAST_LINES = 3


class ServerProcess:
    """One process. `folder`: that of its run."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process, self._log = process, folder / LOG
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._copying = asyncio.create_task(self._copy_log(), name="ServerApp log")

    async def read(self) -> AppFrame:
        """The next frame. A process that has ended without one gives an End with the reason.

        Raises BadMessage.
        """
        assert self._process.stdout is not None
        try:
            head = await self._process.stdout.readexactly(frames.LENGTH_BYTES)
            body = await self._process.stdout.readexactly(frames.length_of(head))
        except asyncio.IncompleteReadError:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), END_WITHIN_S)
                await asyncio.wait_for(asyncio.shield(self._copying), END_WITHIN_S)
            last = f": {self._last[-1]}" if self._last else ""
            status = self._process.returncode
            return End(error=f"its process ended with status {status}{last}"[:400])
        return frames.decode_app_frame(body)

    async def write(self, frame: CoordinatorFrame) -> None:
        """Answer it. If the process has ended, this does nothing; see `read`."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(frames.encode(frame))
            await self._process.stdin.drain()

    async def _copy_log(self) -> None:
        """Copy what it prints to the log; what it prints without end is dropped."""
        assert self._process.stderr is not None
        left = MAX_LOG_BYTES
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self._log, flags, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            while data := await self._process.stderr.read(_READ_BYTES):
                lines = data[-2000:].decode(errors="replace").splitlines()
                self._last.extend(
                    "".join(c if c.isprintable() else "·" for c in line[:200])
                    for line in lines
                    if line.strip()
                )
                with contextlib.suppress(OSError):  # a full disk: the app must not wait for it
                    if left > 0:
                        file.write(data[:left])
                        if left <= len(data):
                            file.write(b"\n... further output is dropped\n")
                left -= len(data)

    async def _close(self) -> None:
        """End the process, and those that it has started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.returncode is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), 1.0)
        self._kill()
        await self._process.wait()
        self._copying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._copying

    def _kill(self) -> None:
        if os.name == "posix":
            signal_group(self._process.pid, signal.SIGKILL)
        else:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


@asynccontextmanager
async def started(folder: Path, app: InstalledApp) -> AsyncIterator[ServerProcess]:
    """A process for the ServerApp of an installed app. It is killed when the block ends.

    Raises CommonweightError.
    """
    for name in (frames.OUT, frames.IN):
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    environment = child_environment() | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    forget_secrets(environment)
    words = [f"--code={app.code}", *(f"--read={path}" for path in app.read)]
    words += [f"--write={path}" for path in app.write]
    words += [] if app.sandbox else ["--no-sandbox"]
    try:
        process = await asyncio.create_subprocess_exec(
            *(app.python or sys.executable, "-P", "-m", MODULE, app.folder, *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    except OSError as err:
        raise CommonweightError(f"the ServerApp cannot be started: {err.strerror}") from err
    server = ServerProcess(process, folder)
    try:
        yield server
    finally:
        await asyncio.shield(server._close())
