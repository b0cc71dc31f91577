"""Coordinators that announce themselves in this machine's network (multicast DNS, RFC 6762).

An announcement is anybody's word: it says where to ask, never whom to trust. The CA hash in the
ticket or code decides.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from zeroconf import Error, ServiceBrowser, ServiceListener, Zeroconf

from protocols.enrollment.mdns import SERVICE, parse_txt_record
from protocols.enrollment.tickets import Ticket
from protocols.errors import UnknownName, Unreachable
from protocols.p2p.swarm import address_of

LISTEN_S = 3.0
_ANSWER_MS = 1500


class DiscoveredCoordinator(NamedTuple):
    """One coordinator; `ca` is the beginning of its CA's SHA-256, `addresses` are host:port."""

    name: str
    ca: bytes
    addresses: tuple[str, ...]
    version: str


class _Listener(ServiceListener):
    def __init__(self) -> None:
        self.found: dict[str, DiscoveredCoordinator] = {}

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        info = zc.get_service_info(type_, name, _ANSWER_MS)
        told = parse_txt_record(info.properties) if info is not None else None
        if info is None or told is None or not info.port:
            return
        addresses = tuple(address_of(ip, info.port) for ip in info.parsed_scoped_addresses())
        if addresses:
            self.found[name] = DiscoveredCoordinator(told.name, told.ca, addresses, told.version)

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.found.pop(name, None)


def discover(
    within_s: float = LISTEN_S, interfaces: list[str] | None = None
) -> list[DiscoveredCoordinator]:
    """The coordinators that answer in that time, by name. `interfaces`: addresses, else all.

    Raises Unreachable where nothing can be heard.
    """
    listener = _Listener()
    try:
        with Zeroconf(interfaces=interfaces) if interfaces else Zeroconf() as network:
            browser = ServiceBrowser(network, SERVICE, listener)
            time.sleep(within_s)
            browser.cancel()
    except (OSError, RuntimeError, Error) as err:
        raise Unreachable(
            f"cannot look for coordinators in a network: {err}",
            "use the whole ticket: commonweight ticket create",
        ) from err
    return sorted(listener.found.values())


def resolve_code(code: Ticket, found: list[DiscoveredCoordinator]) -> Ticket:
    """The code with the addresses of the coordinators that could be its own. Raises UnknownName."""
    addresses = [a for one in found if one.ca == code.ca_sha256 for a in one.addresses]
    if not addresses:
        seen = ", ".join(f"{one.name} ({one.addresses[0]})" for one in found) or "none"
        raise UnknownName(
            f"no coordinator in this network has made this code; seen: {seen}",
            "is it up with --announce, in the same network? else use the whole ticket: "
            "commonweight ticket create",
        )
    return Ticket(
        addresses=tuple(addresses[:16]), ca_sha256=code.ca_sha256, id=code.id, secret=code.secret
    )
