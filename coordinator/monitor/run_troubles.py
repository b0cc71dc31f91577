"""Which peers a run refuses, and which are paused, with what to do: lines of text. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from coordinator.fleet import remedies
from coordinator.fleet.readings import display_name, shown_state
from coordinator.fleet.state import Fleet, Run
from coordinator.monitor.peer_table import TONES, Cell, peer_name
from coordinator.remote.formatting import truncate
from protocols.messages.states import ENDED, GLYPHS, PeerState

#: Lines of one peer; its screen has the whole text.
MAX_LINES_EACH = 2


def troubles(run: Run, fleet: Fleet, now: float) -> list[Cell]:
    """A line for each peer that the run refuses or that is paused: its name, why, what to do."""
    return [*_refusals(run, fleet), *_pauses(run, fleet, now)]


def _refusals(run: Run, fleet: Fleet) -> Iterator[Cell]:
    changed = run.changed
    for peer, reason in changed.refused.items():
        yield Cell(f"{_REFUSED} {peer_name(fleet, peer)} refused: {reason}", "bad")
    if (more := changed.num_refused - len(changed.refused)) > 0:
        yield Cell(f"{_REFUSED} {more} more refused: commonweight run show {changed.run}", "bad")


_REFUSED = GLYPHS[PeerState.OFFLINE]


def _pauses(run: Run, fleet: Fleet, now: float) -> Iterator[Cell]:
    """The peers that could work for the run, if their owners or policies let them."""
    if run.changed.state in ENDED:
        return
    for peer in sorted(fleet.peers.values(), key=display_name):
        state = shown_state(peer, now)
        waits = state is PeerState.AWAITING and bool(peer.awaits_consent)
        if (state is PeerState.PAUSED or waits) and peer.peer not in run.changed.refused:
            why = remedies.why_absent(peer, now).removeprefix(f"{GLYPHS[state]} ")
            yield Cell(f"{GLYPHS[state]} {display_name(peer)} {why}", TONES[state])


def fit(lines: list[Cell], width: int, height: int) -> list[Cell]:
    """`lines` wrapped to `width` characters, at most `height` of them; the last counts the rest."""
    shown: list[Cell] = []
    for number, line in enumerate(lines):
        parts = wrap(line.text, max(width, 20), subsequent_indent="  ")
        if len(parts) > MAX_LINES_EACH:
            rest = " ".join(part.strip() for part in parts[MAX_LINES_EACH - 1 :])
            parts = [*parts[: MAX_LINES_EACH - 1], truncate(f"  {rest}", width)]
        left = len(lines) - number
        if len(shown) + len(parts) + (left > 1) > height:
            more = "peer gets" if left == 1 else "peers get"
            return [*shown, Cell(f"{left} more {more} no work: 1 shows all", "warn")][-height:]
        shown += [Cell(part, line.tone) for part in parts]
    return shown
