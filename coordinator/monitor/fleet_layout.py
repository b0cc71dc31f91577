"""How the lines of the Fleet page are shared by its parts. Pure."""

from __future__ import annotations

from typing import NamedTuple

from coordinator.monitor.peer_cards import Grid, fit_grid

#: Parts have borders with titles on a terminal of this size.
MIN_ROOMY_WIDTH, MIN_ROOMY_HEIGHT = 100, 30
BORDER = 2
#: Plots stand beside the table from this width on.
MIN_WIDE_TERMINAL = 120
MIN_PLOT_LINES, MAX_PLOT_LINES = 8, 12
MIN_EVENT_LINES, MAX_EVENT_LINES = 3, 14
#: The picture of the network has a line for each peer; the coordinator needs five.
MIN_NETWORK_LINES, MAX_NETWORK_LINES = 5, 16


def is_roomy(width: int, height: int) -> bool:
    """True for a terminal in which borders cost no content."""
    return width >= MIN_ROOMY_WIDTH and height >= MIN_ROOMY_HEIGHT


def plots_width(terminal: int) -> int:
    """The width of the plots beside the table; 0 for no plots."""
    return 0 if terminal < MIN_WIDE_TERMINAL else min(38 + (terminal - MIN_WIDE_TERMINAL) // 4, 72)


class Lines(NamedTuple):
    """The lines of each part below the table, with borders; 0: not shown."""

    plots: int = 0
    cards: int = 0
    network: int = 0
    events: int = 0
    grid: Grid | None = None


def share_compact(free: int, *, has_plots: bool) -> Lines:
    """The lines on a small terminal. A blank line stands above each part."""
    free -= 1
    plots = min(free, MAX_PLOT_LINES) if has_plots and free >= MIN_PLOT_LINES else 0
    events = free - plots - 1 if plots else free
    events = min(events, MAX_EVENT_LINES) if events >= MIN_EVENT_LINES else 0
    return Lines(plots=plots, events=events)


def share_roomy(free: int, num_peers: int, width: int, *, has_plots: bool) -> Lines:
    """The lines on a large terminal: plots, events, then the network and a card for each peer."""
    events = MIN_EVENT_LINES + BORDER
    if free < events:
        return Lines()
    plots = min(free - events, MAX_PLOT_LINES + BORDER) if has_plots else 0
    plots = plots if plots >= MIN_PLOT_LINES + BORDER else 0
    left = free - events - plots
    network = min(max(num_peers, MIN_NETWORK_LINES), MAX_NETWORK_LINES) + BORDER
    grid = fit_grid(num_peers, width, left - network)
    if network > left:
        network, grid = 0, fit_grid(num_peers, width, left)
    cards = grid.height * -(-num_peers // grid.columns) if grid else 0
    events += left - network - cards
    return Lines(plots, cards, network, events, grid)
