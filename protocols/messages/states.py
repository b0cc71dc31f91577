"""What a peer can be doing, and how it is shown: glyph + word, readable without colour. Pure."""

from __future__ import annotations

from enum import StrEnum


class PeerState(StrEnum):
    """The states of a peer, in the order in which a person wants to see them."""

    ERROR = "error"
    AWAITING = "awaiting"
    TRAINING = "training"
    SENDING = "sending"
    IDLE = "idle"
    PAUSED = "paused"
    STALE = "stale"
    OFFLINE = "offline"


GLYPHS: dict[PeerState, str] = {
    PeerState.ERROR: "!",
    PeerState.AWAITING: "?",
    PeerState.TRAINING: "●",
    PeerState.SENDING: "◐",
    PeerState.IDLE: "○",
    PeerState.PAUSED: "‖",
    PeerState.STALE: "◌",
    PeerState.OFFLINE: "✕",
}

#: States in which a peer can be given work now.
AVAILABLE = frozenset({PeerState.TRAINING, PeerState.SENDING, PeerState.IDLE})


class PauseReason(StrEnum):
    """Why an agent does not work although it runs, beside its policy. Shown word for word."""

    USER = "by its owner"
    OPERATOR = "by the operator"
    TRAINER = "trainer failed"
    DISK = "disk full"


class RunState(StrEnum):
    """The states of a run."""

    WAITING = "waiting"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    EVALUATING = "evaluating"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


#: States that a run never leaves.
ENDED = frozenset({RunState.FINISHED, RunState.STOPPED, RunState.FAILED})


def label(state: PeerState, reason: str = "") -> str:
    """Glyph and word of a state, as every screen shows it: `‖ paused: battery`."""
    word = "awaiting approval" if state is PeerState.AWAITING else state.value
    return f"{GLYPHS[state]} {word}" + (f": {reason}" if reason else "")
