"""The cost of closing a round, by strategy.

    python -m benchmarks.speed.strategies [MEGABYTES] [PEERS]

Each strategy closes two rounds in a process of its own, with real files and the real code, without
a network. The peak is the growth of the process without the files of the updates.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ARGUMENTS: dict[str, dict[str, Any]] = {
    "qfedavg": {"client_learning_rate": 0.1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "krum": {"num_malicious_nodes": 1},
}
TENSOR_BYTES = 1 << 20


def main() -> None:
    if len(sys.argv) > 3:
        print(json.dumps(one(sys.argv[3], int(sys.argv[1]), int(sys.argv[2]))))
        return
    megabytes, peers = (int(word) for word in (*sys.argv[1:], "100", "5")[:2])
    from coordinator import strategies

    print(f"{megabytes} MB, {peers} peers")
    print(f"{'strategy':<14}{'CPU s':>8}{'peak MB':>9}{'× model':>9}{'state MB':>10}")
    for name in strategies.names():
        command = [
            sys.executable,
            "-m",
            "benchmarks.speed.strategies",
            str(megabytes),
            str(peers),
            name,
        ]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(ended.stdout)
        print(
            f"{name:<14}{row['cpu_s']:>8.2f}{row['peak_mb']:>9.0f}"
            f"{row['peak_mb'] / megabytes:>9.2f}{row['state_mb']:>10.0f}",
            flush=True,
        )


def one(name: str, megabytes: int, peers: int) -> dict[str, float]:
    """Close two rounds of a strategy; measure the second one, which has to read a state."""
    from flwr.supercore.task_identity import TaskIdentity

    from coordinator import strategies
    from coordinator.runs import aggregation, transitions
    from coordinator.storage import run_events
    from coordinator.storage.run_events import RunSpec, Update
    from coordinator.storage.weight_store import WeightStore
    from coordinator.strategies.state import StateStore
    from protocols.model.weights import TensorSpec

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3
    spec = RunSpec(
        task="ping",
        rounds=2,
        quorum=peers,
        strategy=name,
        strategy_args=ARGUMENTS.get(name, {}),
    )
    schema = {f"t{i:04}": TensorSpec("F32", (TENSOR_BYTES // 4,)) for i in range(megabytes)}
    names = [f"P{number}" for number in range(peers)]
    with tempfile.TemporaryDirectory() as folder:
        lane = WeightStore(Path(folder))
        states = StateStore(lane.states)
        recipe = strategies.find(name)
        strategy = recipe.make(spec.strategy_args)
        run = transitions.replay("r", [run_events.RunStarted(spec)])
        first = lane.write(schema, noise(schema, 0))
        run = transitions.apply(run, run_events.WeightsInitialised(first, "file"))
        before_bytes = cpu_s = 0.0
        for number in (1, 2):
            news: list[run_events.RunEvent] = [
                run_events.RoundOpened(number, run.head, tuple(names))
            ]
            for seed, peer in enumerate(names, 1):
                digest = lane.write(schema, noise(schema, 1000 * number + seed))
                lane.version_path(digest).replace(lane.uploads.path(peer, digest))
                update = Update(digest=digest, num_examples=10, metrics={"loss": 1.0})
                news.append(run_events.UpdateAccepted(number, peer, update))
            for fact in (*news, run_events.TrainingClosed(number, tuple(names))):
                run = transitions.apply(run, fact)
            if number == 1:
                before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            began = time.process_time()
            made = aggregation.commit(run, lane, states, strategy, run.contributors)
            cpu_s = time.process_time() - began
            committed = run_events.VersionCommitted(
                number, made.digest, run.head, run.contributors, made.metrics, made.state
            )
            run = transitions.apply(run, committed)
            run = transitions.apply(run, run_events.RoundClosed(number, {}, 1.0, 0, 0))
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        state_bytes = sum(states.path(d).stat().st_size for d in run.strategy_state.values())
    return {
        "cpu_s": cpu_s,
        "peak_mb": (peak_bytes - before_bytes) / TENSOR_BYTES,
        "state_mb": state_bytes / TENSOR_BYTES,
    }


def noise(schema: Any, seed: int) -> Any:
    """Pieces of weights of this schema, from a normal distribution."""
    from protocols.model.weights import split_into_pieces

    rng = np.random.default_rng(seed)
    for piece in split_into_pieces(schema, TENSOR_BYTES):
        yield {part: rng.standard_normal(part.stop - part.start, np.float32) for part in piece}


if __name__ == "__main__":
    main()
