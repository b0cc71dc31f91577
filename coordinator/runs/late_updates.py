"""Updates that arrive after their round has closed: added to the next version, or refused. Pure.

With `late` "fold", a request stays open for up to `max_staleness` versions. Until then its peer
gets no other work if there are enough other peers. Its update is the change of its own base and
counts 1/√(1 + staleness), as in buffered runs. With "drop", and in the last round, it is refused.
"""

from __future__ import annotations

from coordinator.runs.state import Assignment, Run
from protocols.errors import UpdateRefused
from protocols.messages.states import RunState


def base_of(run: Run, number: int) -> str:
    """The version that round `number` trains on; empty if it is no longer known."""
    if number == run.round and run.state is not RunState.WAITING:
        return run.parent
    if number == run.begun + 1:
        return run.first
    return next((c.digest for c in reversed(run.own_rounds) if c.round == number - 1), "")


def is_late(run: Run, number: int) -> bool:
    """True if round `number` accepts no more updates."""
    return (number, RunState.TRAINING) != (run.round, run.state)


def late_assignment(run: Run, peer: str, number: int) -> Assignment:
    """The assignment of a late update. Raises UpdateRefused unless the update can be folded."""
    if not run.folds_late or run.ended or run.num_versions >= run.spec.rounds:
        raise UpdateRefused("late", f"it is for round {number} (train)")
    counted = run.on_time if number == run.round else ()
    counted += next((c.on_time for c in run.history if c.round == number), ())
    buffered = {(one.peer, one.round) for one in run.buffer}
    if peer in counted or (peer, number) in buffered:
        raise UpdateRefused("replay", "this peer's answer was counted already")
    base = base_of(run, number)
    if not base or run.num_versions - (number - 1) > run.spec.max_staleness:
        raise UpdateRefused("late", f"it is for round {number}, too many versions ago")
    return Assignment(number, base)


def is_expired(run: Run, kind: str, number: int) -> bool:
    """True if replies for round `number` are too old to be used."""
    behind = run.spec.max_staleness if run.folds_late and kind == "train" else 0
    return number < run.round - behind
