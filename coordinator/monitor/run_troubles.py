"""Which peers a run refuses, and which are paused, with what to do: lines of text. Pure."""

from __future__ import annotations

from textwrap import wrap
from typing import NamedTuple

from coordinator.fleet import remedies
from coordinator.fleet.readings import display_name, shown_state
from coordinator.fleet.state import Fleet, Peer, Run
from coordinator.monitor.peer_table import TONES, Cell, peer_name
from coordinator.remote.formatting import truncate
from protocols.messages.states import ENDED, GLYPHS, PeerState

_REFUSED = GLYPHS[PeerState.OFFLINE]
#: Lines of one peer; its screen has the whole text.
MAX_LINES_EACH = 2


class Troubles(NamedTuple):
    """A line for each of the first peers that the run refuses or that are paused, and the number
    of all of them."""

    lines: list[Cell]
    total: int


def troubles(run: Run, fleet: Fleet, now: float, most: int = 100) -> Troubles:
    """The troubles of a run, with the text of at most `most` peers: name, why, what to do."""
    changed = run.changed
    refused = list(changed.refused.items())[:most]
    paused = [] if changed.state in ENDED else _paused(run, fleet, now)
    total = max(changed.num_refused, len(changed.refused)) + len(paused)
    lines = [
        Cell(f"{_REFUSED} {peer_name(fleet, peer)} refused: {reason}", "bad")
        for peer, reason in refused
    ]
    lines += [_pause(peer, now) for peer in paused[: most - len(lines)]]
    # The message about the run has the reasons of the first peers only.
    if len(lines) < most and (more := total - len(lines)) > 0:
        text = f"{_REFUSED} {more} more refused: commonweight run show {changed.run}"
        lines.append(Cell(text, "bad"))
    return Troubles(lines, total)


def _paused(run: Run, fleet: Fleet, now: float) -> list[Peer]:
    """The peers that could work for the run, if their owners or policies let them; by name."""

    def is_held(peer: Peer) -> bool:
        state = shown_state(peer, now)
        waits = state is PeerState.AWAITING and bool(peer.awaits_consent)
        return (state is PeerState.PAUSED or waits) and peer.peer not in run.changed.refused

    return sorted(filter(is_held, fleet.peers.values()), key=display_name)


def _pause(peer: Peer, now: float) -> Cell:
    state = shown_state(peer, now)
    why = remedies.why_absent(peer, now).removeprefix(f"{GLYPHS[state]} ")
    return Cell(f"{GLYPHS[state]} {display_name(peer)} {why}", TONES[state])


def fit(found: Troubles, width: int, height: int) -> list[Cell]:
    """At most `height` lines, wrapped to `width` characters; the last counts the other peers."""
    shown: list[Cell] = []
    for number, line in enumerate(found.lines):
        parts = wrap(line.text, max(width, 20), subsequent_indent="  ")
        if len(parts) > MAX_LINES_EACH:
            rest = " ".join(part.strip() for part in parts[MAX_LINES_EACH - 1 :])
            parts = [*parts[: MAX_LINES_EACH - 1], truncate(f"  {rest}", width)]
        left = found.total - number
        if len(shown) + len(parts) + (left > 1) > height:
            more = "peer gets" if left == 1 else "peers get"
            return [*shown, Cell(f"{left} more {more} no work: 1 shows all", "warn")][-height:]
        shown += [Cell(part, line.tone) for part in parts]
    return shown
