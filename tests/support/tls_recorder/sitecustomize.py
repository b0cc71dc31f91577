"""Keeps a copy of all that a process sends over TLS, before it is encrypted.

Python imports this at its start if this folder is in PYTHONPATH. Each process writes to a file of
its own in the folder that SENT_VARIABLE names.
"""

from __future__ import annotations

import os
import ssl
import threading
from typing import Any

SENT_VARIABLE = "SENT_OVER_TLS"


def record(folder: str) -> None:
    """Keep what sockets and asyncio's connections send from now on."""
    lock = threading.Lock()

    def watch(kind: Any, name: str) -> None:
        send = getattr(kind, name)

        def watched(self: Any, data: Any, *rest: Any) -> Any:
            with lock, open(f"{folder}/{os.getpid()}", "ab") as file:
                file.write(data)
            return send(self, data, *rest)

        setattr(kind, name, watched)

    watch(ssl.SSLSocket, "send")
    watch(ssl.SSLObject, "write")


if SENT_VARIABLE in os.environ:
    record(os.environ[SENT_VARIABLE])
