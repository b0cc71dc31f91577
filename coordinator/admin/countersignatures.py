"""Compares the ledger with what peers have signed that they saw of it.

An attacker who rewrites the ledger can recompute its hash chain, but not the heads that agents
keep. The statements in `seen.db` are signed by the peers, the heads in a file of an agent by the
coordinator.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from coordinator.fleet import fleet_events
from coordinator.fleet.fleet_events import PeerJoined, Restored
from coordinator.storage.ledger import Ledger
from coordinator.storage.seen_heads import FILE, SeenHeads
from protocols.enrollment import fork_proof
from protocols.errors import BadMessage, UsageError
from protocols.local.os_errors import os_errors_as
from protocols.messages.version_log import SIGNED_HEAD, LogHead
from protocols.p2p import seen_heads

_MAX_FILE_BYTES = 64 << 20


class SeenBy(NamedTuple):
    """`peer` has seen this head of the ledger."""

    peer: str
    head: LogHead


class Comparison(NamedTuple):
    """How many heads agree with the ledger; those that a restore explains; those that contradict
    it. The last two are texts for people."""

    agreeing: int
    explained: list[str]
    contradicting: list[str]


def stored(home: Path, ledger: Ledger) -> Iterator[SeenBy]:
    """The statements of peers to this coordinator. One without a valid signature is skipped,
    because it proves nothing."""
    if not (home / FILE).exists():
        return
    keys = {
        event.peer: event.sign_public
        for entry in ledger.entries(fleet_events.SUBJECT)
        if isinstance(event := fleet_events.decode(entry.body), PeerJoined)
    }
    with contextlib.closing(SeenHeads(home, read_only=True)) as store:
        statements = store.all()
    for one in statements:
        with contextlib.suppress(BadMessage):
            # Certificates expire, and earlier signatures stay valid.
            seen = seen_heads.read(one.data, one.peer, keys.get(one.peer, bytes(32)))
            yield SeenBy(one.peer, SIGNED_HEAD.decode(seen.head[64:]))


def from_file(path: Path, ca_pem: bytes) -> list[SeenBy]:
    """The heads in a file of `ledger audit heads` of an agent. Raises UsageError, BadMessage."""
    with os_errors_as(UsageError, f"cannot read {path}"):
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UsageError(f"{path} is too long for a file of seen heads")
        data = path.read_bytes()
    peer, heads = fork_proof.open_seen(ca_pem, data)
    return [SeenBy(peer, head) for _, head in heads]


def compare(ledger: Ledger, seen: Iterable[SeenBy]) -> Comparison:
    """Compare the ledger, whose own chain is intact, with heads of it."""
    restores: list[tuple[int, Restored, float]] = []
    names: dict[str, str] = {}
    for entry in ledger.entries(fleet_events.SUBJECT):
        match event := fleet_events.decode(entry.body):
            case Restored():
                restores.append((entry.seq, event, entry.at))
            case PeerJoined():
                names[event.peer] = event.name
            case _:
                continue
    agreeing, explained, contradicting = 0, [], []
    for peer, head in seen:
        entry_ = ledger.entry(head.ledger)
        restore = next((one for one in restores if one[1].epoch > head.epoch), None)
        if head.ledger == 0 or (entry_ is not None and entry_.hash == head.ledger_hash):
            agreeing += 1
            continue
        who = f"{names.get(peer, peer)} saw entry {head.ledger} at {_date(head.at)}"
        if restore is not None and head.ledger >= restore[0]:
            explained.append(
                f"{who}; the restore of {_date(restore[2])} went back to entry {restore[0] - 1}"
            )
        elif entry_ is None:
            contradicting.append(f"{who}, and the ledger ends before")
        else:
            contradicting.append(f"{who} with another hash than it has now")
    return Comparison(agreeing, explained, contradicting)


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
