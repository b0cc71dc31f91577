"""The states of peers and runs, and their labels: glyph and word, readable without color. Pure."""

from __future__ import annotations

from enum import StrEnum


class PeerState(StrEnum):
    """The states of a peer, in the order in which the monitor lists them."""

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


#: The reason of a peer that is idle for runs, as it compares the models of an ended one.
COMPARING = "comparing"
_COMPARING_GLYPH = "◔"


class PauseReason(StrEnum):
    """Why an agent is paused, other than by its policy. The values are shown to people."""

    USER = "by its owner"
    OPERATOR = "by the operator"
    TRAINER = "trainer failed"
    DISK = "disk full"
    FORK = "refused: the coordinator showed two versions"
    WITNESS = "waiting for its witnesses"


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
    """Glyph and word of a state, as shown everywhere: `‖ paused: battery`.

    A peer awaits approval, or with a reason that: `? awaiting consent: tabular`. One that compares
    models says so: `◔ comparing`.
    """
    if state is PeerState.IDLE and reason == COMPARING:
        return f"{_COMPARING_GLYPH} {COMPARING}"
    word = state.value
    if state is PeerState.AWAITING:
        word, reason = f"{word} {reason or 'approval'}", ""
    return f"{GLYPHS[state]} {word}" + (f": {reason}" if reason else "")
