"""The address of a coordinator: `host:port`, or `host:port/path` behind a reverse proxy. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Address(NamedTuple):
    """The parts of an address. `host` has no brackets; `path` is empty or like `/path`."""

    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        """host:port, with brackets around an IPv6 host."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str) -> Address:
    """The parts of an address. Raises ValueError."""
    netloc, slash, path = text.partition("/")
    host, _, port = netloc.rpartition(":")
    return Address(host.strip("[]"), int(port), (slash + path).rstrip("/"))
