"""Whether this machine's way to the coordinator has changed: another address, another network.

What was open before such a change is dead and nobody says so: only time-outs of half a minute would
show it. A look sends nothing and asks no DNS.
"""

from __future__ import annotations

import socket
import time

#: Between two reconnects for this reason: a machine may have two ways that take turns.
_MIN_INTERVAL_S = 10.0


def local_address(host: str) -> str | None:
    """This machine's address on packets to that host (an IP address); None if there is no way."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


class RouteState:
    """Compares the way of the last connection with the one of the moment. Pure."""

    def __init__(self) -> None:
        self._was_cut = False
        self._told_at = float("-inf")

    def has_changed(self, used: str, found: str | None, now: float) -> bool:
        """True if what was open is of no use now, and another connection may be.

        `used` is this machine's address on the last connection, `found` the one of the moment.
        """
        if found is None:
            self._was_cut = True
            return False
        if not self._was_cut and found == used:
            return False
        if now - self._told_at < _MIN_INTERVAL_S:
            return False  # seen again by the next look
        self._was_cut, self._told_at = False, now
        return True


class RouteWatch:
    """Looks at the way that the last connection took; `ends` are both its IP addresses."""

    def __init__(self) -> None:
        self._way = RouteState()

    def has_changed(self, ends: tuple[str, str]) -> bool:
        """Look; `ends` are ours and the other's, empty before the first connection."""
        own, other = ends
        return bool(other) and self._way.has_changed(own, local_address(other), time.monotonic())
