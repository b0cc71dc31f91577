"""A card for each peer of a small fleet: state, progress, loss and a plot of its losses. Pure."""

from __future__ import annotations

from typing import NamedTuple

from coordinator.fleet.readings import display_name, shown_state
from coordinator.fleet.state import Fleet, Peer
from coordinator.monitor import charts
from coordinator.monitor.peer_table import (
    PARTICIPATION_GLYPHS,
    Cell,
    Tone,
    fleet_state_cell,
    smoothed_loss,
    training_loss,
)
from coordinator.remote import formatting as fmt
from protocols.messages.states import PeerState

MIN_WIDTH, MAX_WIDTH = 30, 60
MIN_HEIGHT, MAX_HEIGHT = 6, 14
_GAP = 1
#: Lines of a card besides its plot: two of the border, the state, the step.
_OTHER_LINES = 4
Line = list[Cell]


class Grid(NamedTuple):
    """How the cards are laid out: their number in a row, and the size of each in characters."""

    columns: int
    width: int
    height: int


def fit_grid(count: int, width: int, height: int) -> Grid | None:
    """The grid for `count` cards; None if they do not all fit."""
    columns = min(max((width + _GAP) // (MIN_WIDTH + _GAP), 1), count)
    if count == 0 or width < MIN_WIDTH:
        return None
    rows = -(-count // columns)
    columns = -(-count // rows)  # as even as possible
    card_height = min(height // rows, MAX_HEIGHT)
    if card_height < MIN_HEIGHT:
        return None
    return Grid(columns, min((width + _GAP) // columns - _GAP, MAX_WIDTH), card_height)


def card_grid(
    fleet: Fleet, peers: list[Peer], now: float, grid: Grid, chosen: str = ""
) -> list[Line]:
    """The cards of `peers`, row by row; that of the peer `chosen` has a bright border."""
    lines: list[Line] = []
    for first in range(0, len(peers), grid.columns):
        row = [
            _card(fleet, peer, now, grid, peer.peer == chosen)
            for peer in peers[first : first + grid.columns]
        ]
        for parts in zip(*row, strict=True):
            line: Line = []
            for part in parts:
                line += [*part, Cell(" " * _GAP)]
            lines.append(line[:-1])
    return lines


def _card(fleet: Fleet, peer: Peer, now: float, grid: Grid, is_chosen: bool) -> list[Line]:
    edge: Tone = "busy" if is_chosen else "edge"
    inner = grid.width - 4
    name = f" {fmt.truncate(display_name(peer), inner - 2)} "
    top = [
        Cell("╭─", edge),
        Cell(name, "strong"),
        Cell(f"{'─' * (grid.width - 3 - len(name))}╮", edge),
    ]
    body = [_state(fleet, peer, now, inner), _step(peer, now, inner)]
    body += _plot(peer, inner, grid.height - _OTHER_LINES)
    framed = [[Cell("│ ", edge), *line, Cell(" │", edge)] for line in body]
    return [top, *framed, [Cell(f"╰{'─' * (grid.width - 2)}╯", edge)]]


def _pad(left: Cell, right: Cell, width: int) -> Line:
    """Two cells at the ends of a line of `width`; the right one stays if both do not fit."""
    right = right._replace(text=fmt.truncate(right.text, width))
    room = width - len(right.text)
    return [left._replace(text=f"{fmt.truncate(left.text, max(room - 1, 0)):<{room}}"), right]


def _state(fleet: Fleet, peer: Peer, now: float, width: int) -> Line:
    seen = Cell(fmt.age(now - peer.seen_at) if peer.seen_at else "never", "quiet")
    return _pad(fleet_state_cell(fleet, peer, now, width - len(seen.text) - 1), seen, width)


def _step(peer: Peer, now: float, width: int) -> Line:
    """The step and the speed of work, else in which of the last rounds it took part."""
    sent = peer.telemetry
    if sent and sent.steps and shown_state(peer, now) in (PeerState.TRAINING, PeerState.SENDING):
        right = f" {sent.step}/{sent.steps} {fmt.rate(sent.samples_per_s)}"
        bar = fmt.progress(sent.step, sent.steps, max(width - len(right) - 1, 0))
        return _pad(Cell(bar, "busy"), Cell(right, "quiet"), width) if bar else [Cell(" " * width)]
    if not peer.contributions:
        return _pad(Cell("no round yet", "quiet"), Cell(""), width)
    took = peer.contributions.count("1")
    right = f" {took} of {len(peer.contributions)} rounds"
    room = max(width - len(right), 0)
    glyphs = peer.contributions.translate(PARTICIPATION_GLYPHS)[-room:] if room else ""
    return _pad(Cell(glyphs, "good"), Cell(right, "quiet"), width)


def _plot(peer: Peer, width: int, height: int) -> list[Line]:
    """The loss and its moving average as text; below a curve of the average."""
    if not peer.losses:
        lines = [_pad(Cell("no training in this run", "quiet"), Cell(""), width)]
        return lines + [[Cell(" " * width)] for _ in range(height - 1)]
    last = Cell(fmt.DIVERGED, "bad") if peer.diverged else Cell(fmt.decimal(training_loss(peer)))
    smoothed = smoothed_loss(peer)
    mean = Cell("" if smoothed is None else f"smoothed {fmt.decimal(smoothed)}", "busy")
    lines = [_pad(Cell(f"loss {last.text}", last.tone), mean, width)]
    averages = fmt.smooth(peer.losses)
    scale = fmt.fit_scale(averages)
    drawn = (
        charts.curve(averages, width, height - 1, scale) if scale else [" " * width] * (height - 1)
    )
    return lines + [[Cell(line, "busy")] for line in drawn]
