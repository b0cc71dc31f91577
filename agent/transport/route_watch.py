"""Detects a changed network route to the coordinator: another address or network.

Connections opened before such a change are dead, but the system reports this only after a timeout
of half a minute. The check sends no packet and makes no DNS request.
"""

from __future__ import annotations

import socket
import time

#: Minimum time between two reconnects for this reason: two routes may alternate.
_MIN_INTERVAL_S = 10.0


def local_address(host: str) -> str | None:
    """Returns the local address for packets to `host` (an IP address); None without a route."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


class RouteState:
    """Compares the last connection's route with the current one. Pure."""

    def __init__(self) -> None:
        self._was_cut = False
        self._reported_at = float("-inf")

    def has_changed(self, used: str, current: str | None, now: float) -> bool:
        """True if open connections are dead and a new one may work.

        `used` is the local address of the last connection, `current` the one now.
        """
        if current is None:
            self._was_cut = True
            return False
        if not self._was_cut and current == used:
            return False
        if now - self._reported_at < _MIN_INTERVAL_S:
            return False  # the next check sees it again
        self._was_cut, self._reported_at = False, now
        return True


class RouteWatch:
    """Checks the route that the last connection took."""

    def __init__(self) -> None:
        self._state = RouteState()

    def has_changed(self, addresses: tuple[str, str]) -> bool:
        """Checks the route. `addresses`: local and remote IP address, empty before the first."""
        local, remote = addresses
        return bool(remote) and self._state.has_changed(
            local, local_address(remote), time.monotonic()
        )
