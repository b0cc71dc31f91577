"""Rounds of large models beside the physical limit, where the host takes no memory back.

    python -m benchmarks.speed.floors [--case 0 1 2] [--keep]

The host of a virtual machine may take back free memory, in blocks of 2 MB after two seconds (free
page reporting). What a program gets afterwards costs a fault in the host for each 4 KB: 9 µs on one
machine, where a write to a new file takes 0.8 µs otherwise. A round writes several new files, and
the physical limit has no such part. Here one page of each free block is held, so the rest stays
with the machine. It takes most of the free memory for some seconds, and needs a machine on which
nothing else runs.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed import floor, ours, report
from benchmarks.speed.cases import FULL, Case
from benchmarks.speed.figures import merged

#: How many times the limit a round may take, by case.
GOALS = {"40 MB × 8": 1.6, "400 MB × 2": 1.5, "1 GB × 2": 1.5}
CASES = tuple(case for case in FULL if case.name in GOALS)
_BLOCK_BYTES, _AT_ONCE_BYTES = 2 << 20, 128 << 20
#: Left free while memory is taken.
_SPARE_BYTES = 600 << 20
_POPULATE_WRITE = 23  # of madvise, Linux 5.14


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Hold one page of each block of the memory that is free now."""
    with contextlib.ExitStack() as stack:
        taken = list[mmap.mmap]()
        while psutil.virtual_memory().free > _SPARE_BYTES:
            mine = mmap.mmap(-1, _AT_ONCE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            taken.append(stack.enter_context(contextlib.closing(mine)))
            mine.madvise(mmap.MADV_NOHUGEPAGE)
            mine.madvise(_POPULATE_WRITE)
        for memory in taken:
            for start in range(0, _AT_ONCE_BYTES, _BLOCK_BYTES):
                rest = _BLOCK_BYTES - mmap.PAGESIZE
                memory.madvise(mmap.MADV_DONTNEED, start + mmap.PAGESIZE, rest)
        yield


def measured(case: Case) -> dict[str, Any]:
    """A row: the median round of a pass, its processor time, and the limit before and after it."""

    def limit_s() -> float:
        with tempfile.TemporaryDirectory(prefix="commonweight-bench-") as folder:
            return floor.measure(case, Path(folder), 3).total_s

    before_s = limit_s()
    with tempfile.TemporaryDirectory(prefix="commonweight-bench-") as folder:
        own = merged([ours.run(case, Path(folder))])
    return {
        "name": case.name,
        "round_s": round(own.median_s, 2),
        "cpu_s": round(sum(own.cpu_s_per_round.values()), 2),
        "limits_s": [round(before_s, 2), round(limit_s(), 2)],
        "load": report.machine()["load_before"],
    }


def ratios(row: dict[str, Any]) -> str:
    """How many times the limit the round of a row takes; two numbers if the limit varied."""
    limits = sorted(row["limits_s"], reverse=True)
    return " to ".join(dict.fromkeys(f"{row['round_s'] / limit:.2f}" for limit in limits))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.floors", description=__doc__)
    parser.add_argument("--case", type=int, nargs="+", default=[*range(len(CASES))])
    parser.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    asked = parser.parse_args()
    rows = {row["name"]: row for row in report.kept("floors").get("rows", [])}
    with kept_memory():
        for number in asked.case:
            row = rows[CASES[number].name] = measured(CASES[number])
            print(f"{row}: {ratios(row)} times the limit", flush=True)
    if asked.keep:
        report.keep("floors", {"rows": [rows[name] for name in GOALS if name in rows]})


if __name__ == "__main__":
    main()
