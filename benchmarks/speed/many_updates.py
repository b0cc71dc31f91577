"""Memory and CPU of the average of many updates.

    python -m benchmarks.speed.many_updates [--updates 1000] [--megabytes 40] [--files 100]

It closes a round of `fedavg` in a process of its own, with real files and the real code, without a
network. The disk holds `files` different updates; the others are hard links to them, so that each
update is read, but not each of them from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.strategies import TENSOR_BYTES, noise


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.many_updates")
    parser.add_argument("--updates", type=int, default=1_000)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--files", type=int, default=100)
    asked = parser.parse_args()
    print(json.dumps(averaged(asked.updates, asked.megabytes, asked.files)))


def averaged(updates: int, megabytes: int, files: int) -> dict[str, float]:
    """Close a round; return its CPU and time in s, and memory in MB: before, and at most."""
    from flwr.supercore.task_identity import TaskIdentity

    from coordinator import strategies
    from coordinator.runs import aggregation, transitions
    from coordinator.storage import run_events
    from coordinator.storage.run_events import RunSpec, Update
    from coordinator.storage.weight_store import WeightStore
    from coordinator.strategies.state import StateStore
    from coordinator.transport.connection_limits import raise_open_file_limit
    from protocols.model.weights import TensorSpec

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3
    raise_open_file_limit()
    spec = RunSpec(task="ping", rounds=1, quorum=updates)
    schema = {f"t{i:04}": TensorSpec("F32", (TENSOR_BYTES // 4,)) for i in range(megabytes)}
    peers = [f"P{number}" for number in range(updates)]
    with tempfile.TemporaryDirectory(prefix="commonweight-bench-") as folder:
        store = WeightStore(Path(folder))
        first = store.write(schema, noise(schema, 0))
        facts: list[run_events.RunEvent] = [
            run_events.RunStarted(spec),
            run_events.WeightsInitialised(first, "file"),
            run_events.RoundOpened(1, first, tuple(peers)),
        ]
        made: list[tuple[str, Path]] = []
        for number, peer in enumerate(peers):
            if number < files:
                digest = store.write(schema, noise(schema, number + 1))
                target = store.uploads.path(peer, digest)
                store.version_path(digest).replace(target)
                made.append((digest, target))
            else:
                digest, known = made[number % files]
                os.link(known, store.uploads.path(peer, digest))
            update = Update(digest=digest, num_examples=10, metrics={"loss": 1.0})
            facts.append(run_events.UpdateAccepted(1, peer, update))
        facts.append(run_events.TrainingClosed(1, tuple(peers)))
        run: Any = transitions.replay("r", facts)
        strategy = strategies.find(spec.strategy).make(spec.strategy_args)
        states = StateStore(store.states)
        before, cpu, began = _peak_mb(), time.process_time(), time.monotonic()
        aggregation.commit(run, store, states, strategy, run.contributors)
        return {
            "updates": updates,
            "megabytes": megabytes,
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.monotonic() - began,
            "before_mb": before,
            "peak_mb": _peak_mb(),
        }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
