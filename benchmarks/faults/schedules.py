"""Runs many schedules of the simulator, with one process per core."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable

from benchmarks.faults.results import Row
from benchmarks.faults.simulator import BUGS, violations

_BATCH, _TELL_EVERY = 500, 10_000


def _batch(first: int) -> tuple[int, list[tuple[int, str]]]:
    """Run seeds `first` to `first + _BATCH`; return their number and the findings."""
    seeds = range(first, first + _BATCH)
    return len(seeds), [(seed, text) for seed in seeds for text in violations(seed)]


def simulate(count: int, first: int = 0) -> Row:
    """Run at least `count` schedules, from seed `first` on."""
    row = Row("1–5, 10, 18, 22–24, 31, 36 simulated schedules", "schedules a minute")
    began = time.monotonic()
    # Spawned, so that they share nothing with this process and its threads.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for done, found in pool.imap_unordered(_batch, range(first, first + count, _BATCH)):
            row.cases += done
            row.violations += [f"seed {seed}: {text}" for seed, text in found]
            if row.cases % _TELL_EVERY == 0:
                print(f"  {row.cases:,} schedules, {len(row.violations)} violations", flush=True)
    row.worst = row.cases / (time.monotonic() - began) * 60
    row.figure, row.seed = f"{row.worst:,.0f}", f"{first}–{first + row.cases - 1}"
    for text in row.violations[:20]:
        print(f"  {text}", flush=True)
    return row


def planted(most: int = 3000) -> Row:
    """Each planted bug must be found; the figure is the seed that finds it."""
    row = Row("planted bugs are found", "bug: first seed")
    found = []
    for bug in BUGS:
        seed = first_seed(bug, range(most))
        row.cases += 1
        if seed is None:
            row.violations.append(f"{bug} is not found in {most} schedules")
        else:
            found.append(f"{bug}: {seed}")
    row.figure, row.seed = "; ".join(found), "0…"
    return row


def first_seed(bug: str, seeds: Iterable[int]) -> int | None:
    """The first schedule that finds a planted bug."""
    return next((seed for seed in seeds if violations(seed, bug)), None)
