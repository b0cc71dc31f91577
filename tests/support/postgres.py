"""A real PostgreSQL server on a free port of 127.0.0.1, with its data in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.support.fleet_harness import free_port

PASSWORD = "a password with / and @"
_WITHIN_S = 60
#: The server refuses to run as root.
_ACCOUNT = "nobody" if hasattr(os, "geteuid") and os.geteuid() == 0 else None


class Server:
    """`url` is that of the user `owner`, without the password."""

    def __init__(self, bin_folder: Path, folder: Path) -> None:
        self._bin, self._folder = bin_folder, folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://owner@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        data, port = str(self._folder / "data"), str(self.port)
        words = ["-D", data, "-h", "127.0.0.1", "-p", port, "-k", str(self._folder), "-F"]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self._bin / "postgres"), *words],
                stdout=log,
                stderr=log,
                user=_ACCOUNT,
                cwd=self._folder,
            )
        ready = [str(self._bin / "pg_isready"), "-h", "127.0.0.1", "-p", port, "-t", "1"]
        for _ in range(_WITHIN_S * 5):
            if subprocess.run(ready, capture_output=True).returncode == 0:
                return
            assert self.process.poll() is None, (self._folder / "log").read_text()
            time.sleep(0.2)
        raise AssertionError((self._folder / "log").read_text())

    def crash(self) -> None:
        """Kill the server and all its processes, which is like a power cut without lost writes."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        self.process.kill()  # first, so that it starts no more of them
        for process in children:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(_WITHIN_S)
        # A server that starts beside the memory of the old one would refuse.
        psutil.wait_procs(children, _WITHIN_S)

    def stop(self) -> None:
        """End connections and the server."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(_WITHIN_S)


def programs() -> Path | None:
    """The folder of initdb and postgres; None if they are not on this machine."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


@contextmanager
def running(bin_folder: Path) -> Iterator[Server]:
    """A server that is ready, and ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own is closed for others
    try:
        password = folder / "password"
        password.write_text(PASSWORD)
        if _ACCOUNT:
            for path in (folder, password):
                shutil.chown(path, _ACCOUNT)
        made = ["initdb", "-D", str(folder / "data"), "-U", "owner", "--auth=scram-sha-256"]
        made[0] = str(bin_folder / made[0])
        subprocess.run(
            [*made, f"--pwfile={password}", "--no-sync"],
            check=True,
            capture_output=True,
            user=_ACCOUNT,
            cwd=folder,
        )
        server = Server(bin_folder, folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
