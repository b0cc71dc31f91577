"""A run whose versions went with the coordinator's disk: its peers bring them back. Pure.

Each peer keeps the last versions it worked on, with the coordinator's own signature over run, round
and digest. All who come are asked what they hold; the newest version that is proven is asked of one
of its holders. The ledger may be older than that version: its rounds are then known by number only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from coordinator.runs.state import Run
from coordinator.storage.run_events import Holding
from protocols.errors import BadMessage, UpdateRefused
from protocols.messages.work import SIGNED_WORK
from protocols.p2p.gossip import version_number

#: How long to listen for a newer version than those that were told of.
LISTEN_S = 30.0


class Ask(NamedTuple):
    """Ask these peers: what they hold, or for the version that is sought."""

    peers: tuple[str, ...]


class FetchVersion(NamedTuple):
    """Take this version: nobody holds a newer one."""

    version: Holding


class KeepOwn(NamedTuple):
    """The backup's own version is as new as any."""


class GiveUp(NamedTuple):
    """The run had finished, and nobody holds a version of it."""


Step = Ask | FetchVersion | KeepOwn | GiveUp | str


def decide(run: Run, eligible: frozenset[str], due: bool) -> Step:
    """The next step; a string says what is waited for."""
    if run.target_version is not None:
        return _fetch(run, eligible, run.target_version, due)
    if new := {p for p in eligible if run.peers.get(p, "lost") == "lost"}:
        return Ask(tuple(sorted(new)))
    if not run.peers or not due:
        return f"what its peers hold of its versions ({len(run.holdings)} have told)"
    told = Counter(held for held in run.holdings.values() if held)
    newest = max(told, key=lambda held: (held.round, told[held], held.digest), default=None)
    if run.head_intact and (newest is None or newest.round <= run.round):
        return KeepOwn()
    if newest is not None:
        return FetchVersion(newest)
    if run.ended_because:
        return GiveUp()
    return "a peer that holds a version of it"


def _fetch(run: Run, eligible: frozenset[str], sought: Holding, due: bool) -> Step:
    if run.pending and not due:
        return f"version {sought.digest[:12]} from a peer that holds it"
    holders = {peer for peer, held in run.holdings.items() if held == sought}
    others = holders & eligible - (set(run.pending) if len(holders) > 1 else set())
    if others:
        return Ask((min(others),))
    return f"a peer that holds version {sought.digest[:12]} to come back"


def verify_proof(
    run: Run, proof: tuple[bytes, bytes] | None, verify: Callable[[bytes, bytes], bool]
) -> Holding | None:
    """The version of this run that a signed piece of work proves. Raises UpdateRefused."""
    if proof is None:
        return None
    try:
        work = SIGNED_WORK.open(*proof, verify)
    except BadMessage as err:
        raise UpdateRefused("bad proof", err.message) from err
    if work.run != run.id or not work.base or work.kind not in ("train", "evaluate"):
        raise UpdateRefused("bad proof", "it proves no version of this run")
    return Holding(version_number(work), work.base)
