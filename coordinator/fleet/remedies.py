"""Why a peer gets no work now, and the command that changes it. Pure."""

from __future__ import annotations

from coordinator.fleet import readings
from coordinator.fleet.state import Fleet, Peer
from protocols.errors import Awaited
from protocols.messages.states import PauseReason, PeerState

_THERE = "on that machine: commonweight-agent"
#: The owner's command for each decision that is awaited.
_ANSWERS: dict[Awaited, str] = {
    "consent": "task allow {task}",
    "review": "task review {task}",
    "decision": "task allow {task} --keep",
    "columns": "task allow {task} --columns NAMES (or all)",
    "trust": "trust add ID...",
}
#: The end of a pause that the policy did not decide.
_AFTER_PAUSE = {
    PauseReason.USER: f"{_THERE} resume",
    PauseReason.OPERATOR: "commonweight peers resume {name}",
    PauseReason.TRAINER: f"why: {_THERE} status",
    PauseReason.DISK: "free some space on that machine",
    PauseReason.WITNESS: f"why: {_THERE} ledger audit",
}


def why_absent(peer: Peer, now: float) -> str:
    """Why this peer gets no work, and the remedy; empty if it can get work.

    `now` is Unix s. `‖ paused: …; on that machine: commonweight-agent policy set busy always`.
    """
    if readings.is_available(peer, now):
        return ""
    advice = remedy(peer, now)
    return readings.describe_state(peer, now) + (f"; {advice}" if advice else "")


def remedy(peer: Peer, now: float) -> str:
    """The remedy, so that this peer gets work; empty if it can get work, or if none is known."""
    match readings.shown_state(peer, now):
        case PeerState.AWAITING if peer.awaits_consent:
            return f"{_THERE} {_ANSWERS[peer.awaits].format(task=peer.awaits_consent)}"
        case PeerState.AWAITING:
            return f"commonweight peers approve {readings.display_name(peer)}"
        case PeerState.OFFLINE | PeerState.STALE:
            return f"{_THERE} up"
        # The peer names its rules, and a person types this command: only plain words are in it.
        case PeerState.PAUSED if rules := [rule for rule in peer.paused_by if rule.isidentifier()]:
            modes = (f"{rule} {'auto' if rule == 'work' else 'always'}" for rule in rules)
            changes = (f"{_THERE} policy set {mode}" for mode in modes)
            return ", and ".join([*_after_pauses(peer), *changes])
        case PeerState.PAUSED:
            return ", and ".join(_after_pauses(peer)) or f"why: {_THERE} policy now"
    return ""


def _after_pauses(peer: Peer) -> list[str]:
    """The end of each pause that the policy did not decide."""
    name = readings.display_name(peer)
    return [
        advice.format(name=name) for pause, advice in _AFTER_PAUSE.items() if pause in peer.reason
    ]


def absent_peers(fleet: Fleet, now: float) -> dict[str, str]:
    """`why_absent` of each peer that gets no work now, by its id, in the order of names."""
    peers = sorted(fleet.peers.values(), key=readings.display_name)
    reasons = {peer.peer: why_absent(peer, now) for peer in peers}
    return {peer: reason for peer, reason in reasons.items() if reason}
