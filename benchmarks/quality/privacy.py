"""python -m benchmarks.quality.privacy [--model 2nn|edges] [--peers N…] [--epsilon E…] [--seed N…]
    [--shared M]

Measures ε against accuracy where each peer adds noise of its own (`run start --dp`), or M of them
have enough together (`--secure --dp --dp-shared M`): the digits of MNIST-5k, through the real run
loop, clients and trainer. The accuracy is that of the last version on all 1,000 held-out digits.
Writes `privacy-results.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from agent.data.settings import DataSettings
from agent.tasks.demo.mnist import Mnist
from benchmarks.quality import page
from benchmarks.quality.fleet import fleet_of
from coordinator.storage.run_events import RunSpec
from protocols.errors import CommonweightError
from protocols.model import weights
from protocols.privacy.private_training import PrivateTraining

#: The rows of this benchmark and of `privacy_tables`.
OUT = Path(__file__).resolve().parents[2] / "docs" / "quality" / "privacy-results.json"
DELTA = 1e-5
SEEDS = (1, 2, 3, 4, 5)


class Course(NamedTuple):
    """How a model is trained at one ε.

    Those of "edges" were chosen by a simulation of the training on 3,200 digits, measured on 800
    others, of a split that is not used here. Those of "2nn" were not tuned.
    """

    rounds: int
    clip: float
    lr: float


#: By model and ε.
COURSES: dict[str, dict[float, Course]] = {
    "2nn": dict.fromkeys((1.0, 3.0, 8.0, 100.0), Course(60, 0.5, 0.3)),
    "edges": {
        1.0: Course(30, 0.25, 8.0),
        3.0: Course(15, 0.25, 32.0),
        8.0: Course(30, 0.25, 32.0),
        100.0: Course(30, 0.25, 32.0),
    },
}
#: With shared noise, which is smaller: the steps of less noise above, not tuned anew.
SHARED_COURSES: dict[str, dict[float, Course]] = {
    "2nn": COURSES["2nn"],
    "edges": {**COURSES["edges"], 1.0: COURSES["edges"][3.0], 3.0: COURSES["edges"][8.0]},
}


def measure(
    model: str, peers: int, epsilon: float, seed: int, cache: str, shared: int = 1
) -> dict[str, Any]:
    """One run; at ε = 100 the noise hardly matters, and the gradients are clipped alike.

    `shared`: so many of the peers have enough noise together, in a secure run; 1: each alone.
    """
    began, is_shared = time.monotonic(), shared > 1
    course = (SHARED_COURSES if is_shared else COURSES)[model][epsilon]
    settings = {
        "model": model,
        "batch_size": 0,
        "epochs": 1,
        "lr": course.lr,
        "momentum": 0.0,
        "pixels": "standard",
    }
    parts = [
        DataSettings(index=i, parts=peers, seed=seed, cache=cache, device="cpu")
        for i in range(peers)
    ]
    spec = RunSpec(
        task="mnist",
        rounds=course.rounds,
        quorum=peers,
        seed=seed,
        settings=settings,
        strategy="fedavgm",
        strategy_args={"server_momentum": 0.9},
        dp_epsilon=epsilon,
        dp_delta=DELTA,
        dp_clip=course.clip,
        dp_shared=shared if is_shared else 0,
        secure=is_shared,
        deadline_s=3600.0,
    )
    with fleet_of(parts, secure=is_shared) as fleet:
        run = fleet.run(spec)
        if len(run.history) < course.rounds:
            raise CommonweightError(f"the run ended early: {run.ended_because}")
        version = weights.load(fleet.lane.version_path(run.head))
    task = Mnist()
    task.load(DataSettings(seed=seed, cache=cache, device="cpu"))
    found = task.evaluate(version, settings, lambda *told: None)
    noise = PrivateTraining(epsilon, DELTA, course.clip, course.rounds).event(1.0, 1).noise
    return {
        "model": model,
        "peers": peers,
        "epsilon": epsilon,
        **({"shared": shared} if is_shared else {}),
        "seed": seed,
        "rounds": course.rounds,
        "noise": round(noise, 3),
        "accuracy": round(found.metrics["accuracy"], 4),
        "seconds": round(time.monotonic() - began, 1),
    }


def read_rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    return rows


def keep_row(out: Path, row: dict[str, Any]) -> None:
    """Write the row to the file, in place of an older one of the same run."""
    same = ("model", "table", "peers", "epsilon", "shared", "seed")
    others = [one for one in read_rows(out) if any(one.get(k) != row.get(k) for k in same)]
    out.write_text(json.dumps({"rows": [*others, row]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.privacy", description=__doc__
    )
    parser.add_argument("--model", choices=sorted(COURSES), default="edges")
    parser.add_argument("--peers", type=int, nargs="+", default=(20,))
    parser.add_argument("--shared", type=int, default=1, help="1: each peer adds its own noise")
    parser.add_argument("--epsilon", type=float, nargs="+", default=(1.0, 3.0, 8.0, 100.0))
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="commonweight-privacy-") as cache:
        for peers in asked.peers:
            for epsilon in asked.epsilon:
                for seed in asked.seed:
                    row = measure(asked.model, peers, epsilon, seed, cache, asked.shared)
                    print(row, file=sys.stderr, flush=True)
                    keep_row(asked.out, row)
    print(page.privacy({"rows": read_rows(asked.out)}, asked.model), end="")


if __name__ == "__main__":
    main()
