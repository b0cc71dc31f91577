"""The fleet's table: columns and cells, which columns fit, filter and order. Pure.

A cell is a text and a tone. The text alone carries all information; the tone only picks a color.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

from coordinator.fleet.readings import (
    SHORT_REASONS,
    current_run,
    display_name,
    has_presence,
    shown_reason,
    shown_state,
)
from coordinator.fleet.state import Fleet, Peer
from coordinator.remote import formatting as fmt
from protocols.messages.envelope import Telemetry
from protocols.messages.states import ENDED, GLYPHS, PauseReason, PeerState, label

Row = TypeVar("Row")
Tone = Literal["plain", "quiet", "edge", "good", "busy", "warn", "bad", "ask", "strong"]

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
#: Glyphs for the characters of `Peer.contributions`.
PARTICIPATION_GLYPHS = str.maketrans({"1": "■", "0": "·", "?": " "})
_RANK = {state: rank for rank, state in enumerate(PeerState)}


class Cell(NamedTuple):
    text: str
    tone: Tone = "plain"


class Column(NamedTuple, Generic[Row]):
    """A column. Widths are in characters; `min_terminal` is the narrowest terminal to show it."""

    key: str
    title: str
    min_width: int
    max_width: int
    min_terminal: int
    cell: Callable[[Row, float, int], Cell]
    right: bool = False


def peer_name(fleet: Fleet, peer_id: str) -> str:
    """The name of a peer; its id if it is no longer in the fleet."""
    return display_name(fleet.peers[peer_id]) if peer_id in fleet.peers else peer_id


# --- the fleet's table -----------------------------------------------------------------------


def state_cell(peer: Peer, now: float, width: int = 80) -> Cell:
    """Glyph, state and reason; the reason is truncated, or left out below 9 characters."""
    state, reason = shown_state(peer, now), shown_reason(peer, now)
    if len(text := label(state, reason)) <= width:
        return Cell(text, TONES[state])
    room = width - len(label(state)) - len(": ")
    if state is PeerState.AWAITING and reason:
        return Cell(fmt.truncate(label(state, peer.awaits), width), TONES[state])
    if len(reason) > room and state is not PeerState.AWAITING:
        reason = SHORT_REASONS.get(reason, reason)
    if len(reason) > room and room < 9 and state is not PeerState.AWAITING:
        reason = ""
    return Cell(fmt.truncate(label(state, reason), width), TONES[state])


def refusal(fleet: Fleet, peer: Peer) -> str:
    """Why the current run gives no work to the peer; "" if it does."""
    run = current_run(fleet)
    if run is None or run.changed.state in ENDED:
        return ""
    return run.changed.refused.get(peer.peer, "")


def fleet_state_cell(fleet: Fleet, peer: Peer, now: float, width: int = 80) -> Cell:
    """Like `state_cell`, but shows that the current run has refused an idle peer, and why."""
    if shown_state(peer, now) is PeerState.IDLE and (reason := refusal(fleet, peer)):
        return Cell(fmt.truncate(f"{GLYPHS[PeerState.OFFLINE]} refused: {reason}", width), "bad")
    return state_cell(peer, now, width)


def _name(peer: Peer, now: float, width: int) -> Cell:
    return Cell(fmt.truncate(display_name(peer), width))


def _round(peer: Peer, now: float, width: int) -> Cell:
    return Cell(str(peer.round) if peer.run else fmt.NOTHING)


def _seen(peer: Peer, now: float, width: int) -> Cell:
    return Cell(fmt.age(now - peer.seen_at) if peer.seen_at else fmt.NOTHING, "quiet")


def _working(peer: Peer, now: float) -> bool:
    return shown_state(peer, now) in (PeerState.TRAINING, PeerState.SENDING)


def _step(peer: Peer, now: float, width: int) -> Cell:
    telemetry = peer.telemetry
    if telemetry is None or not telemetry.steps or not _working(peer, now):
        return Cell("")
    return Cell(fmt.progress(telemetry.step, telemetry.steps, width), "busy")


def training_loss(peer: Peer) -> float | None:
    """The last loss of its training in this run; evaluation and jobs have none."""
    return peer.losses[-1] if peer.losses else None


def _loss(peer: Peer, now: float, width: int) -> Cell:
    if peer.diverged:
        return Cell(fmt.DIVERGED, "bad")
    return Cell(fmt.decimal(training_loss(peer)))


def smoothed_loss(peer: Peer) -> float | None:
    """The moving average of its last training losses."""
    return fmt.smooth(peer.losses)[-1] if peer.losses else None


def _smoothed(peer: Peer, now: float, width: int) -> Cell:
    return Cell(fmt.decimal(smoothed_loss(peer)))


def _trend(peer: Peer, now: float, width: int) -> Cell:
    return Cell(fmt.trend(peer.losses, width), "busy")


def _from_telemetry(text: Callable[[Telemetry], str]) -> Callable[[Peer, float, int], Cell]:
    """A cell of the last telemetry, empty without one."""
    return lambda peer, now, width: Cell(text(peer.telemetry) if peer.telemetry else fmt.NOTHING)


_sent = _from_telemetry(lambda telemetry: fmt.format_bytes(telemetry.bytes_up))
_cpu = _from_telemetry(lambda telemetry: f"{telemetry.cpu_percent:.0f} %")
_memory = _from_telemetry(lambda telemetry: fmt.format_bytes(telemetry.memory_bytes))
_samples = _from_telemetry(lambda telemetry: fmt.rate(telemetry.samples_per_s))
_battery = _from_telemetry(lambda telemetry: battery(telemetry.battery_percent))


def battery(percent: float | None) -> str:
    """The charge in percent; None without a battery."""
    return fmt.NOTHING if percent is None else f"{percent:.0f} %"


def _rate(peer: Peer, now: float, width: int) -> Cell:
    return _samples(peer, now, width) if _working(peer, now) else Cell(fmt.NOTHING)


def _participation(peer: Peer, now: float, width: int) -> Cell:
    enrolled = peer.standing == "enrolled"
    return Cell(
        peer.contributions[-width:].translate(PARTICIPATION_GLYPHS) if enrolled else "", "good"
    )


def links(peer: Peer, now: float) -> tuple[bool, bool | None]:
    """Whether MQTT messages arrive; whether it has a Flower session (None: unknown)."""
    return has_presence(peer, now), peer.flower


def status_dot(up: bool | None) -> str:
    """`●` for a link that is up, `○` for one that is down, `–` for unknown."""
    return fmt.NOTHING if up is None else "●" if up else "○"


def _links(peer: Peer, now: float, width: int) -> Cell:
    if peer.standing == "awaiting":
        return Cell(fmt.NOTHING)
    mqtt, flower = links(peer, now)
    tone: Tone = "good" if mqtt and flower is not False else "warn" if mqtt or flower else "bad"
    return Cell(f"m{status_dot(mqtt)} f{status_dot(flower)}", tone)


def _version(peer: Peer, now: float, width: int) -> Cell:
    return Cell(fmt.truncate(peer.version, width))


#: Key, title, minimum and maximum width, minimum terminal width; the last ones are dropped first.
COLUMNS: tuple[Column[Peer], ...] = (
    Column("state", "State", 19, 26, 0, state_cell),
    Column("peer", "Peer", 12, 22, 0, _name),
    Column("round", "Round", 5, 5, 0, _round, right=True),
    Column("seen", "Seen", 6, 6, 0, _seen, right=True),
    Column("step", "Step", 6, 10, 80, _step),
    Column("loss", "Loss", 10, 10, 80, _loss, right=True),
    Column("trend", "Trend", 7, 14, 80, _trend),
    Column("sent", "Sent", 7, 7, 80, _sent, right=True),
    Column("given", "Rounds", 6, 24, 120, _participation),
    Column("samples", "Samples", 7, 7, 120, _rate, right=True),
    Column("cpu", "CPU", 5, 5, 120, _cpu, right=True),
    Column("memory", "Memory", 7, 7, 120, _memory, right=True),
    Column("battery", "Battery", 7, 7, 120, _battery, right=True),
    Column("links", "Links", 5, 5, 120, _links),
    Column("smooth", "Smoothed", 9, 9, 120, _smoothed, right=True),
    Column("version", "Version", 7, 10, 120, _version),
)
GAP = 2  # blanks around each column


def fit_columns(
    columns: Sequence[Column[Row]], width: int, terminal: int
) -> list[tuple[Column[Row], int]]:
    """The columns that fit a table of `width` in this `terminal`, each with its width."""
    fitting: list[Column[Row]] = []
    left = width
    for column in columns:
        if column.min_terminal > terminal or column.min_width + GAP > left:
            break
        fitting.append(column)
        left -= column.min_width + GAP
    widths = {column.key: column.min_width for column in fitting}
    while left > 0:
        growable = [column for column in fitting if widths[column.key] < column.max_width]
        if not growable:
            break
        for column in growable[:left]:
            widths[column.key] += 1
        left -= min(left, len(growable))
    return [(column, widths[column.key]) for column in fitting]


SORTS = ("state", "peer", "round", "seen", "loss", "sent")


def sort_key(peer: Peer, column: str, now: float) -> tuple[float | str, ...]:
    """The sort key for a column of `SORTS`; states that need attention come first."""
    telemetry = peer.telemetry
    numbers: dict[str, float] = {
        "state": _RANK[shown_state(peer, now)],
        "round": -peer.round,
        "seen": -peer.seen_at,
        "loss": _loss_rank(peer),
        "sent": -(telemetry.bytes_up if telemetry else 0),
    }
    return (numbers.get(column, 0.0), display_name(peer).casefold(), peer.peer)


def _loss_rank(peer: Peer) -> float:
    if peer.diverged:
        return -1e308
    loss = training_loss(peer)
    return 1e308 if loss is None else -loss


def is_faulty(peer: Peer, now: float) -> bool:
    """True for a peer that may need attention."""
    faults = (PeerState.ERROR, PeerState.STALE, PeerState.OFFLINE)
    trainer = peer.state is PeerState.PAUSED and peer.reason.startswith(PauseReason.TRAINER)
    return peer.diverged or trainer or shown_state(peer, now) in faults


def matches(peer: Peer, query: str, now: float) -> bool:
    """True if the peer's name, id, labels, task or state contain each word of `query`."""
    labels = (f"{key}={value}" for key, value in peer.labels.items())
    text = " ".join((peer.name, peer.peer, peer.task, state_cell(peer, now).text, *labels))
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
