"""The join ticket: one string with the coordinator's addresses and the hash of its CA. Pure.

`cw1.` + base64url of (MessagePack of the fields + the first 4 bytes of its SHA-256). The checksum
detects typing errors before anything is sent.

The short form, the code `cw1s.…`, has no addresses and half of the CA's hash. It is for a machine
that finds the coordinator in its own network; the 128 bits of the hash prove that it is the right
one.
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
from protocols.messages.decoding import MALFORMED

PREFIX = "cw1."
CODE_PREFIX = "cw1s."
#: Bytes of the CA's SHA-256 in a code and in an announcement.
CA_BYTES = 16
_COPY_AGAIN = "copy the whole line that `commonweight ticket create` printed"


class Ticket(Struct, frozen=True, kw_only=True, array_like=True):
    """A ticket for one join. `addresses` are host:port, best first; a code has none.

    `ca_sha256` is complete, or in a code its first `CA_BYTES`. `secret` is valid once. `card`: the
    number of the fleet card when the ticket was made: an older card is refused; 0 in a code.
    """

    addresses: Annotated[tuple[Annotated[str, Meta(max_length=320)], ...], Meta(max_length=16)]
    ca_sha256: Annotated[bytes, Meta(min_length=CA_BYTES, max_length=32)]
    id: Annotated[str, Meta(max_length=8, pattern=r"^[0-9a-z]{8}\Z")]
    secret: Annotated[bytes, Meta(min_length=16, max_length=16)]
    card: Annotated[int, Meta(ge=0, le=2**53)] = 0


def new_ticket(addresses: tuple[str, ...], ca_sha256: bytes, card: int = 0) -> Ticket:
    return Ticket(
        addresses=addresses,
        ca_sha256=ca_sha256,
        id=secrets.token_hex(4),
        secret=secrets.token_bytes(16),
        card=card,
    )


def hash_secret(ticket_id: str, secret: bytes) -> str:
    """The hash of a ticket's secret for the ledger (128 random bits, so a plain hash is enough)."""
    return hashlib.sha256(b"commonweight ticket 1\n" + ticket_id.encode() + secret).hexdigest()


def matches_ca(ticket: Ticket, fingerprint: bytes) -> bool:
    """True if the ticket is for the CA with this SHA-256."""
    return fingerprint.startswith(ticket.ca_sha256)


def encode(ticket: Ticket) -> str:
    return _with_checksum(PREFIX, msgspec.msgpack.encode(ticket))


def encode_code(ticket: Ticket) -> str:
    """The ticket's short form."""
    body = bytes.fromhex(ticket.id) + ticket.ca_sha256[:CA_BYTES] + ticket.secret
    return _with_checksum(CODE_PREFIX, body)


def _with_checksum(prefix: str, body: bytes) -> str:
    return prefix + urlsafe_b64encode(body + _checksum(body)).rstrip(b"=").decode()


def decode(text: str) -> Ticket:
    """The ticket in `text`, which may also be a code. Raises TicketMalformed."""
    text = "".join(text.split())
    if not text.startswith("cw"):
        raise TicketMalformed("this is not a ticket: a ticket starts with cw1.", _COPY_AGAIN)
    if text.startswith(CODE_PREFIX):
        body = _check_body(text[len(CODE_PREFIX) :])
        ca, secret = body[4 : 4 + CA_BYTES], body[4 + CA_BYTES :]
        if len(secret) != 16:
            raise TicketMalformed("the code's length is wrong", _COPY_AGAIN)
        return Ticket(addresses=(), ca_sha256=ca, id=body[:4].hex(), secret=secret)
    if not text.startswith(PREFIX):
        version = text.partition(".")[0]
        raise TicketMalformed(
            f"the ticket has format {version[:8]!r}; this version reads cw1",
            "update commonweight on this machine",
        )
    try:
        ticket = msgspec.msgpack.decode(_check_body(text[len(PREFIX) :]), type=Ticket)
    except MALFORMED as err:
        raise TicketMalformed(f"the ticket's fields are wrong: {err}", _COPY_AGAIN) from err
    if not ticket.addresses or len(ticket.ca_sha256) != 32:
        raise TicketMalformed("the ticket's fields are wrong: no address, or no hash", _COPY_AGAIN)
    return ticket


def _check_body(encoded: str) -> bytes:
    """The bytes before the checksum. Raises TicketMalformed."""
    try:
        data = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except (binascii.Error, ValueError) as err:
        raise TicketMalformed("the ticket is truncated or mistyped", _COPY_AGAIN) from err
    body, checksum = data[:-4], data[-4:]
    # The decoder ignores characters that it does not know, and spare bits of the last character.
    canonical = urlsafe_b64encode(data).rstrip(b"=").decode()
    if len(data) < 40 or _checksum(body) != checksum or canonical != encoded:
        raise TicketMalformed(
            "the ticket is truncated or mistyped (its checksum is wrong)", _COPY_AGAIN
        )
    return body


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:4]
