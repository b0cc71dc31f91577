"""This machine's address and networks on the route to the coordinator."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple

import psutil

from agent.transport.route_watch import local_address


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
        *_, address = socket.getaddrinfo(coordinator, port, type=socket.SOCK_DGRAM)[0]
    except OSError:
        return None
    host = local_address(str(address[0]))
    if host is None:
        return None
    networks = [
        # `netmask` is like 255.255.255.0 or ffff:ffff:ffff:ffff::
        str(
            ipaddress.ip_network(
                f"{host}/{int(ipaddress.ip_address(entry.netmask)).bit_count()}", strict=False
            )
        )
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.address.partition("%")[0] == host and entry.netmask
    ]
    return LocalNetwork(host, tuple(networks))
