"""Measures how far the open cohort of a secure run is. Pure."""

from __future__ import annotations

from collections.abc import Callable, Set

from coordinator.runs.secure import decisions
from coordinator.runs.secure.decisions import Progress
from coordinator.runs.secure.sum_files import step_of
from coordinator.runs.state import Run
from protocols.errors import CohortLost
from protocols.privacy.secagg.aggregator import Aggregator


def measure(
    run: Run,
    state: Aggregator,
    online: Set[str] | None,
    step_s: float,
    is_receiving: Callable[[str], bool],
) -> Progress | None:
    """How far the open cohort is. `state`: what is known of it.

    Peers that cannot get enough signatures to reveal their shares are not awaited.

    `online`: peers with a session (None: all, as after a restart). `step_s`: seconds since the step
    began. `is_receiving(peer)`: an upload of that peer is in progress.
    """
    if (cohort := run.cohort) is None:
        return None
    asked, answered = step_of(cohort, state)
    refused = {peer for peer, status in run.peers.items() if status == "refused"}
    missing = [p for p in asked if p not in answered and p not in refused]
    if state.survivors and refused:
        signers = state.signatures.keys() | (set(state.survivors) - refused)
        missing = [peer for peer in missing if state.has_group(peer, signers)]
    awaited = tuple(peer for peer in missing if online is None or peer in online)
    is_due = step_s >= decisions.step_deadline_s(run)
    if is_due and cohort.step == "mask" and step_s < run.spec.deadline_s:
        is_due = not any(map(is_receiving, awaited))
    may_lose = cohort.step == "share" or cohort.kind == "evaluate"
    return Progress(
        answered=len(answered),
        total=len(asked),
        needed=max(state.needed(), 0 if state.survivors else decisions.needs(run)),
        awaited=awaited,
        absent=frozenset(missing) - set(awaited),
        is_due=is_due,
        enough=(is_due or not awaited) and _is_enough(run, state),
        is_over=(is_due and may_lose) or step_s >= run.spec.deadline_s,
    )


def _is_enough(run: Run, state: Aggregator) -> bool:
    if state.survivors:
        return state.can_recover()
    try:
        peers = state.fix_survivors().survivors if state.sharers else state.fix_sharers().sharers
    except CohortLost:
        return False
    return len(peers) >= decisions.needs(run)
