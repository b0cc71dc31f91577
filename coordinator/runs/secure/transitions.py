"""Transitions of secure runs. Pure.

While a cohort is open, the state of the run is AGGREGATING, or EVALUATING for an evaluation:

    aggregating ─CohortFixed─SharersFixed─MaskedUpdateAccepted…─SurvivorsFixed─> VersionCommitted
         └───────────────────────────CohortLost──> training, with the next turn
"""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.runs.state import CohortState, Run
from coordinator.storage import run_events as events
from protocols.messages.states import RunState

#: More turns than a coordinator takes after a backup was made: agents answer no turn twice.
_TURNS_OF_A_LOST_LEDGER = 64


def cohort_fixed(run: Run, event: events.CohortFixed) -> Run:
    cohort = CohortState(kind=event.kind, turn=event.turn, peers=event.peers, request=event.request)
    return replace(
        run,
        cohort=cohort,
        peers=dict.fromkeys(event.peers, "asked"),
        updates={peer: run.updates[peer] for peer in event.peers if peer in run.updates},
    )


def sharers_fixed(run: Run, event: events.SharersFixed) -> Run:
    if run.cohort is None or run.cohort.sharers:
        return run
    cohort = replace(run.cohort, sharers=event.sharers, shares=event.shares)
    return replace(run, cohort=cohort, peers=dict.fromkeys(event.sharers, "asked"))


def masked_update_accepted(run: Run, event: events.MaskedUpdateAccepted) -> Run:
    cohort, peer = run.cohort, event.peer
    if cohort is None or cohort.survivors or peer not in cohort.sharers or peer in cohort.masked:
        return run
    return replace(
        run,
        cohort=replace(cohort, masked=cohort.masked | {peer: event.digest}),
        peers=run.peers | {peer: "answered"},
    )


def survivors_fixed(run: Run, event: events.SurvivorsFixed) -> Run:
    if run.cohort is None or run.cohort.survivors:
        return run
    survivors = event.survivors
    updates = {peer: run.updates[peer] for peer in survivors if peer in run.updates}
    run = replace(
        run,
        cohort=replace(run.cohort, survivors=survivors),
        peers=dict.fromkeys(survivors, "asked"),
        updates=updates,
    )
    if run.state is not RunState.AGGREGATING:
        return run
    return replace(
        run,
        contributors=survivors,
        on_time=survivors,
        num_examples=sum(update.num_examples for update in updates.values()),
    )


def cohort_lost(run: Run, event: events.CohortLost) -> Run:
    """Train again with new keys. A lost evaluation closes the round without metrics."""
    lost = replace(run, cohort=None, peers={}, updates={})
    if run.state is not RunState.AGGREGATING:
        return lost
    return replace(
        lost,
        state=RunState.TRAINING,
        contributors=(),
        on_time=(),
        turn=run.turn + 1,
        lost_cohorts=run.lost_cohorts + 1,
    )


def next_turn(run: Run, ahead: int = 1) -> int:
    """The turn after an interruption: peers answer no turn for a second cohort."""
    return run.turn + ahead if run.spec.secure else run.turn


def turn_after_restore(run: Run) -> int:
    """The turn after the ledger was restored from a backup, which lacks the newest turns."""
    return next_turn(run, _TURNS_OF_A_LOST_LEDGER)
