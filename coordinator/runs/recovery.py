"""Recovers the versions of a run from its peers when the coordinator's disk was lost. Pure.

Each peer keeps the last versions it worked on, with the coordinator's signature over run, round and
digest. All peers are asked what they have, and the newest version with a valid proof is fetched
from one of them. The ledger may be older than that version; the rounds in between are then known by
number only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from coordinator.runs import steps
from coordinator.runs.rollback import present
from coordinator.runs.state import Run
from coordinator.storage.run_events import Holding
from protocols.errors import BadMessage, UpdateRefused
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_WORK
from protocols.p2p.gossip import version_number

#: How long to wait for peers with a newer version.
LISTEN_S = 30.0


def decide(run: Run, eligible: frozenset[str], deadline_passed: bool) -> steps.Step:
    """The next step of a run that is fetching its versions."""
    if run.target_version is not None:
        return _fetch(run, eligible, run.target_version, deadline_passed)
    if new := {p for p in eligible if run.peers.get(p, "lost") == "lost"}:
        return steps.AskPeers(tuple(sorted(new)))
    if not run.peers or not deadline_passed:
        return steps.Wait(
            f"what its peers have of its versions ({len(run.holdings)} have answered)"
        )
    holders = Counter(held for held in run.holdings.values() if held)
    newest = max(holders, key=lambda held: (held.round, holders[held], held.digest), default=None)
    if run.head_intact and (newest is None or newest.round <= run.round):
        return steps.KeepOwn()
    if newest is not None:
        return steps.FetchVersion(newest)
    if run.ordered is not None and not run.ended_because:
        return steps.BeginModel(present(run).model, "no peer has a version of it after a restore")
    if run.ended_because:
        return steps.EndRun(RunState.FINISHED, f"{run.ended_because}; its versions are lost")
    return steps.Wait("a peer that has a version of it")


def _fetch(
    run: Run, eligible: frozenset[str], version: Holding, deadline_passed: bool
) -> steps.Step:
    if run.pending and not deadline_passed:
        return steps.Wait(f"version {version.digest[:12]} from a peer that has it")
    holders = {peer for peer, held in run.holdings.items() if held == version}
    others = holders & eligible - (set(run.pending) if len(holders) > 1 else set())
    if others:
        return steps.AskPeers((min(others),))
    return steps.Wait(f"the return of a peer that has version {version.digest[:12]}")


def verify_proof(
    run: Run, proof: tuple[bytes, bytes] | None, verify: Callable[[bytes, bytes], bool], fleet: str
) -> Holding | None:
    """The version of this run that a signed work message proves. Raises UpdateRefused.

    Work of older coordinators names no fleet.
    """
    if proof is None:
        return None
    try:
        work = SIGNED_WORK.open(*proof, verify)
    except BadMessage as err:
        raise UpdateRefused("bad proof", err.message) from err
    if work.fleet not in ("", fleet):
        raise UpdateRefused("bad proof", f"it is of fleet {work.fleet}")
    if work.run != run.id or not work.base or work.kind not in ("train", "evaluate"):
        raise UpdateRefused("bad proof", "it proves no version of this run")
    if run.ordered is not None and work.settings.get("model") != present(run).model:
        return None  # of another model, whose beginning the backup lacks
    return Holding(version_number(work), work.base)
