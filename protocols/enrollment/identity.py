"""Keys and peer ids. Pure, except that it reads key files.

An agent has two keys: P-384 for Flower's node authentication, Ed25519 for all else. The
coordinator has a signing key (Ed25519) for commands and versions, and a CA (`certificates`).

A peer id has four groups of four characters, like a device id of Syncthing: 15 characters of the
SHA-256 of its Ed25519 key in base32 (75 bits) and a Luhn mod 32 check character.
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from protocols.errors import BadMessage, HomeError

SigningKey = ed25519.Ed25519PrivateKey
NodeKey = ec.EllipticCurvePrivateKey

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


def new_signing_key() -> SigningKey:
    return ed25519.Ed25519PrivateKey.generate()


def new_node_key() -> NodeKey:
    return ec.generate_private_key(ec.SECP384R1())


def public_bytes(key: SigningKey) -> bytes:
    """The 32 raw bytes of the public key."""
    return key.public_key().public_bytes_raw()


def node_public_pem(key: NodeKey) -> bytes:
    """The public key in PEM, as Flower's node authentication sends it."""
    return public_pem(key.public_key())


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """An elliptic-curve public key in canonical PEM form."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def check_node_public(pem: bytes) -> None:
    """Raise BadMessage unless `pem` is a P-384 public key."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise BadMessage("the node key is not a PEM public key") from err
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise BadMessage("the node key is not a P-384 key")
    if pem != public_pem(key):  # else a removed key could come back in another encoding
        raise BadMessage("the node key is not in canonical PEM form")


@lru_cache(64)  # a peer verifies what one coordinator signs
def _sign_public(public: bytes) -> ed25519.Ed25519PublicKey:
    return ed25519.Ed25519PublicKey.from_public_bytes(public)


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """True if `signature` over `message` is valid for this Ed25519 public key."""
    try:
        _sign_public(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def peer_id(public: bytes) -> str:
    """The peer id of an Ed25519 public key: `ABCD-EFGH-IJKL-MNOP`."""
    text = base64.b32encode(hashlib.sha256(public).digest()).decode()[:15]
    text += _check_character(text)
    return "-".join(text[i : i + 4] for i in range(0, 16, 4))


def is_peer_id(text: str) -> bool:
    """True if `text` can be a peer id: its check character fits."""
    plain = text.replace("-", "")
    grouped = "-".join(plain[i : i + 4] for i in range(0, 16, 4))
    if len(plain) != 16 or grouped != text or set(plain) - set(_ALPHABET):
        return False
    return _check_character(plain[:15]) == plain[15]


def _check_character(text: str) -> str:
    """Luhn mod 32: detects every wrong letter, and all swapped neighbors except A and 7."""
    # The letter before the check character is doubled, so that swapping those two is detected.
    factor, total = 1 + len(text) % 2, 0
    for letter in text:
        addend = factor * _ALPHABET.index(letter)
        factor = 3 - factor
        total += addend // 32 + addend % 32
    return _ALPHABET[-total % 32]


def private_pem(key: SigningKey | NodeKey) -> bytes:
    """A private key in PKCS#8 PEM. Write it with `write_private`."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def load_signing_key(path: Path) -> SigningKey:
    """Read an Ed25519 key from a PEM file. Raises HomeError."""
    return parse_signing_key(_read(path), path)


def parse_signing_key(pem: bytes, path: Path) -> SigningKey:
    """The Ed25519 key in the text of this file. Raises HomeError."""
    key = _parse(pem, path)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise HomeError(f"{path} is not an Ed25519 key")
    return key


def load_node_key(path: Path) -> NodeKey:
    """Read a P-384 key from a PEM file. Raises HomeError."""
    key = _parse(_read(path), path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise HomeError(f"{path} is not an elliptic-curve key")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise HomeError(f"cannot read the key {path}: {err}") from err


def _parse(pem: bytes, path: Path) -> object:
    try:
        return serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise HomeError(f"cannot read the key {path}: {err}") from err
