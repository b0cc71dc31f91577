"""Finds coordinators that announce themselves in the local network (multicast DNS, RFC 6762).

Anybody can forge an announcement. It only gives an address to try; the CA hash in the ticket or
code decides whether to trust it.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from zeroconf import Error, ServiceBrowser, ServiceListener, Zeroconf

from protocols.enrollment.mdns import SERVICE, parse_txt_record
from protocols.enrollment.tickets import Ticket
from protocols.errors import UnknownName, Unreachable
from protocols.network.addresses import netloc
from protocols.p2p.peer_addresses import is_loopback, refuse_host

LISTEN_S = 3.0
_ANSWER_MS = 1500


class DiscoveredCoordinator(NamedTuple):
    """One coordinator. `ca` is the start of its CA's SHA-256, `addresses` are host:port."""

    name: str
    ca: bytes
    addresses: tuple[str, ...]
    version: str


class _Listener(ServiceListener):
    def __init__(self, *, allow_loopback: bool) -> None:
        self._allow_loopback = allow_loopback
        self.found: dict[str, DiscoveredCoordinator] = {}

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        info = zc.get_service_info(type_, name, _ANSWER_MS)
        record = parse_txt_record(info.properties) if info is not None else None
        if info is None or record is None or not info.port:
            return
        addresses = tuple(
            netloc(ip, info.port)
            for ip in info.parsed_scoped_addresses()
            if not refuse_host(ip, allow_loopback=self._allow_loopback)
        )
        if addresses:
            self.found[name] = DiscoveredCoordinator(
                record.name, record.ca, addresses, record.version
            )

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.found.pop(name, None)


def discover(
    within_s: float = LISTEN_S, interfaces: list[str] | None = None
) -> list[DiscoveredCoordinator]:
    """The coordinators that answer within the time, by name. `interfaces`: addresses, else all.

    Raises Unreachable if this machine cannot listen in a network.
    """
    listener = _Listener(allow_loopback=any(map(is_loopback, interfaces or ())))
    try:
        with Zeroconf(interfaces=interfaces) if interfaces else Zeroconf() as network:
            browser = ServiceBrowser(network, SERVICE, listener)
            time.sleep(within_s)
            browser.cancel()
    except (OSError, RuntimeError, Error) as err:
        raise Unreachable(
            f"cannot search the network for coordinators: {err}",
            "use the whole ticket: commonweight ticket create",
        ) from err
    return sorted(listener.found.values())


def resolve_code(code: Ticket, found: list[DiscoveredCoordinator]) -> Ticket:
    """Add to the code the addresses of the coordinators that may match. Raises UnknownName."""
    addresses = [a for one in found if one.ca == code.ca_sha256 for a in one.addresses]
    if not addresses:
        names = ", ".join(f"{one.name} ({one.addresses[0]})" for one in found) or "none"
        raise UnknownName(
            f"no coordinator in this network made this code; found: {names}",
            "is it up with --announce, in the same network? Else use the whole ticket: "
            "commonweight ticket create",
        )
    return Ticket(
        addresses=tuple(addresses[:16]), ca_sha256=code.ca_sha256, id=code.id, secret=code.secret
    )
