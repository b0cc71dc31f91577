"""Whether this machine's way to the coordinator has changed: another address, another network.

What was open before such a change is dead and nobody says so: only time-outs of half a minute would
show it. A look sends nothing and asks no DNS.
"""

from __future__ import annotations

import socket
import time

#: Between two reconnects for this reason: a machine may have two ways that take turns.
_APART_S = 10.0


def source(host: str) -> str | None:
    """This machine's address on packets to that host (an IP address); None if there is no way."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


class Way:
    """Remembers the last way that was there. Pure."""

    def __init__(self) -> None:
        self._last: str | None = None
        self._was_cut = False
        self._told_at = float("-inf")

    def has_changed(self, found: str | None, now: float) -> bool:
        """True if what was open is of no use now, and another connection may be."""
        if found is None:
            self._was_cut = self._last is not None
            return False
        changed = self._last is not None and (self._was_cut or found != self._last)
        if changed and now - self._told_at < _APART_S:
            return False  # remembered as it was, so told later
        self._last, self._was_cut = found, False
        if changed:
            self._told_at = now
        return changed


class RouteWatch:
    """The way to a host that becomes known, and may become another, with each connection."""

    def __init__(self) -> None:
        self._host = ""
        self._way = Way()

    def has_changed(self, host: str) -> bool:
        """Look again; `host` is where the last connection went, empty before the first."""
        if host != self._host:
            self._host, self._way = host, Way()
        return bool(host) and self._way.has_changed(source(host), time.monotonic())
