"""What became of what an operator asked for, as the fleet itself shows it. Pure.

That a command was sent says nothing: a pause is done when the peer says that it is paused.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from coordinator.fleet.reducer import Fleet, Peer, called
from protocols.messages.states import ENDED, PauseReason, PeerState, label

OperatorAction = Literal["pause", "resume", "finish", "drain", "approve", "remove", "start", "stop"]

#: Seconds after which a person is told that nothing was confirmed yet. A round may take its time.
TIMEOUT_S: dict[OperatorAction, float] = {
    "pause": 20.0,
    "resume": 20.0,
    "finish": 600.0,
    "drain": 600.0,
    "approve": 20.0,
    "remove": 20.0,
    "start": 30.0,
    "stop": 60.0,
}


class PendingAction(NamedTuple):
    """A deed that was asked for; `subject` is a peer or a run, `name` what a person calls it."""

    action: OperatorAction
    subject: str
    name: str
    deadline: float


def start_pending(deed: OperatorAction, subject: str, name: str, now: float) -> PendingAction:
    """The deed, asked for now."""
    return PendingAction(deed, subject, name, now + TIMEOUT_S[deed])


def outcome(fleet: Fleet, awaited: PendingAction) -> str:
    """Words for what has come of it, or "" while nothing has."""
    if awaited.action in ("start", "stop"):
        return _run_outcome(fleet, awaited)
    peer = fleet.peers.get(awaited.subject)
    if peer is None:
        return f"{awaited.name} is out of the fleet" if awaited.action == "remove" else ""
    return _peer_outcome(peer, awaited)


def _peer_outcome(peer: Peer, awaited: PendingAction) -> str:
    paused = peer.state is PeerState.PAUSED
    by_operator = PauseReason.OPERATOR in peer.reason
    name = called(peer)
    match awaited.action:
        case "pause" if paused and by_operator:
            return f"{name} has paused"
        case "resume" if not paused and peer.state is not PeerState.OFFLINE:
            return f"{name} goes on: {label(peer.state)}"
        case "resume" if paused and not by_operator:
            return f"{name} obeys, but is still {label(peer.state, peer.reason)}"
        case "finish" | "drain" if peer.state is PeerState.OFFLINE:
            return f"{name} has finished and left"
        case "approve" if peer.standing == "enrolled":
            return f"{name} is approved"
    return ""


def _run_outcome(fleet: Fleet, awaited: PendingAction) -> str:
    """Of a job too: it can be stopped."""
    if (job := fleet.jobs.get(awaited.subject)) is not None:
        working = job.changed.state == "working"
        return "" if working else f"job {awaited.name} has ended: {job.changed.state}"
    run = fleet.runs.get(awaited.subject)
    if run is None:
        return ""
    if awaited.action == "start":
        return f"run {awaited.name} has begun: {run.changed.state.value}"
    return f"run {awaited.name} has ended" if run.changed.state in ENDED else ""


def timeout_text(awaited: PendingAction) -> str:
    """Words for a deed whose time is over."""
    waited = f"{TIMEOUT_S[awaited.action]:.0f} s"
    return f"{awaited.action} {awaited.name}: not confirmed in {waited}; it may still happen"
