"""The log of versions: each version that the coordinator made, in a hash chain with signed heads.

Agents follow the log and compare its heads with each other. A coordinator that shows two versions
of one round must sign two heads that no single log can have (`enrollment.fork_proof`). Pure.

    kind       meaning                                      number             digest
    run        a run was started                            0                  of its settings
    version    a version was made, or given as the first    that of the round  of the version
    back       the run continues from this earlier version  that of the round  of the version
    restore    the coordinator was restored from a backup   the new epoch      empty
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct

from protocols.messages.decoding import decode
from protocols.messages.envelope import Count, Id, MaybeDigest, MaybeId
from protocols.messages.signing import SignedJson

LOG_PATH = "/cw/v1/log/{start}"
MAX_ENTRY_BYTES, MAX_HEAD_BYTES = 512, 512
#: Of a peer's statement about a head (`p2p.seen_heads`) with its certificate.
MAX_SEEN_BYTES = 3072
#: Entries of one page, and those that travel with work.
MAX_PAGE_ENTRIES, TAIL_ENTRIES = 512, 8
#: The hash of an empty log.
START = bytes(32)

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Time = Annotated[float, Meta(ge=0, le=2**40)]
EntryKind = Literal["run", "version", "back", "restore"]
#: A statement of a peer: see `p2p.seen_heads`.
SeenBytes = Annotated[bytes, Meta(max_length=4096)]
T = TypeVar("T")


class LogEntry(Struct, frozen=True, array_like=True):
    """What happened `at` a time (Unix s)."""

    kind: EntryKind
    at: Time
    run: MaybeId = ""
    number: Count = 0
    digest: MaybeDigest = ""


class LogHead(Struct, frozen=True, array_like=True):
    """A log of `size` entries, whose chain ends with `hash`, as it was `at` a time (Unix s).

    `epoch`: that of the last restore from a backup, 0 without one. `ledger`, `ledger_hash`: the
    number and the hash of the last entry of the coordinator's ledger. `term`: that of the leader
    that signed it, higher than that of every leader before; 0 without replicas, or of an older
    coordinator.
    """

    fleet: Id
    epoch: Count
    size: Count
    hash: Hash
    ledger: Count
    ledger_hash: Hash
    at: Time
    term: Count = 0


class Restore(NamedTuple):
    """The entry of number `size` is a restore that began `epoch`."""

    size: Count
    epoch: Count


class LogPage(Struct, frozen=True, kw_only=True):
    """The entries after the first `start`, whose chain ends with `before`.

    `restores`: the last restores of the whole log, in order.
    """

    start: Count
    before: Hash
    entries: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_ENTRY_BYTES)], ...],
        Meta(max_length=MAX_PAGE_ENTRIES),
    ] = ()
    restores: Annotated[tuple[Restore, ...], Meta(max_length=64)] = ()


class LogNews(Struct, frozen=True, kw_only=True):
    """The newest signed head with an encoded page before it, and what some peers have seen."""

    head: Annotated[bytes, Meta(max_length=MAX_HEAD_BYTES)]
    page: Annotated[bytes, Meta(max_length=64 * 1024)]
    seen: Annotated[tuple[SeenBytes, ...], Meta(max_length=64)] = ()


SIGNED_HEAD = SignedJson(LogHead, "log head", "head of a log")
encode = msgspec.json.Encoder().encode
_entry = msgspec.json.Decoder(LogEntry)
_page = msgspec.json.Decoder(LogPage)


def decode_entry(data: bytes) -> LogEntry:
    """Raises BadMessage."""
    return decode(_entry, data, "entry of a log")


def decode_page(data: bytes) -> LogPage:
    """Raises BadMessage."""
    return decode(_page, data, "page of a log")


def chain(before: bytes, size: int, entry: bytes) -> bytes:
    """The hash of a log whose entry of number `size`, from 1, is `entry`."""
    sha = hashlib.sha256(b"commonweight version log 1\n" + before)
    sha.update(size.to_bytes(8, "big") + hashlib.sha256(entry).digest())
    return sha.digest()


def chain_all(before: bytes, start: int, entries: Iterable[bytes]) -> list[bytes]:
    """The hash after each of the entries that follow the first `start`."""
    hashes = []
    for size, entry in enumerate(entries, start + 1):
        before = chain(before, size, entry)
        hashes.append(before)
    return hashes


def first_repeated(
    entries: Sequence[LogEntry], last: Mapping[str, tuple[int, str]] | None = None
) -> int | None:
    """The index of a version whose run has made another of its number before, or of a run that was
    started before; None if there is none.

    `last`: by run, number and digest of its last version before these entries; -1 without one.
    """
    known = dict(last or {})
    for index, entry in enumerate(entries):
        number, digest = known.get(entry.run, (-2, ""))
        is_again = entry.kind == "run" and number > -2
        is_other = entry.kind == "version" and (
            entry.number < number or (entry.number == number and entry.digest != digest)
        )
        if is_again or is_other:
            return index
        if entry.kind != "restore":
            made = entry.kind != "run"
            known[entry.run] = (entry.number, entry.digest) if made else (-1, "")
    return None
