"""Finds out on which port a server can listen."""

from __future__ import annotations

import socket


def listenable(host: str, port: int = 0) -> int:
    """`port` if a server can listen there now, or a free one for 0. Raises OSError if it cannot.

    `host` is an IP address. The port may be taken again before the server opens it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows: without it, a used port is given
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:  # a port that a server has just left is free
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)
        return int(listener.getsockname()[1])
