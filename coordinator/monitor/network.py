"""The network of a fleet: what each peer sends and receives now, as lines of text. Pure.

The coordinator stands at the left; each peer is a line to it. A line that carries bytes is thick
and has an arrow. Versions that peers fetch from each other stand at the end of the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coordinator.fleet.readings import display_name, shown_state
from coordinator.fleet.state import Fleet, Peer
from coordinator.monitor.peer_table import TONES, Cell, Tone, links, status_dot
from coordinator.remote import formatting as fmt
from protocols.messages.states import GLYPHS, PeerState

#: A rate is the mean over at most this time.
WINDOW_S = 10.0
#: A link is longer in a wide pane. What follows it: state, traffic, and a note.
_MIN_LINK_WIDTH, _MAX_LINK_WIDTH = 8, 40
_SIDE_WIDTH, _TRAFFIC_WIDTH, _NOTE_WIDTH = 15, 28, 26


class Rate(NamedTuple):
    """Bytes per second that a peer sends and receives."""

    up: float = 0.0
    down: float = 0.0


class TrafficMeter:
    """Rates by peer, from the counters of its telemetry. `now` is Unix s."""

    def __init__(self) -> None:
        self._samples: dict[str, list[tuple[float, int, int]]] = {}

    def update(self, fleet: Fleet, now: float) -> None:
        """Note the counters of all peers."""
        self._samples = {peer: old for peer, old in self._samples.items() if peer in fleet.peers}
        for peer in fleet.peers.values():
            if (sent := peer.telemetry) is None:
                self._samples.pop(peer.peer, None)
                continue
            samples = self._samples.setdefault(peer.peer, [])
            up, down = sent.bytes_up, sent.bytes_down
            if samples and (up < samples[-1][1] or down < samples[-1][2]):
                samples.clear()  # the agent has started again
            if not samples or samples[-1][0] < now:
                samples.append((now, up, down))
            while len(samples) > 2 and samples[1][0] <= now - WINDOW_S:
                del samples[0]

    def rate(self, peer: str) -> Rate:
        """The mean rate of the last `WINDOW_S`; 0 while less than two counters are known."""
        samples = self._samples.get(peer, [])
        if len(samples) < 2:
            return Rate()
        (began, up, down), (ended, up_now, down_now) = samples[0], samples[-1]
        took = max(ended - began, 1e-3)
        return Rate((up_now - up) / took, (down_now - down) / took)


def network_lines(
    fleet: Fleet, meter: TrafficMeter, now: float, width: int, height: int
) -> list[list[Cell]]:
    """The picture in at most `height` lines of `width` characters: the cells of each line."""
    enrolled = [peer for peer in fleet.peers.values() if peer.standing == "enrolled"]
    peers = sorted(enrolled, key=lambda peer: (not _is_moving(meter, peer), display_name(peer)))
    shown = peers[: height if len(peers) <= height else max(height - 1, 0)]
    side = _side(fleet, meter, peers)
    lines: list[list[Cell]] = []
    middle = max((len(shown) - len(side)) // 2, 0)
    name_width = min(max((len(display_name(peer)) for peer in shown), default=0), 20)
    room = width - _SIDE_WIDTH - 2 - name_width - _TRAFFIC_WIDTH - _NOTE_WIDTH
    link = min(max(room, _MIN_LINK_WIDTH), _MAX_LINK_WIDTH)
    for number in range(max(len(shown), min(len(side), height))):
        at = number - middle
        text, tone = side[at] if 0 <= at < len(side) else Cell("")
        line = [Cell(f"{fmt.truncate(text, _SIDE_WIDTH):<{_SIDE_WIDTH}} ", tone)]
        if number < len(shown):
            line += _link(shown[number], meter, now, _branch(number, len(shown)), link)
            line += _peer(shown[number], fleet, meter, now, name_width)
        lines.append(_cut(line, width))
    if (more := len(peers) - len(shown)) > 0 and height > 0:
        lines.append([Cell(f"{' ' * _SIDE_WIDTH} and {fmt.count(more)} more", "quiet")])
    return lines


def _side(fleet: Fleet, meter: TrafficMeter, peers: Sequence[Peer]) -> list[Cell]:
    rates = [meter.rate(peer.peer) for peer in peers]
    up, down = sum(rate.up for rate in rates), sum(rate.down for rate in rates)
    dots = fleet.links
    return [
        Cell("■ coordinator", "strong"),
        Cell(f"  mqtt {status_dot(dots.mqtt)}", "good" if dots.mqtt else "warn"),
        Cell(f"  flower {status_dot(dots.flower)}", "good" if dots.flower else "warn"),
        Cell(f"  ↓ {_speed(up)}", "busy" if up else "quiet"),
        Cell(f"  ↑ {_speed(down)}", "busy" if down else "quiet"),
    ]


def _branch(number: int, count: int) -> str:
    if count == 1:
        return "─"
    return "┬" if number == 0 else "└" if number == count - 1 else "├"


def _is_moving(meter: TrafficMeter, peer: Peer) -> bool:
    return any(meter.rate(peer.peer))


def _link(peer: Peer, meter: TrafficMeter, now: float, branch: str, width: int) -> list[Cell]:
    """`├━━━◀━━ `: the way to a peer, thick and with arrows where bytes move."""
    rate, there = meter.rate(peer.peer), any(links(peer, now))
    if not there:
        return [Cell(branch, "quiet"), Cell(f"{'╌' * (width - 1)} ", "quiet")]
    middle = f"{'◀' if rate.up else ''}{'▶' if rate.down else ''}"
    body = middle.center(width - 1, "━" if middle else "─")
    return [Cell(branch, "quiet"), Cell(f"{body} ", "busy" if middle else "quiet")]


def _peer(peer: Peer, fleet: Fleet, meter: TrafficMeter, now: float, width: int) -> list[Cell]:
    state, rate = shown_state(peer, now), meter.rate(peer.peer)
    tone: Tone = TONES[state]
    name = f"{fmt.truncate(display_name(peer), width):<{width}}"
    cells = [Cell(f"{GLYPHS[state]} ", tone), Cell(f"{name}  ")]
    sent = peer.telemetry
    cells += [
        _traffic("↑", rate.up, sent.bytes_up if sent else None),
        _traffic("↓", rate.down, sent.bytes_down if sent else None),
    ]
    if state in (PeerState.OFFLINE, PeerState.STALE):
        cells.append(Cell(f"{fmt.age(now - peer.seen_at)} ago" if peer.seen_at else "", "quiet"))
    elif peer.fetched_from:
        names = (
            f"{display_name(fleet.peers[source])} {_speed(speed)}"
            for source, speed in peer.fetched_from.items()
            if source in fleet.peers
        )
        cells.append(Cell(f"◀ from {', '.join(names)}", "ask"))
    return cells


def _traffic(arrow: str, per_s: float, total_bytes: int | None) -> Cell:
    """What moves now, or else all that has moved; None: unknown."""
    if per_s:
        return Cell(f"{arrow} {_speed(per_s):<9} ", "busy")
    total = fmt.NOTHING if total_bytes is None else fmt.format_bytes(total_bytes)
    return Cell(f"{arrow} {total:<9} ", "quiet")


def _speed(per_s: float) -> str:
    return f"{fmt.format_bytes(per_s)}/s"


def _cut(cells: Sequence[Cell], width: int) -> list[Cell]:
    """The cells in at most `width` characters."""
    line: list[Cell] = []
    for cell in cells:
        if width <= 0:
            break
        line.append(cell._replace(text=fmt.truncate(cell.text, width)))
        width -= len(cell.text)
    return line
