"""Rounds of large models beside the physical limit, where the host takes no memory back.

    python -m benchmarks.speed.floors [--case 0 1 2]

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

import psutil

from benchmarks.speed import floor, ours, report
from benchmarks.speed.cases import FULL, Case
from benchmarks.speed.figures import merged

CASES = tuple(case for case in FULL if case.name in ("40 MB × 8", "400 MB × 2", "1 GB × 2"))
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


def measured(case: Case) -> str:
    """The median round of a pass, and the limit before and after it."""

    def limit_s() -> float:
        with tempfile.TemporaryDirectory(prefix="commonweight-bench-") as folder:
            return floor.measure(case, Path(folder), 3).total_s

    before_s = limit_s()
    with tempfile.TemporaryDirectory(prefix="commonweight-bench-") as folder:
        own = merged([ours.run(case, Path(folder))])
    limits = before_s, limit_s()
    cpu_s = sum(own.cpu_s_per_round.values())
    ratios = " to ".join(f"{own.median_s / limit:.2f}" for limit in sorted(limits, reverse=True))
    return (
        f"{case.name}: a round {own.median_s:.2f} s and {cpu_s:.2f} s of processor time, limit "
        f"{limits[0]:.2f} and {limits[1]:.2f} s, {ratios} times the limit; "
        f"load {report.machine()['load_before']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.floors", description=__doc__)
    parser.add_argument("--case", type=int, nargs="+", default=[*range(len(CASES))])
    asked = parser.parse_args()
    with kept_memory():
        for number in asked.case:
            print(measured(CASES[number]), flush=True)


if __name__ == "__main__":
    main()
