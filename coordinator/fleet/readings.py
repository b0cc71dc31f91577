"""Readings of the fleet's state: the shown state of a peer, counts, the current run. Pure."""

from __future__ import annotations

from coordinator.fleet.state import NOT_SEEN, Fleet, Peer, Run
from protocols.messages.states import AVAILABLE, ENDED, PeerState, label

#: A training peer sends telemetry about every second.
STALE_WORKING_S = 30.0
#: Any other peer repeats its presence at least every 30 s: three are missing.
STALE_IDLE_S = 90.0

#: Reasons for a state that the coordinator derives from a peer's requests.
NO_PRESENCE, SESSION_ENDED = "MQTT presence missing", "session ended"
#: For a peer whose presence arrives, but that cannot get work.
NO_SESSION = "Flower session missing"

#: For columns that are too narrow for the whole reason.
SHORT_REASONS = {NO_PRESENCE: "no MQTT", NO_SESSION: "no Flower"}
_SILENT = frozenset({PeerState.OFFLINE, PeerState.STALE})
_HAVE_REASONS = frozenset({PeerState.PAUSED, PeerState.OFFLINE, PeerState.ERROR})


def display_name(peer: Peer) -> str:
    """The peer's name, or its id if it has none."""
    return peer.name or peer.peer


def shown_state(peer: Peer, now: float) -> PeerState:
    """The peer's own state, unless it awaits approval or consent, or was silent for too long."""
    if peer.standing == "awaiting":
        return PeerState.AWAITING
    if not peer.no_presence and peer.state not in (PeerState.OFFLINE, PeerState.ERROR):
        working = peer.state in (PeerState.TRAINING, PeerState.SENDING)
        if now - peer.seen_at > (STALE_WORKING_S if working else STALE_IDLE_S):
            return PeerState.STALE
    if peer.state is PeerState.IDLE and peer.awaits_consent:
        return PeerState.AWAITING
    return peer.state


def has_presence(peer: Peer, now: float) -> bool:
    """Whether its MQTT messages arrive."""
    return not peer.no_presence and shown_state(peer, now) not in _SILENT


def is_unclear(peer: Peer) -> bool:
    """True if the peer may be at work while its presence does not arrive or says offline.

    This lasts some seconds after a restart of the coordinator or of the broker.
    """
    is_offline = peer.state is PeerState.OFFLINE
    return peer.no_presence or (is_offline and (bool(peer.flower) or peer.reason == NOT_SEEN))


def shown_reason(peer: Peer, now: float) -> str:
    """Why the peer is in its shown state, or which of its two connections is missing."""
    state = shown_state(peer, now)
    if state is PeerState.AWAITING:
        return f"{peer.awaits}: {peer.awaits_consent}" if peer.awaits_consent else ""
    if peer.no_presence or state in _HAVE_REASONS:
        return peer.reason
    return NO_SESSION if state in AVAILABLE and peer.flower is False else ""


def describe_state(peer: Peer, now: float) -> str:
    """Glyph, state and reason, as every view shows these: `● training: MQTT presence missing`."""
    return label(shown_state(peer, now), shown_reason(peer, now))


def is_available(peer: Peer, now: float) -> bool:
    """True if it could get work now. Its presence may be missing, its session may not."""
    return peer.flower is not False and shown_state(peer, now) in AVAILABLE


def num_available(fleet: Fleet, now: float) -> int:
    """The number of peers that could get work now."""
    return sum(is_available(peer, now) for peer in fleet.peers.values())


def num_without_presence(fleet: Fleet) -> int:
    """The number of peers that are connected, but not over MQTT."""
    return sum(peer.no_presence for peer in fleet.peers.values())


def num_enrolled(fleet: Fleet) -> int:
    """The number of approved peers."""
    return sum(peer.standing == "enrolled" for peer in fleet.peers.values())


def current_run(fleet: Fleet) -> Run | None:
    """The active run, or else the one that changed last."""
    runs = reversed(fleet.runs.values())
    return max(runs, key=lambda run: (run.changed.state not in ENDED, run.changed_at), default=None)
