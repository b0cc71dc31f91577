"""Addresses: `host:port`, or `host:port/path` of a coordinator behind a reverse proxy. Pure."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from msgspec import Meta

_PORT = r"([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5])"
CoordinatorAddress = Annotated[
    str, Meta(max_length=300, pattern=rf"^[^/\s@]+:{_PORT}(/[\w./-]*)?\Z")
]


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
