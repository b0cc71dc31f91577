"""Which addresses of peers are used: none that leads into a machine or its cloud. Pure.

A peer reports its own address, so it may lie. The coordinator passes on only an address from which
it saw the peer, or one in the private network behind it; agents check each address again.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv6Address

from protocols.network import addresses

MIN_PORT = 1024
#: Addresses at which cloud providers serve credentials, besides the link-local ones.
_METADATA = frozenset(
    ipaddress.ip_address(text) for text in ("100.100.100.200", "168.63.129.16", "fd00:ec2::254")
)
#: IPv6 networks whose addresses contain an IPv4 address: compatible, mapped, translated, 6to4,
#: Teredo.
_WITH_IPV4 = tuple(
    ipaddress.ip_network(text)
    for text in (
        "::/96",
        "::ffff:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2002::/16",
        "2001::/32",
    )
)
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_SHARED = ipaddress.ip_network("100.64.0.0/10")


def plain_ip(text: str) -> str:
    """An IP address in one spelling: without brackets, and IPv4 as such. Empty if it is none."""
    try:
        address = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return ""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def is_loopback(host: str) -> bool:
    """True for a loopback address or `localhost`."""
    ip = plain_ip(host)
    return ipaddress.ip_address(ip).is_loopback if ip else host == "localhost"


def is_private(host: str) -> bool:
    """True for an address of a private network (RFC 1918, RFC 4193, RFC 6598)."""
    ip = plain_ip(host)
    if not ip:
        return False
    address = ipaddress.ip_address(ip)
    return address.is_private or address in _SHARED


def refusal(address: str, *, allow_loopback: bool) -> str:
    """Why no peer may be asked at `address` (host:port); empty if it may be.

    `allow_loopback`: the coordinator is on this machine, and so may be the peers.
    """
    try:
        host, port, path = addresses.parse(address)
    except ValueError:
        return "it is not an IP address and a port"
    if path:
        return "it has a path"
    if not MIN_PORT <= port <= 65535:
        return f"port {port} is not in {MIN_PORT} to 65535"
    return refuse_host(host, allow_loopback=allow_loopback)


def refuse_host(host: str, *, allow_loopback: bool) -> str:
    """Why an IP address that another machine names is not used; empty if it may be."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return "it is not an IP address"
    if ip.is_loopback:
        return "" if allow_loopback else "it is a loopback address"
    if isinstance(ip, IPv6Address):
        if ip.scope_id:
            return "it names an interface"
        if any(ip in network for network in _WITH_IPV4):
            return "it is an IPv6 address that stands for an IPv4 address"
        if ip.is_site_local:
            return "it is a site-local address"
    elif ip in _THIS_NETWORK:
        return "it is an unspecified address"
    kinds = {
        "a link-local address": ip.is_link_local,
        "a multicast address": ip.is_multicast,
        "an unspecified address": ip.is_unspecified,
        "a cloud's metadata service": ip in _METADATA,
        "a reserved address": ip.is_reserved,
    }
    return next((f"it is {kind}" for kind, applies in kinds.items() if applies), "")
