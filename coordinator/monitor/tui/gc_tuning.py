"""Python's collector in a program that draws: seldom, and never long.

Textual's strips hold caches that hold themselves, so each frame leaves a few thousand objects that
only the collector frees. Left alone it looks through all that lives every few seconds, and the
screen stands still for 40 ms. Told to be rare it lets garbage pile up, and a process never gives
back what it needed once. So: what is young by number, often and little at a time; all by the clock.
"""

from __future__ import annotations

import gc

from rich.segment import Segment
from textual.strip import Strip

from protocols.local import heap

#: Between two looks at everything; so long what nobody needs may stay.
TRIM_INTERVAL_S = 60.0
#: New objects before a look at them, and how many such looks before one at what has outlived one.
GEN0_THRESHOLD, GEN1_THRESHOLD = 10_000, 10


def tune_gc() -> None:
    """Leave alone for ever what is there now (modules, above all), and make collections rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GEN0_THRESHOLD, GEN1_THRESHOLD, 1_000_000)


def trim_caches() -> None:
    """Free and give back what nobody needs, also what is remembered of screens that are gone.

    Text on the screen has a style of its own for every place, so that the mouse can mark it. Rich
    and Textual remember 16,384 of each: ten minutes fill them, and what is needed is soon back.
    """
    Strip.render_ansi.cache_clear()
    Segment._split_cells.cache_clear()
    heap.trim()
