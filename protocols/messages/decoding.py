"""Decodes bytes of others: whatever is wrong with them is a BadMessage. Pure."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from protocols.errors import BadMessage

T = TypeVar("T")

#: What msgspec raises for bytes that are malformed or nested too deep.
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode(
    decoder: msgspec.json.Decoder[T] | msgspec.msgpack.Decoder[T],
    data: bytes,
    what: str,
    hint: str = "",
) -> T:
    """The value in `data`, which the error calls a `what`. Raises BadMessage."""
    try:
        return decoder.decode(data)
    except MALFORMED as err:
        raise BadMessage(f"not a valid {what}: {err}", hint) from err
