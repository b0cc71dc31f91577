"""Tune the garbage collector for a program that draws: short pauses, bounded memory.

Textual's strips are in reference cycles with their caches, so every frame leaves a few thousand
objects for the collector. By default a full collection every few seconds stops the screen for
40 ms; with rare collections the memory grows. So the young generation is collected often, and
caches are cleared and the heap trimmed once a minute.
"""

from __future__ import annotations

import gc

from rich.segment import Segment
from textual.strip import Strip

from protocols.local import heap

#: Seconds between two calls of `trim_caches`.
TRIM_INTERVAL_S = 60.0
#: New objects per collection of generation 0, and those collections per one of generation 1.
GEN0_THRESHOLD, GEN1_THRESHOLD = 10_000, 10


def tune_gc() -> None:
    """Exclude all current objects (mostly modules), and make full collections rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GEN0_THRESHOLD, GEN1_THRESHOLD, 1_000_000)


def trim_caches() -> None:
    """Clear the caches of Rich and Textual, collect garbage, and return memory to the system.

    Text selection gives every position on the screen its own style. Rich and Textual cache 16,384
    of each: ten minutes fill the caches, and a frame fills in again what it needs.
    """
    Strip.render_ansi.cache_clear()
    Segment._split_cells.cache_clear()
    heap.trim()
