"""The mDNS announcement of a coordinator in its network: no secrets, and not trusted. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from protocols import VERSION
from protocols.enrollment.tickets import CA_BYTES
from protocols.messages.envelope import strip_controls

SERVICE = "_commonweight._tcp.local."
_FORMAT = "1"


class Announcement(NamedTuple):
    """A coordinator in the network. `ca`: the first `CA_BYTES` bytes of the CA's SHA-256."""

    name: str
    ca: bytes
    version: str


def encode_txt_record(name: str, ca_sha256: bytes) -> dict[str, str]:
    """The TXT record."""
    ca = ca_sha256[:CA_BYTES].hex()
    return {"v": _FORMAT, "name": name[:64], "ca": ca, "version": VERSION}


def parse_txt_record(record: Mapping[bytes, bytes | None]) -> Announcement | None:
    """The announcement in a TXT record; None if it is not ours or has another format."""
    try:
        fields = {key.decode(): (value or b"").decode() for key, value in record.items()}
        ca = bytes.fromhex(fields["ca"])
    except (UnicodeDecodeError, KeyError, ValueError):
        return None
    if fields.get("v") != _FORMAT or len(ca) != CA_BYTES:
        return None
    name, version = (strip_controls(fields.get(key, ""))[:64] for key in ("name", "version"))
    return Announcement(name, ca, version)
