"""Signed structs: JSON bytes, and an Ed25519 signature over a domain and those bytes. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from protocols.errors import BadMessage
from protocols.messages.decoding import decode
from protocols.messages.envelope import Sign

T = TypeVar("T")
#: `verify(signature, signed bytes)`.
VerifySignature = Callable[[bytes, bytes], bool]

SIGNATURE_BYTES = 64
_OTHER_VERSION = (
    "install the same version of commonweight on both sides; if they have it, do not trust the "
    "sender"
)
_encode = msgspec.json.Encoder().encode


class SignedJson(Generic[T]):
    """Signs and verifies structs of one type.

    `domain` is part of the signed bytes, so a signature over one type is not valid for another.
    `name` and `signer` are for error messages.
    """

    def __init__(
        self, kind: type[T], domain: str, name: str, signer: str = "this fleet's coordinator"
    ) -> None:
        self._prefix = f"commonweight {domain} 1\n".encode()
        self._decoder = msgspec.json.Decoder(kind)
        self._name, self._signer = name, signer

    def seal(self, value: T, sign: Sign) -> tuple[bytes, bytes]:
        """The struct as JSON, and the signature over it."""
        payload = _encode(value)
        return payload, sign(self.signed_bytes(payload))

    def open(self, payload: bytes, signature: bytes, verify: VerifySignature) -> T:
        """The struct in `payload`, if `verify` accepts the signature. Raises BadMessage."""
        if not verify(signature, self.signed_bytes(payload)):
            raise BadMessage(f"the {self._name} is not signed by {self._signer}")
        return self.decode(payload)

    def decode(self, payload: bytes) -> T:
        """The struct in `payload`, without a check of its signature. Raises BadMessage."""
        return decode(self._decoder, payload, self._name, _OTHER_VERSION)

    def signed_bytes(self, payload: bytes) -> bytes:
        """The bytes that the signature covers."""
        return self._prefix + payload

    def pack(self, value: T, sign: Sign) -> bytes:
        """The signed struct as bytes: 64 bytes of signature, then JSON."""
        payload, signature = self.seal(value, sign)
        return signature + payload

    def unpack(self, data: bytes, verify: VerifySignature) -> T:
        """The struct in the result of `pack`. Raises BadMessage."""
        return self.open(data[SIGNATURE_BYTES:], data[:SIGNATURE_BYTES], verify)
