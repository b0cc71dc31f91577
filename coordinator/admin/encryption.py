"""Files encrypted with a passphrase: scrypt (RFC 7914) for the key, AES-256-GCM for each piece.

The format: `cwsealed1\\n`, log2 of scrypt's n, a salt of 16 bytes, and 7 bytes of a nonce; then
pieces of 1 MiB with a tag of 16 bytes each. A piece's nonce ends in its number (4 bytes) and 1 for
the last piece, so pieces cannot be omitted, moved or cut off (STREAM, Hoang et al. 2015).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from protocols.errors import HomeError, Refused, UsageError
from protocols.local.os_errors import os_errors_as

MAGIC = b"cwsealed1\n"
#: Each guess at a passphrase takes 128 MB of memory and some tenths of a second.
LOG_N = 17
_MAX_LOG_N = 20
_PIECE_BYTES, _TAG_BYTES = 1 << 20, 16
_SALT_BYTES, _NONCE_BYTES = 16, 7
_HEAD_BYTES = len(MAGIC) + 1 + _SALT_BYTES + _NONCE_BYTES


def is_sealed(file: Path) -> bool:
    """True if the file is encrypted. Raises UsageError if it cannot be read."""
    with os_errors_as(UsageError, f"cannot read {file}"), file.open("rb") as source:
        return source.read(len(MAGIC)) == MAGIC


def seal(source: Path, out: Path, passphrase: str, *, log_n: int = LOG_N) -> None:
    """Encrypt `source` to the new file `out`. Raises UsageError, HomeError."""
    head = MAGIC + bytes([log_n]) + os.urandom(_SALT_BYTES + _NONCE_BYTES)
    cipher = _cipher(head, passphrase)
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as err:
        raise UsageError(f"{out} exists already", "choose another name") from err
    except OSError as err:
        raise HomeError(f"cannot write {out}: {err.strerror}") from err
    try:
        with os.fdopen(descriptor, "wb") as target, source.open("rb") as plain:
            target.write(head)
            for number, piece, last in _pieces(plain, _PIECE_BYTES):
                target.write(cipher.encrypt(_nonce(head, number, last), piece, head))
            target.flush()
            os.fsync(target.fileno())
    except OSError as err:
        out.unlink(missing_ok=True)
        raise HomeError(f"cannot write {out}: {err.strerror}") from err


def unseal(source: Path, out: Path, passphrase: str) -> None:
    """Decrypt `source` to `out`. Raises Refused (wrong passphrase, or damaged), HomeError."""
    try:
        with source.open("rb") as sealed:
            head = sealed.read(_HEAD_BYTES)
            if len(head) < _HEAD_BYTES or not head.startswith(MAGIC):
                raise HomeError(f"{source} is not an encrypted backup, or was cut off")
            if head[len(MAGIC)] > _MAX_LOG_N:
                raise HomeError(f"{source} needs too much memory for its passphrase")
            cipher = _cipher(head, passphrase)
            descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as plain:
                for number, piece, last in _pieces(sealed, _PIECE_BYTES + _TAG_BYTES):
                    plain.write(cipher.decrypt(_nonce(head, number, last), piece, head))
    except InvalidTag as err:
        raise Refused(
            f"{source} cannot be opened: the passphrase is wrong, or the file is damaged",
            "try the passphrase again; without it the backup cannot be opened",
        ) from err
    except OSError as err:
        raise HomeError(f"cannot read {source}: {err.strerror}") from err


def _cipher(head: bytes, passphrase: str) -> AESGCM:
    if not passphrase:
        raise UsageError("an empty passphrase protects nothing")
    log_n = head[len(MAGIC)]
    salt = head[len(MAGIC) + 1 : len(MAGIC) + 1 + _SALT_BYTES]
    return AESGCM(Scrypt(salt=salt, length=32, n=1 << log_n, r=8, p=1).derive(passphrase.encode()))


def _nonce(head: bytes, number: int, last: bool) -> bytes:
    return head[-_NONCE_BYTES:] + number.to_bytes(4, "big") + bytes([last])


def _pieces(file: IO[bytes], nbytes: int) -> Iterator[tuple[int, bytes, bool]]:
    """The pieces of a file: (number, bytes, whether it is the last). An empty file has one."""
    pieces = iter(partial(file.read, nbytes), b"")
    piece = next(pieces, b"")
    for number in count():
        following = next(pieces, b"")
        yield number, piece, not following
        if not following:
            return
        piece = following
