"""The join ticket: one string that says where the coordinator is and proves who it is. Pure.

`cw1.` + base64url of (MessagePack of the fields + the first 4 bytes of its SHA-256). The checksum
tells a typing error from a refusal, before anything is sent.
"""

from __future__ import annotations

import binascii
import hashlib
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from protocols.errors import TicketMalformed

PREFIX = "cw1."
_AGAIN = "copy the whole line that `commonweight ticket create` printed"


class Ticket(Struct, frozen=True, kw_only=True, array_like=True):
    """`addresses` are host:port, best first; `secret` is spent by joining."""

    addresses: Annotated[tuple[str, ...], Meta(min_length=1, max_length=16)]
    ca_sha256: Annotated[bytes, Meta(min_length=32, max_length=32)]
    id: Annotated[str, Meta(min_length=8, max_length=8)]
    secret: Annotated[bytes, Meta(min_length=16, max_length=16)]


def new_ticket(addresses: tuple[str, ...], ca_sha256: bytes) -> Ticket:
    return Ticket(
        addresses=addresses,
        ca_sha256=ca_sha256,
        id=secrets.token_hex(4),
        secret=secrets.token_bytes(16),
    )


def hash_secret(ticket_id: str, secret: bytes) -> str:
    """What the coordinator keeps of a ticket's secret (128 random bits: a plain hash suffices)."""
    return hashlib.sha256(b"commonweight ticket 1\n" + ticket_id.encode() + secret).hexdigest()


def encode(ticket: Ticket) -> str:
    body = msgspec.msgpack.encode(ticket)
    return PREFIX + urlsafe_b64encode(body + _checksum(body)).rstrip(b"=").decode()


def decode(text: str) -> Ticket:
    """The ticket in `text`. Raises TicketMalformed that says in which way it is not one."""
    text = "".join(text.split())
    if not text.startswith("cw"):
        raise TicketMalformed("this is not a ticket: a ticket begins with cw1.", _AGAIN)
    if not text.startswith(PREFIX):
        version = text.partition(".")[0]
        raise TicketMalformed(
            f"the ticket has format {version[:8]!r}; this version reads cw1",
            "update commonweight on this machine",
        )
    encoded = text[len(PREFIX) :]
    try:
        data = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except (binascii.Error, ValueError) as err:
        raise TicketMalformed("the ticket is cut or mistyped", _AGAIN) from err
    body, checksum = data[:-4], data[-4:]
    # The decoder passes over letters that it does not know, and over the last letter's spare bits.
    canonical = urlsafe_b64encode(data).rstrip(b"=").decode()
    if len(data) < 40 or _checksum(body) != checksum or canonical != encoded:
        raise TicketMalformed("the ticket is cut or mistyped (its checksum is wrong)", _AGAIN)
    try:
        return msgspec.msgpack.decode(body, type=Ticket)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise TicketMalformed(f"the ticket's fields are wrong: {err}", _AGAIN) from err


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:4]
