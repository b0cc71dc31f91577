"""Python's collector in a program that draws: seldom, and never long.

Textual's strips hold caches that hold themselves, so each frame leaves a few thousand objects that
only the collector frees. Left alone it looks through all that lives every few seconds, and the
screen stands still for 40 ms. Told to be rare it never looks at what has lived for some seconds,
and memory grows. So: young objects by number, all of them by the clock.
"""

from __future__ import annotations

import gc

#: Between two looks at everything; so long what nobody needs may stay.
TIDY_EVERY_S = 60.0


def calm() -> None:
    """Leave alone for ever what is there now (modules, above all), and make collections rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 1_000_000)


def tidy() -> None:
    """Free everything that nobody needs."""
    gc.collect()
