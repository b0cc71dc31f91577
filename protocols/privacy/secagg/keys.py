"""The keys of a card, what two peers derive from them, and sealed shares. Pure.

Every derived key is bound to its purpose, the cohort and, for shares, the direction, so that no key
serves twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocols.errors import BadMessage
from protocols.privacy.secagg import shamir
from protocols.privacy.secagg.masks import KeyStream

SEED_BYTES = 32
_SALT = b"commonweight secagg 1"
#: A key seals one message, so its nonce is fixed.
_NONCE = bytes(12)
#: 48 bytes modulo the prime differ from a uniform number by less than 2^-127.
_DRAW_BYTES = 48


def derive(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    """32 bytes for one purpose (HKDF-SHA-256, RFC 5869). `parts` are bound with their lengths."""
    info = b"".join(len(part).to_bytes(4, "big") + part for part in (purpose.encode(), *parts))
    return HKDF(hashes.SHA256(), SEED_BYTES, _SALT, info).derive(secret)


class CardSecrets:
    """All secrets of a card, from 32 random bytes: the same bytes give the same answers again."""

    def __init__(self, master: bytes) -> None:
        self._master = master
        #: What peers share: of a survivor the first, of a dropout the second.
        self.self_seed = derive(master, "self")
        self.mask_seed = derive(master, "mask")

    @cached_property
    def mask_key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.mask_seed)

    @cached_property
    def channel_key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(derive(self._master, "channel"))

    @property
    def nonce(self) -> bytes:
        return derive(self._master, "nonce")

    def rounding_seed(self, cohort: bytes) -> bytes:
        """The seed for the stochastic rounding in this cohort."""
        return derive(self._master, "rounding", cohort)

    def split(self, cohort: bytes, threshold: int, places: range) -> list[tuple[bytes, bytes]]:
        """By place: a share of the self-mask seed and one of the mask key's seed."""
        columns = [
            shamir.split(secret, threshold, places, self._draws(f"coefficients {name}", cohort))
            for name, secret in (("self", self.self_seed), ("mask", self.mask_seed))
        ]
        return list(zip(*columns, strict=True))

    def _draws(self, purpose: str, cohort: bytes) -> Callable[[], int]:
        stream = KeyStream(derive(self._master, purpose, cohort))
        return lambda: stream.integer(_DRAW_BYTES) % shamir.PRIME


def public_of(key: X25519PrivateKey) -> bytes:
    """The 32 raw bytes of the public key."""
    return key.public_key().public_bytes_raw()


def commitment(self_seed: bytes) -> bytes:
    """The hash of the self-mask seed in a card. It exposes a false share."""
    return hashlib.sha256(_SALT + b" self\n" + self_seed).digest()


def exchange(own: X25519PrivateKey, public: bytes) -> bytes:
    """The shared secret of two keys. Raises BadMessage for a point of low order."""
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as err:
        raise BadMessage("a card contains an invalid X25519 key") from err


def self_mask(self_seed: bytes, cohort: bytes) -> bytes:
    """The seed of a peer's own mask."""
    return derive(self_seed, "self mask", cohort)


def pair_mask(own: X25519PrivateKey, public: bytes, cohort: bytes) -> bytes:
    """The seed of the mask that two peers share; both get the same."""
    return derive(exchange(own, public), "pair mask", cohort)


def tail_of(mask: bytes) -> bytes:
    """The seed for the metrics behind the weights, from the seed of a mask."""
    return derive(mask, "tail")


def words_of(mask: bytes) -> bytes:
    """The seed for the numbers of a question, from the seed of a mask."""
    return derive(mask, "question")


def _seal_key(own: X25519PrivateKey, public: bytes, cohort: bytes, way: tuple[str, str]) -> bytes:
    return derive(exchange(own, public), "share", cohort, way[0].encode(), way[1].encode())


def seal(
    own: X25519PrivateKey, public: bytes, cohort: bytes, way: tuple[str, str], text: bytes
) -> bytes:
    """Encrypt for the second peer of `way` (from, to): ChaCha20-Poly1305, RFC 8439."""
    key = _seal_key(own, public, cohort, way)
    return ChaCha20Poly1305(key).encrypt(_NONCE, text, cohort)


def unseal(
    own: X25519PrivateKey, public: bytes, cohort: bytes, way: tuple[str, str], sealed: bytes
) -> bytes:
    """Decrypt what the first peer of `way` sealed. Raises BadMessage."""
    key = _seal_key(own, public, cohort, way)
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, cohort)
    except InvalidTag as err:
        raise BadMessage(f"the share from {way[0]} was not sealed for this peer") from err
