"""Serve the monitor to a browser with textual-serve: on loopback only, behind a random token.

The page can do everything that the monitor can, and a browser has no operator key. So the server
listens on loopback only; the token keeps out other users and other pages of this machine.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Sequence

from coordinator.transport.ports import listenable
from protocols.errors import UsageError
from protocols.local.os_errors import os_errors_as

#: Set by the server in TEXTUAL_DRIVER, which Textual reads.
DRIVER = "coordinator.monitor.tui.pipe_driver:PipeDriver"


def is_served() -> bool:
    """True in the process of a browser's tab: the pipe on its standard output is its screen."""
    return os.environ.get("TEXTUAL_DRIVER") == DRIVER


def check_host(host: str) -> str:
    """The address to listen on. Raises UsageError unless it is a loopback address."""
    try:
        local = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as err:
        raise UsageError(f"{host!r} is not an address", "leave --host out") from err
    if not local.is_loopback:
        raise UsageError(
            f"the monitor is not served on {host}: anyone who opens the page could operate the "
            "fleet, and the page has no TLS",
            "leave --host out, and connect from elsewhere with ssh -L PORT:127.0.0.1:PORT; or "
            "watch from there with a ticket: commonweight ticket create --role observer",
        )
    return str(local)


def is_same_origin(origin: str, host: str) -> bool:
    """True for a request of the page itself; a request of another site has its own origin."""
    return origin in ("", f"http://{host}")


def serve_monitor(host: str, port: int, options: Sequence[str]) -> None:
    """Serve until Ctrl-C; `options` are those of `commonweight monitor` in each tab.

    Raises UsageError if the extra is missing, `host` is not loopback or the port is taken.
    """
    host = check_host(host)
    try:
        from coordinator.monitor.web_server import MonitorServer
    except ModuleNotFoundError as err:
        raise UsageError(
            "the monitor in a browser needs textual-serve", "pip install 'commonweight[serve]'"
        ) from err
    port = port or listenable(host)
    words = [sys.executable, "-m", "coordinator.cli", "monitor", *options]
    with os_errors_as(UsageError, f"cannot listen on {host}:{port}", "leave --port out"):
        MonitorServer(words, host, port).serve()
