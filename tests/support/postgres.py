"""A real PostgreSQL server on a free port of 127.0.0.1, with its data in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support.fleet_harness import free_port

PASSWORD = "a password with / and @"
_WITHIN_S = 60
#: The server refuses to run as root.
_ACCOUNT = "nobody" if hasattr(os, "geteuid") and os.geteuid() == 0 else None


class Server(NamedTuple):
    """`url` is that of the user `owner`, without the password."""

    port: int

    @property
    def url(self) -> str:
        return f"postgresql://owner@127.0.0.1:{self.port}/postgres"


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
        data, port = folder / "data", free_port()
        made = [str(bin_folder / "initdb"), "-D", str(data), "-U", "owner", "--auth=scram-sha-256"]
        subprocess.run(
            [*made, f"--pwfile={password}", "--no-sync"],
            check=True,
            capture_output=True,
            user=_ACCOUNT,
            cwd=folder,
        )
        words = ["-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [str(bin_folder / "postgres"), *words],
                stdout=log,
                stderr=log,
                user=_ACCOUNT,
                cwd=folder,
            )
        try:
            ready = [str(bin_folder / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
            for _ in range(_WITHIN_S):
                if subprocess.run([*ready, "-t", "1"], capture_output=True).returncode == 0:
                    break
                assert server.poll() is None, (folder / "log").read_text()
            yield Server(port)
        finally:
            server.send_signal(signal.SIGINT)  # ends connections
            server.wait(_WITHIN_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
