"""Outcomes of an operator's actions, read from the state of the fleet. Pure.

A sent command proves nothing: a peer has paused once it reports that it is paused.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from coordinator.fleet.readings import display_name
from coordinator.fleet.state import Fleet, Peer
from protocols.messages.states import ENDED, PauseReason, PeerState, label

OperatorAction = Literal["pause", "resume", "finish", "drain", "approve", "remove", "start", "stop"]

#: After this many seconds without an outcome a warning is shown. A round may take its time.
TIMEOUT_S = 20.0
TIMEOUTS_S: dict[OperatorAction, float] = {"finish": 600, "drain": 600, "start": 30, "stop": 60}


class PendingAction(NamedTuple):
    """An action without an outcome yet; `subject` is the id of a peer, run or job."""

    action: OperatorAction
    subject: str
    name: str
    deadline: float


def start_pending(action: OperatorAction, subject: str, name: str, now: float) -> PendingAction:
    """The action, requested now."""
    return PendingAction(action, subject, name, now + TIMEOUTS_S.get(action, TIMEOUT_S))


def outcome(fleet: Fleet, pending: PendingAction) -> str:
    """A sentence about the outcome, or "" while there is none."""
    if pending.action in ("start", "stop"):
        return _run_outcome(fleet, pending)
    peer = fleet.peers.get(pending.subject)
    if peer is None:
        return f"{pending.name} has been removed" if pending.action == "remove" else ""
    return _peer_outcome(peer, pending)


def _peer_outcome(peer: Peer, pending: PendingAction) -> str:
    paused = peer.state is PeerState.PAUSED
    by_operator = PauseReason.OPERATOR in peer.reason
    name = display_name(peer)
    match pending.action:
        case "pause" if paused and by_operator:
            return f"{name} has paused"
        case "resume" if not paused and peer.state is not PeerState.OFFLINE:
            return f"{name} has resumed: {label(peer.state)}"
        case "resume" if paused and not by_operator:
            return f"{name} may resume, but is still {label(peer.state, peer.reason)}"
        case "finish" | "drain" if peer.state is PeerState.OFFLINE:
            return f"{name} has finished and left"
        case "approve" if peer.standing == "enrolled":
            return f"{name} is approved"
    return ""


def _run_outcome(fleet: Fleet, pending: PendingAction) -> str:
    """The outcome of starting or stopping a run, or of stopping a job."""
    if (job := fleet.jobs.get(pending.subject)) is not None:
        working = job.changed.state == "working"
        return "" if working else f"job {pending.name} has ended: {job.changed.state}"
    run = fleet.runs.get(pending.subject)
    if run is None:
        return ""
    if pending.action == "start":
        return f"run {pending.name} has started: {run.changed.state.value}"
    return f"run {pending.name} has ended" if run.changed.state in ENDED else ""


def timeout_text(pending: PendingAction) -> str:
    """The warning for an action whose deadline has passed."""
    waited = f"{TIMEOUTS_S.get(pending.action, TIMEOUT_S):.0f} s"
    return f"{pending.action} {pending.name}: not confirmed in {waited}; it may still happen"
