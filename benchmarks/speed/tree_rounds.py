"""python -m benchmarks.speed.tree_rounds [--peers N] [--rows N] [--trees N]

CPU time of a round of trees (one level), with and without `--secure`: the coordinator and all peers
in one process, without HTTP and TLS. Prints the median over the rounds of all levels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agent.data.settings import DataSettings
from benchmarks.quality.fleet import fleet_of
from coordinator.runs import options
from coordinator.storage.run_events import RunSpec
from protocols.codecs import registry
from protocols.model.built_in_settings import BY_TASK

#: Columns of numbers of each table.
_COLUMNS = 10


def write_table(path: Path, rows: int, seed: int) -> Path:
    """Numbers of a normal distribution, and a class that follows from some of them."""
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(rows, _COLUMNS))
    y = (x[:, 0] + x[:, 1] ** 2 + chance.normal(size=rows) > 1).astype(int)
    head = ",".join([*(f"x{n}" for n in range(_COLUMNS)), "y"])
    np.savetxt(path, np.column_stack([x, y]), "%.5g", ",", header=head, comments="")
    return path


def cpu_of_round(asked: argparse.Namespace, *, secure: bool) -> float:
    """Seconds, the median over the rounds after the first tree's first level."""
    depth = int(BY_TASK["tabular"]["depth"].default)
    spec = RunSpec(
        task="tabular",
        rounds=1 + asked.trees * depth,
        quorum=asked.peers,
        settings={"target": "y", "model": "trees", "trees": asked.trees},
        strategy="trees",
        codec=registry.SUMS,
        evaluate_every=asked.trees * depth,
        deadline_s=3600.0,
        handshake=True,
        secure=secure,
        clip_norm=options.SECURE_CLIP_NORM if secure else 0.0,
    )
    with tempfile.TemporaryDirectory(prefix="commonweight-trees-") as folder:
        parts = [
            DataSettings(
                path=str(write_table(Path(folder, f"{number}.csv"), asked.rows, number)),
                device="cpu",
                index=number,
            )
            for number in range(asked.peers)
        ]
        marks = list[float]()
        with fleet_of(parts, secure=secure) as fleet:
            fleet.run(spec, lambda _: marks.append(time.process_time()))
    return float(np.median(np.diff(marks)[2:]))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.tree_rounds", description=__doc__
    )
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000, help="of each peer")
    parser.add_argument("--trees", type=int, default=3)
    asked = parser.parse_args()
    for secure in (False, True):
        name = "with --secure" if secure else "without"
        print(f"{name}: {cpu_of_round(asked, secure=secure):.3f} s of CPU time a round", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
