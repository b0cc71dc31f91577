"""Ports to listen on, and the errors of listening."""

from __future__ import annotations

import errno
import socket

from protocols.errors import CommonweightError, PortInUse, UsageError


def listenable(host: str, port: int = 0) -> int:
    """`port` if a server can listen there, or a free port for 0. Raises OSError if it cannot.

    `host` is an IP address. Another program may take the port before the server opens it.
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


def listen_error(
    err: OSError, host: str, port: int, *, port_option: str = "--port"
) -> CommonweightError:
    """The error for a server that cannot listen on `host:port`."""
    if err.errno == errno.EADDRINUSE:
        return PortInUse(f"port {port} of {host} is in use", f"choose another: {port_option} PORT")
    if err.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"this machine has no address {host}", "choose another: --host")
    hint = f"choose another: --host, {port_option}"
    return UsageError(f"cannot listen on {host}:{port}: {err.strerror or err}", hint)
