"""python -m benchmarks.quality [--only WORD] [--seed N…] [--rounds N] [--again] [--out FOLDER]

Measures how well training works: a table beside known results, curves, and `quality-results.json`.
A row takes about a minute; a row with results is only measured again with `--again`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import figures
from benchmarks.quality import courses, measured, shown

_OUT = Path(__file__).resolve().parents[2] / "docs" / "quality"
_PLOTS = (
    ("iid.svg", "Digits at random", [c.name for c in courses.REFERENCE if c.split == "iid"]),
    ("shards.svg", "Two labels a peer", [c.name for c in courses.REFERENCE if c.split != "iid"]),
    ("better.svg", "Two labels a peer, other ways", [c.name for c in courses.BETTER]),
    ("cameras.svg", "Ten cameras", [c.name for c in courses.SHIFTED]),
    ("lying.svg", "Two of ten peers lie", [c.name for c in courses.LYING]),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--only", default="", help="courses whose name contains this")
    parser.add_argument("--seed", type=int, nargs="+", default=courses.SEEDS)
    parser.add_argument("--rounds", type=int, help="instead of the course's")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--out", type=Path, default=_OUT, help="where the results go")
    asked = parser.parse_args()
    chosen = [course for course in courses.ALL if asked.only in course.name]
    have = {(row["course"], row["seed"]) for row in measured.read(asked.out)}
    with tempfile.TemporaryDirectory(prefix="commonweight-quality-") as cache:
        for course in chosen:
            for seed in asked.seed:
                if (course.name, seed) in have and not asked.again:
                    continue
                row = measured.measure(course, seed, asked.rounds or course.rounds, cache)
                measured.write(asked.out, [row])
                told = f"best {row['best']:.3f}, end {row['end']:.3f}, {row['seconds']:.0f} s"
                print(f"{course.name}, seed {seed}: {told}", file=sys.stderr, flush=True)
    rows = measured.write(asked.out, [])
    whole = {
        row["split"]: row["bytes_up_a_round"]
        for row in rows
        if (row["codec"], row["strategy"]) == ("fp32", "fedavg")
    }
    held = shown.table(chosen, rows, whole)
    for name, title, names in _PLOTS:
        if any(row["course"] in names for row in rows):
            shown.curves(asked.out / name, title, names, rows)
    if asked.out == _OUT:
        figures.write_tables()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
