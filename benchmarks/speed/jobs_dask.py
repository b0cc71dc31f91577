"""Runs the blocks of a job on a local Dask cluster.

    python -m benchmarks.speed.jobs_dask FOLDER WORKERS

Run it with the interpreter of the extra dask. FOLDER has model.npz and the blocks, *.csv. Prints
the seconds for all blocks, without the start of the cluster.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from distributed import Client, LocalCluster

from benchmarks.speed.rows_task import answers


def main(folder: Path, workers: int) -> None:
    with np.load(folder / "model.npz") as file:
        model = {name: file[name] for name in file.files}
    parts = [(model, path) for path in sorted(folder.glob("*.csv"))]
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.gather(client.map(abs, range(workers)))
        began = time.monotonic()
        client.gather(client.map(answers, parts))
        sys.stdout.write(f"{time.monotonic() - began}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
