"""This machine's address and networks on the route to the coordinator."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple

import psutil


class LocalNetwork(NamedTuple):
    """This machine's address on that route, and the interface's networks in CIDR notation."""

    host: str
    networks: tuple[str, ...]

    @property
    def is_private(self) -> bool:
        """True for a private address that is neither loopback nor link-local."""
        address = ipaddress.ip_address(self.host)
        return address.is_private and not address.is_loopback and not address.is_link_local


def locate(coordinator: str, port: int) -> LocalNetwork | None:
    """Returns the local end of the route to a host, or None without a route. Sends no packet."""
    try:
        family, _, _, _, there = socket.getaddrinfo(coordinator, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)
            host = str(probe.getsockname()[0])
    except OSError:
        return None
    networks = [
        str(ipaddress.ip_network(f"{host}/{_prefix(entry.netmask)}", strict=False))
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.address.partition("%")[0] == host and entry.netmask
    ]
    return LocalNetwork(host, tuple(networks))


def _prefix(netmask: str) -> int:
    """The prefix length of a netmask: `255.255.255.0` or `ffff:ffff:ffff:ffff::`."""
    return int(ipaddress.ip_address(netmask)).bit_count()
