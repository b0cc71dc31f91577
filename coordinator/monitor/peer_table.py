"""The cells of the tables: which columns fit, what stands in them, in what order. Pure.

A cell is a text and a tone. The text alone says everything; the tone only chooses a colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

from coordinator.fleet.reducer import Fleet, Peer, called, shown_state
from coordinator.remote.formatting import (
    DIVERGED,
    NOTHING,
    age,
    decimal,
    format_bytes,
    progress,
    rate,
    trend,
    truncate,
)
from protocols.messages.states import PauseReason, PeerState, label

Row = TypeVar("Row")
Tone = Literal["plain", "quiet", "good", "busy", "warn", "bad", "ask", "strong"]

TONES: dict[PeerState, Tone] = {
    PeerState.ERROR: "bad",
    PeerState.AWAITING: "ask",
    PeerState.TRAINING: "good",
    PeerState.SENDING: "busy",
    PeerState.IDLE: "plain",
    PeerState.PAUSED: "warn",
    PeerState.STALE: "quiet",
    PeerState.OFFLINE: "bad",
}
LEVELS: dict[str, tuple[str, Tone]] = {
    "info": ("·", "quiet"),
    "warning": ("▲", "warn"),
    "error": ("✕", "bad"),
}
#: By the sign of `Peer.given`.
PARTICIPATION_GLYPHS = str.maketrans({"1": "■", "0": "·", "?": " "})
_RANK = {state: rank for rank, state in enumerate(PeerState)}


class Cell(NamedTuple):
    text: str
    tone: Tone = "plain"


# --- the fleet's table -----------------------------------------------------------------------


class Column(NamedTuple, Generic[Row]):
    """A column; `least` and `most` are widths in characters, `group` its breakpoint."""

    key: str
    title: str
    min_width: int
    max_width: int
    min_terminal: int
    cell: Callable[[Row, float, int], Cell]
    right: bool = False


def state_cell(peer: Peer, now: float, width: int = 80) -> Cell:
    """Glyph and word; the reason is cut, or left out where too little of it would be seen."""
    state = shown_state(peer, now)
    reason = peer.reason if state in (PeerState.PAUSED, PeerState.OFFLINE, PeerState.ERROR) else ""
    bare = label(state)
    room = width - len(bare) - len(": ")
    if len(reason) > room and room < 9:
        reason = ""
    return Cell(truncate(label(state, reason), width), TONES[state])


def _seen(peer: Peer, now: float, width: int) -> Cell:
    return Cell(age(now - peer.seen_at) if peer.seen_at else NOTHING, "quiet")


def _step(peer: Peer, now: float, width: int) -> Cell:
    sent = peer.telemetry
    if sent is None or not sent.steps or not _working(peer, now):
        return Cell("")
    return Cell(progress(sent.step, sent.steps, width), "busy")


def _loss(peer: Peer, now: float, width: int) -> Cell:
    if peer.diverged:
        return Cell(DIVERGED, "bad")
    return Cell(decimal(peer.telemetry.loss) if peer.telemetry else NOTHING)


def _working(peer: Peer, now: float) -> bool:
    return shown_state(peer, now) in (PeerState.TRAINING, PeerState.SENDING)


def _rate(peer: Peer, now: float, width: int) -> Cell:
    working = peer.telemetry is not None and _working(peer, now)
    return Cell(rate(peer.telemetry.samples_per_s) if working and peer.telemetry else NOTHING)


def _cpu(peer: Peer, now: float, width: int) -> Cell:
    return Cell(f"{peer.telemetry.cpu_percent:.0f} %" if peer.telemetry else NOTHING)


def _participation(peer: Peer, now: float, width: int) -> Cell:
    enrolled = peer.standing == "enrolled"
    return Cell(peer.given[-width:].translate(PARTICIPATION_GLYPHS) if enrolled else "", "good")


def _battery(peer: Peer, now: float, width: int) -> Cell:
    charge = peer.telemetry.battery_percent if peer.telemetry else None
    return Cell(NOTHING if charge is None else f"{charge:.0f} %")


def links(peer: Peer, now: float) -> tuple[bool, bool | None]:
    """Whether its messages come over MQTT; whether it holds a Flower session (None: not told)."""
    return shown_state(peer, now) not in (PeerState.OFFLINE, PeerState.STALE), peer.flower


def status_dot(up: bool | None) -> str:
    """A link that is up, down, or of which nothing is known."""
    return NOTHING if up is None else "●" if up else "○"


def _links(peer: Peer, now: float, width: int) -> Cell:
    if peer.standing == "awaiting":
        return Cell(NOTHING)
    mqtt, flower = links(peer, now)
    tone: Tone = "good" if mqtt and flower is not False else "warn" if mqtt or flower else "bad"
    return Cell(f"m{status_dot(mqtt)} f{status_dot(flower)}", tone)


#: In drop order: the last ones go first when the terminal is narrow.
COLUMNS: tuple[Column[Peer], ...] = (
    Column("state", "State", 19, 26, 0, state_cell),
    Column("peer", "Peer", 12, 22, 0, lambda peer, now, width: Cell(truncate(called(peer), width))),
    Column(
        "round",
        "Round",
        5,
        5,
        0,
        lambda peer, now, width: Cell(str(peer.round) if peer.run else NOTHING),
        right=True,
    ),
    Column("seen", "Seen", 6, 6, 0, _seen, right=True),
    Column("step", "Step", 6, 10, 80, _step),
    Column("loss", "Loss", 10, 10, 80, _loss, right=True),
    Column(
        "trend",
        "Trend",
        7,
        14,
        80,
        lambda peer, now, width: Cell(trend(peer.losses, width), "busy"),
    ),
    Column(
        "sent",
        "Sent",
        7,
        7,
        80,
        lambda peer, now, width: Cell(
            format_bytes(peer.telemetry.bytes_up) if peer.telemetry else NOTHING
        ),
        right=True,
    ),
    Column("given", "Rounds", 6, 24, 120, _participation),
    Column("samples", "Samples", 7, 7, 120, _rate, right=True),
    Column("cpu", "CPU", 5, 5, 120, _cpu, right=True),
    Column(
        "memory",
        "Memory",
        7,
        7,
        120,
        lambda peer, now, width: Cell(
            format_bytes(peer.telemetry.memory_bytes) if peer.telemetry else NOTHING
        ),
        right=True,
    ),
    Column("battery", "Battery", 7, 7, 120, _battery, right=True),
    Column("links", "Links", 5, 5, 120, _links),
    Column(
        "version",
        "Version",
        7,
        10,
        120,
        lambda peer, now, width: Cell(truncate(peer.version, width)),
    ),
)
GAP = 2  # blank characters that each column takes besides its width


def fit_columns(
    columns: Sequence[Column[Row]], width: int, terminal: int
) -> list[tuple[Column[Row], int]]:
    """Those for a table `width` wide in a `terminal` wide, each with its width."""
    chosen: list[Column[Row]] = []
    left = width
    for column in columns:
        if column.min_terminal > terminal or column.min_width + GAP > left:
            break
        chosen.append(column)
        left -= column.min_width + GAP
    widths = {column.key: column.min_width for column in chosen}
    while left > 0:
        roomy = [column for column in chosen if widths[column.key] < column.max_width]
        if not roomy:
            break
        for column in roomy[:left]:
            widths[column.key] += 1
        left -= min(left, len(roomy))
    return [(column, widths[column.key]) for column in chosen]


def sort_key(peer: Peer, column: str, now: float) -> tuple[float | str, ...]:
    """What the fleet's table is sorted by; by state means: what needs a person comes first."""
    name = called(peer).casefold()
    sent = peer.telemetry
    numbers: dict[str, float] = {
        "state": _RANK[shown_state(peer, now)],
        "round": -peer.round,
        "seen": -peer.seen_at,
        "loss": _loss_rank(peer),
        "sent": -(sent.bytes_up if sent else 0),
    }
    return (numbers.get(column, 0.0), name, peer.peer)


def _loss_rank(peer: Peer) -> float:
    if peer.diverged:
        return -1e308
    loss = peer.telemetry.loss if peer.telemetry else None
    return 1e308 if loss is None else -loss


SORTS = ("state", "peer", "round", "seen", "loss", "sent")


def is_faulty(peer: Peer, now: float) -> bool:
    """True for what a person may have to look at."""
    faults = (PeerState.ERROR, PeerState.STALE, PeerState.OFFLINE)
    trainer = peer.state is PeerState.PAUSED and peer.reason.startswith(PauseReason.TRAINER)
    return peer.diverged or trainer or shown_state(peer, now) in faults


def matches(peer: Peer, query: str, now: float) -> bool:
    """True if each word is part of the peer's name, id, labels, task or shown state."""
    pairs = (f"{key}={value}" for key, value in peer.labels.items())
    text = " ".join((peer.name, peer.peer, peer.task, state_cell(peer, now).text, *pairs))
    return all(word in text.casefold() for word in query.casefold().split())


def select_peers(
    fleet: Fleet,
    now: float,
    *,
    query: str = "",
    faults_only: bool = False,
    sort_by: str = "state",
    reverse: bool = False,
) -> list[Peer]:
    """The peers to show, in order."""
    peers = [
        peer
        for peer in fleet.peers.values()
        if (not faults_only or is_faulty(peer, now)) and (not query or matches(peer, query, now))
    ]
    return sorted(peers, key=lambda peer: sort_key(peer, sort_by, now), reverse=reverse)
