"""Cards of peers, and how the Fleet page shares its lines."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.monitor.fleet_layout import (
    BORDER,
    MIN_EVENT_LINES,
    is_roomy,
    share_compact,
    share_roomy,
)
from coordinator.monitor.peer_cards import MIN_HEIGHT, card_grid, fit_grid
from coordinator.monitor.peer_table import fleet_state_cell
from protocols.messages.states import PeerState, RunState
from tests.support.scene import IDS, NOW, busy_fleet


@pytest.mark.parametrize("width", [30, 47, 61, 97, 140])
@pytest.mark.parametrize("height", [6, 13, 20, 40])
def test_cards_have_the_size_of_the_grid(width: int, height: int) -> None:
    fleet = busy_fleet()
    peers = list(fleet.peers.values())
    grid = fit_grid(len(peers), width, height)
    if grid is None:
        assert height < MIN_HEIGHT * -(-len(peers) // max((width + 1) // 31, 1))
        return
    lines = ["".join(cell.text for cell in line) for line in card_grid(fleet, peers, NOW, grid)]
    assert len(lines) <= height
    assert len(lines) == grid.height * -(-len(peers) // grid.columns)
    assert max(map(len, lines)) <= width
    assert {len(line) for line in lines[: grid.height]} == {grid.columns * (grid.width + 1) - 1}


def test_a_card_has_state_step_and_losses() -> None:
    fleet = busy_fleet()
    grid = fit_grid(1, 44, 8)
    assert grid is not None
    north = fleet.peers[IDS["north"]]
    text = "\n".join(
        "".join(cell.text for cell in line) for line in card_grid(fleet, [north], NOW, grid)
    )
    for words in ("─ north ─", "● training", "24/40 812/s", "loss 0.2792", "smoothed 0.3052"):
        assert words in text
    assert "…" not in text


def test_a_refused_peer_is_not_shown_as_idle() -> None:
    fleet = busy_fleet()
    peer = fleet.peers[IDS["north"]]
    peer.state, peer.run = PeerState.IDLE, ""
    assert fleet_state_cell(fleet, peer, NOW).text == "○ idle"
    run = fleet.runs["motion-7"]
    run.changed = replace(run.changed, num_refused=1, refused={peer.peer: "it has no column age"})
    assert fleet_state_cell(fleet, peer, NOW).text == "✕ refused: it has no column age"
    run.changed = replace(run.changed, state=RunState.FINISHED)
    assert fleet_state_cell(fleet, peer, NOW).text == "○ idle", "the run is over"


@pytest.mark.parametrize("has_plots", [True, False])
def test_the_parts_fill_the_page_and_no_more(has_plots: bool) -> None:
    for peers in (1, 6, 30, 300):
        for free in range(60):
            lines = share_roomy(free, peers, 96, has_plots=has_plots)
            assert sum(lines[:4]) in (0, free)
            assert lines.events == 0 or lines.events >= MIN_EVENT_LINES + BORDER
            assert (lines.grid is None) == (lines.cards == 0)
            compact = share_compact(free, has_plots=has_plots)
            assert compact.plots + compact.events + 2 <= max(free + 1, 2)
            assert not compact.cards
            assert has_plots or not lines.plots + compact.plots


def test_small_terminals_have_no_borders() -> None:
    assert not is_roomy(80, 24)
    assert not is_roomy(99, 60)
    assert is_roomy(140, 40)
