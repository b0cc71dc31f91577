"""Addresses: `host:port`, or `host:port/path` of a coordinator behind a reverse proxy. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Address(NamedTuple):
    """The parts of an address. `host` has no brackets; `path` is empty or like `/path`."""

    host: str
    port: int
    path: str


def netloc(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse(text: str) -> Address:
    """The parts of an address. Raises ValueError."""
    place, slash, path = text.partition("/")
    host, _, port = place.rpartition(":")
    return Address(host.strip("[]"), int(port), (slash + path).rstrip("/"))
