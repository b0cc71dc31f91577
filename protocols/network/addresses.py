"""Where a coordinator is: `host:port`, or `host:port/path` behind a reverse proxy. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Address(NamedTuple):
    """An IPv6 `host` is without brackets; `path` is empty, or begins with / and does not end so."""

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
