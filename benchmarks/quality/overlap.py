"""What it costs that training is a round late: `--overlap 1`, with and without fragments.

`python -m benchmarks.quality.overlap [--steps 960] [--seed 1] [--keep]`

The runs of `benchmarks.quality.language` (a small GPT, four peers, DiLoCo), with the same steps and
learning rate, and as many bytes: a round of fragments has that part of the steps. Then once more
without overlap, with the steps of the same time on a slow line.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.quality import language
from benchmarks.quality.language import Way
from benchmarks.speed import report

INNER = 24
#: Overlap, fragments.
ARMS = ((0, 1), (1, 1), (1, 4))
#: The steps without overlap in the time of those with it, where peers train for 61 % and 98 % of
#: the time (`benchmarks.speed.overlap`, int8 at 2 and 16 Mbit/s), in whole rounds.
SAME_TIME = 0.625


def measured(
    steps: int, seed: int, momentum: float, arms: tuple[tuple[int, int], ...]
) -> list[Any]:
    """A row for each arm: the last held-out loss, in nats per token."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="commonweight-quality-") as folder:
        data = language.parts(Path(folder))
        outer = ("server_learning_rate=1.0", f"server_momentum={momentum}")
        for overlap, fragments in arms:
            inner = INNER // fragments
            way = Way(
                "diloco",
                seed,
                400,
                steps,
                inner,
                language.LR["diloco"],
                2 * fragments,
                "fp32",
                outer,
            )
            first = language.warmed(data, way)
            more = {"overlap": overlap, "fragments": fragments}
            found = language.by_rounds(data, first, way, **more)
            row = {**more, "steps": steps, "inner": inner, "seed": seed, "momentum": momentum,
                   "loss": found["losses"][-1], "bytes_up": found["bytes_up"]}  # fmt: skip
            print(row, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.overlap", description=__doc__
    )
    parser.add_argument("--steps", type=int, default=960)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--momentum", type=float, default=0.7)
    parser.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    asked = parser.parse_args()
    rows = measured(asked.steps, asked.seed, asked.momentum, ARMS)
    rows += measured(int(asked.steps * SAME_TIME), asked.seed, asked.momentum, ARMS[:1])
    if asked.keep:
        report.keep("overlap", {"losses": rows})


if __name__ == "__main__":
    main()
