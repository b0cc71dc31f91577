"""python -m benchmarks.quality.privacy [--peers N…] [--epsilon E…] [--seed N…] [--rounds N]

Measures ε against accuracy where each peer adds noise of its own (`run start --dp`): the digits of
MNIST-5k and the model `2nn`, through the real run loop, clients and trainer. The accuracy is that
of the last version on all 1,000 held-out digits. Writes `privacy-results.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agent.data.settings import DataSettings
from agent.tasks.demo.mnist import Mnist
from benchmarks.quality.fleet import fleet_of
from coordinator.storage.run_events import RunSpec
from protocols.model import weights
from protocols.privacy.private_training import PrivateTraining

_OUT = Path(__file__).resolve().parents[2] / "docs" / "quality" / "privacy-results.json"
DELTA, CLIP = 1e-5, 0.5
#: Not tuned; tried once on the split of the data seed 0, which is not measured.
SETTINGS = {
    "batch_size": 0,
    "epochs": 1,
    "lr": 0.3,
    "momentum": 0.0,
    "pixels": "standard",
}
SEEDS = (1, 2, 3)


def measure(peers: int, epsilon: float, seed: int, rounds: int, cache: str) -> dict[str, Any]:
    """One run; at ε = 100 the noise hardly matters, and the gradients are clipped alike."""
    began = time.monotonic()
    parts = [
        DataSettings(index=i, parts=peers, seed=seed, cache=cache, device="cpu")
        for i in range(peers)
    ]
    spec = RunSpec(
        task="mnist",
        rounds=rounds,
        quorum=peers,
        seed=seed,
        settings=SETTINGS,
        strategy="fedavgm",
        strategy_args={"server_momentum": 0.9},
        dp_epsilon=epsilon,
        dp_delta=DELTA,
        dp_clip=CLIP,
        deadline_s=3600.0,
    )
    with fleet_of(parts) as fleet:
        run = fleet.run(spec)
        version = weights.load(fleet.lane.version_path(run.head))
    task = Mnist()
    task.load(DataSettings(seed=seed, cache=cache, device="cpu"))
    found = task.evaluate(version, SETTINGS, lambda *told: None)
    noise = PrivateTraining(epsilon, DELTA, CLIP, rounds).event(1.0, 1).noise
    return {
        "peers": peers,
        "epsilon": epsilon,
        "seed": seed,
        "rounds": rounds,
        "noise": round(noise, 3),
        "accuracy": round(found.metrics["accuracy"], 4),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.privacy", description=__doc__
    )
    parser.add_argument("--peers", type=int, nargs="+", default=(5, 20))
    parser.add_argument("--epsilon", type=float, nargs="+", default=(100, 8, 3, 1))
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=_OUT)
    asked = parser.parse_args()
    rows = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    with tempfile.TemporaryDirectory(prefix="commonweight-privacy-") as cache:
        for peers in asked.peers:
            for epsilon in asked.epsilon:
                for seed in asked.seed:
                    row = measure(peers, epsilon, seed, asked.rounds, cache)
                    print(row, file=sys.stderr, flush=True)
                    same = ("peers", "epsilon", "seed")
                    rows = [one for one in rows if any(one[k] != row[k] for k in same)] + [row]
                    asked.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    for peers, epsilon in sorted({(row["peers"], row["epsilon"]) for row in rows}):
        found = [r["accuracy"] for r in rows if (r["peers"], r["epsilon"]) == (peers, epsilon)]
        spread = statistics.stdev(found) if len(found) > 1 else math.nan
        print(
            f"{peers} peers, ε = {epsilon:g}: {statistics.mean(found):.3f} ± {spread:.3f} "
            f"({len(found)} seeds)"
        )


if __name__ == "__main__":
    main()
