"""The CA's files in a coordinator's home, and their replacement in one step.

A rotation writes everything new into one file first: from then on it is done, whatever happens.
`finish_rotation` copies it into the usual files, again after a crash in the middle.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from protocols.enrollment.joining import Chain
from protocols.errors import HomeError
from protocols.local.atomic_files import fsync_folder, write_private

CA_FILE, CA_KEY_FILE = "ca.pem", "ca.key"
#: Certificate and key of the issuer, if the CA's key is offline.
ISSUER_FILE = "issuer.pem"
T = TypeVar("T")
#: The transitions of the CA, and a rotation that is decided and not in the other files yet.
CHAIN_FILE, PENDING_FILE = "ca.chain", "ca.next"


class CaFiles(Struct, frozen=True, kw_only=True):
    """The CA of a home: its certificate (PEM), its transitions, and the key that signs here.

    `signer`: the CA's private key (PEM), or with `is_offline` an issuer's certificate and key.
    """

    ca_pem: bytes
    chain: Chain = ()
    signer: bytes
    is_offline: bool = False


def read(home: Path) -> CaFiles:
    """The CA of this home, also in the middle of a rotation. Raises OSError, HomeError."""
    if (pending := _read_pending(home)) is not None:
        return pending
    is_offline = (home / ISSUER_FILE).exists()
    ca_pem, chain = read_public(home)
    return CaFiles(
        ca_pem=ca_pem,
        chain=chain,
        signer=(home / (ISSUER_FILE if is_offline else CA_KEY_FILE)).read_bytes(),
        is_offline=is_offline,
    )


def read_public(home: Path) -> tuple[bytes, Chain]:
    """The certificate of the CA (PEM) and its transitions. Raises OSError, HomeError."""
    if (pending := _read_pending(home)) is not None:
        return pending.ca_pem, pending.chain
    chain: Chain = ()
    with contextlib.suppress(FileNotFoundError):
        chain = _decode(home / CHAIN_FILE, tuple[bytes, ...])
    return (home / CA_FILE).read_bytes(), chain


def replace(home: Path, new: CaFiles) -> None:
    """Replace the CA of a locked home. Raises OSError."""
    write_private(home / PENDING_FILE, msgspec.json.encode(new))
    finish_rotation(home)


def finish_rotation(home: Path) -> None:
    """Copy a decided rotation into the files of a locked home. Raises OSError, HomeError."""
    new = _read_pending(home)
    if new is None:
        return
    signer, unused = CA_KEY_FILE, ISSUER_FILE
    if new.is_offline:
        signer, unused = unused, signer
    write_private(home / signer, new.signer)
    (home / unused).unlink(missing_ok=True)
    write_private(home / CHAIN_FILE, msgspec.json.encode(new.chain))
    write_private(home / CA_FILE, new.ca_pem)
    (home / PENDING_FILE).unlink()
    fsync_folder(home)  # else it could come back after a later change


def _read_pending(home: Path) -> CaFiles | None:
    with contextlib.suppress(FileNotFoundError):
        return _decode(home / PENDING_FILE, CaFiles)
    return None


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise HomeError(f"{path} is damaged: {err}", "restore it from a backup") from err
