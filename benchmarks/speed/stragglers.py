"""python -m benchmarks.speed.stragglers [virtual|real] [--keep]

Two of eight peers are ten times slower.

How long until the shared model classifies 90 % of the digits, with synchronous rounds and with
buffered aggregation? `virtual`: real training, decisions, validation and aggregation, but a virtual
clock: a training takes 1 or 10 units (± a tenth), all else takes none. `real`: a coordinator and
eight agents as processes, whose training sleeps at each step, so two cores can act as eight
machines.
"""

from __future__ import annotations

import heapq
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed import report
from coordinator import strategies
from coordinator.runs import aggregation, buffered, decisions, steps, transitions, validation
from coordinator.runs.decisions import Observation
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec, Update
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies.state import StateStore
from protocols.model import weights

PEERS, SLOW, TIMES = 8, 2, 10.0
GOAL = 0.90
SETTINGS: dict[str, Any] = {"epochs": 5, "batch_size": 10, "lr": 0.1}
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"quorum": PEERS},
    **{
        f"buffered, K={k}": {"mode": "buffered", "buffer": k, "max_staleness": 20}
        for k in (2, 4, 6)
    },
}


class Figure(NamedTuple):
    """When the goal was reached, after how many versions and uploads (including refused ones)."""

    time: float
    versions: int
    uploads: int
    refused: int
    most_stale: int


class Fleet:
    """Eight peers with an equal part each, in one process."""

    def __init__(self) -> None:
        import torch

        from agent.data.settings import DataSettings
        from agent.tasks.demo.mnist import Mnist

        torch.set_num_threads(1)
        self.tasks = []
        for index in range(PEERS):
            task = Mnist()
            task.load(DataSettings(index=index, parts=PEERS, cache=tempfile.gettempdir()))
            self.tasks.append(task)
        self.judge = Mnist()
        self.judge.load(DataSettings(index=0, parts=1, cache=tempfile.gettempdir()))

    def accuracy(self, model: weights.Weights) -> float:
        """Evaluate on the 1,000 held-out digits."""
        return self.judge.evaluate(model, SETTINGS, lambda *_: None).metrics["accuracy"]


def names() -> list[str]:
    return [f"P{index}" for index in range(PEERS)]


class Virtual:
    """One run with a virtual clock."""

    def __init__(self, fleet: Fleet, folder: Path, spec: RunSpec) -> None:
        self.fleet, self.lane, self.spec = fleet, WeightStore(folder), spec
        self.states = StateStore(self.lane.states)
        self.strategy = strategies.find(spec.strategy).make(spec.strategy_args)
        self.run = transitions.replay("r", [run_events.RunStarted(spec)])
        first = self.lane.save(fleet.tasks[0].init(spec.seed, SETTINGS))
        self.record(run_events.WeightsInitialised(first, "file"))
        self.now, self.chance = 0.0, Random(spec.seed)
        self.uploads = self.refused = self.most_stale = 0
        #: (end time, peer, round, base, turn)
        self.at_work: list[tuple[float, str, int, str, int]] = []

    def record(self, fact: run_events.RunEvent) -> None:
        self.run = transitions.apply(self.run, fact)

    def begin(self, peer: str, number: int, base: str, turn: int) -> None:
        slow = int(peer[1:]) >= PEERS - SLOW
        done = self.now + (TIMES if slow else 1.0) * self.chance.uniform(0.9, 1.1)
        heapq.heappush(self.at_work, (done, peer, number, base, turn))

    def play(self, most: float = 400.0) -> Figure | None:
        """Run until the goal is reached or the time is up."""
        everybody = frozenset(names())
        while self.now < most and not self.run.ended:
            step = decisions.decide(self.run, Observation(everybody))
            match step:
                case steps.OpenRound(number, base):
                    asked = () if self.run.buffered else tuple(names())
                    self.record(run_events.RoundOpened(number, base, asked, PEERS))
                    for peer in asked:
                        self.begin(peer, number, base, 0)
                case steps.AssignWork(given):
                    for work in given:
                        self.record(work)
                        self.begin(work.peer, work.round, work.base, work.turn)
                case steps.CloseTraining(contributors):
                    self.record(run_events.TrainingClosed(self.run.round, contributors))
                case steps.Aggregate(contributors):
                    if self.commit(contributors) >= GOAL:
                        versions = self.run.num_versions
                        counts = self.uploads, self.refused, self.most_stale
                        return Figure(self.now, versions, *counts)
                case steps.OpenEvaluation():
                    self.record(run_events.EvaluationOpened(self.run.round, ()))
                case steps.CloseRound():
                    self.record(run_events.RoundClosed(self.run.round, {}, 0.0, 0, 0))
                case steps.EndRun(state, because):
                    self.record(run_events.RunEnded(state, because))
                case _:
                    self.finish_those_that_are_due()
        return None

    def commit(self, contributors: tuple[str, ...]) -> float:
        run = self.run
        made = aggregation.commit(run, self.lane, self.states, self.strategy, contributors)
        self.record(
            run_events.VersionCommitted(
                run.round, made.digest, run.head, contributors, made.metrics, made.state
            )
        )
        return self.fleet.accuracy(weights.load(self.lane.version_path(made.digest)))

    def finish_those_that_are_due(self) -> None:
        """Finish all trainings that end now, before new work is given."""
        self.now = self.at_work[0][0]
        while self.at_work and self.at_work[0][0] == self.now:
            _, peer, number, base, turn = heapq.heappop(self.at_work)
            self.uploads += 1
            try:
                expected = validation.expected_reply(self.run, {}, peer, "train")
            except validation.UpdateRefused as err:
                self.refused += 1
                self.record(
                    run_events.UpdateRefused(number, peer, err.reason, err.message, "train")
                )
                continue
            update = self.train(peer, number, base, turn)
            if (given := expected.assignment) is not None:
                behind = buffered.staleness(self.run, given)
                self.most_stale = max(self.most_stale, behind)
                update = weights_of(update, base=given.base, turn=given.turn, staleness=behind)
            self.record(run_events.UpdateAccepted(number, peer, update))

    def train(self, peer: str, number: int, base: str, turn: int) -> Update:
        settings = {**SETTINGS, "seed": self.spec.seed + 7919 * turn, "round": number}
        model = weights.load(self.lane.version_path(base))
        made = self.fleet.tasks[int(peer[1:])].train(model, settings, lambda *_: None)
        trained = weights.Weights(made.weights)
        digest = weights.digest(trained)
        weights.save(trained, self.lane.uploads.path(peer, digest))
        return Update(digest=digest, num_examples=made.num_examples)


def weights_of(update: Update, **changed: Any) -> Update:
    from msgspec.structs import replace

    return replace(update, **changed)


def virtual(seeds: int = 3) -> dict[str, list[Figure | None]]:
    """One result per seed, by mode."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3
    fleet, found = Fleet(), {}
    for name, chosen in MODES.items():
        found[name] = list(_figures(fleet, chosen, seeds))
    return found


def _figures(fleet: Fleet, chosen: dict[str, Any], seeds: int) -> Iterator[Figure | None]:
    for seed in range(1, seeds + 1):
        spec = RunSpec(task="mnist", rounds=500, seed=seed, **chosen)
        with tempfile.TemporaryDirectory() as folder:
            yield Virtual(fleet, Path(folder), spec).play()


# --- real processes --------------------------------------------------------------------------

PACED = '''"""The task mnist, stretched: each step takes so long as the environment says."""
import os, time
from agent.tasks.demo.mnist import Mnist


class Paced(Mnist):
    def train(self, weights, settings, on_step):
        pace_s = float(os.environ["PACE_S"])

        def step(*told):
            time.sleep(pace_s)
            on_step(*told)

        return super().train(weights, settings, step)
'''


def real() -> dict[str, dict[str, float]]:
    """Wall seconds until a version reads 90 %, by mode: 125 steps of twenty digits."""
    from tests.support import fleet_harness
    from tests.support.waiting import wait_for

    fast_s = 0.016
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:

        class Stretched(fleet_harness.Fleet):
            def _env(self, name: str = "coordinator") -> dict[str, str]:
                slow = name in ("peer6", "peer7")
                pace = fast_s * (TIMES if slow else 1.0)
                return super()._env(name) | {"PACE_S": str(pace)}

        made = Stretched(Path(folder), {"COMMONWEIGHT_AGENT_THREADS": "1"})
        with fleet_harness.closing(made):
            paced = Path(folder) / "paced.py"
            paced.write_text(PACED)
            peers = [f"peer{index}" for index in range(PEERS)]
            made.up()
            made.join(*peers)
            for peer in peers:
                done = made.ask_agent(peer, "task", "add", f"{paced}:Paced")
                assert done.returncode == 0, done.stderr
            made.start(*peers)
            for name, words in {
                "synchronous": ("--quorum", str(PEERS), "--rounds", "12"),
                "buffered, K=4": (
                    "--mode",
                    "buffered",
                    "--buffer",
                    "4",
                    "--rounds",
                    "60",
                    "--max-staleness",
                    "20",
                ),
            }.items():
                began = time.monotonic()
                run = made.start_run(
                    f"{paced}:Paced",
                    *words,
                    "--target",
                    str(GOAL),
                    "--seed",
                    "1",
                    "--set",
                    "batch_size=20",
                    "--set",
                    "lr=0.1",
                    "--deadline",
                    "5m",
                )
                wait_for(
                    lambda run=run: made.run(run)["state"] in ("finished", "stopped", "failed"),
                    f"{name} has ended",
                    within_s=400.0,
                    every_s=2.0,
                )
                shown = made.run(run)
                reached = next(
                    r for r in shown["history"] if (r["metrics"].get("accuracy") or 0) >= GOAL
                )
                seconds = sum(
                    r["seconds"] for r in shown["history"] if r["round"] <= reached["round"]
                )
                found[name] = {
                    "wall_s": time.monotonic() - began,
                    "rounds_s": seconds,
                    "version": reached["round"],
                    "uploads": sum(
                        len(r["contributors"])
                        for r in shown["history"]
                        if r["round"] <= reached["round"]
                    ),
                    "most_stale": max(
                        (max(r.get("staleness", {}).values(), default=0) for r in shown["history"]),
                        default=0,
                    ),
                }
                print(name, json.dumps(found[name]), flush=True)
    return found


def main() -> None:
    keep = "--keep" in sys.argv[1:]
    if "real" in sys.argv[1:]:
        found = real()
        if keep:
            report.keep("stragglers", {"real": found})
        return
    print("mode                time  × sync  versions  uploads  refused  τ ≤")
    whole = 0.0
    played = virtual()
    if keep:
        reached = {
            name: [figure._asdict() for figure in figures if figure]
            for name, figures in played.items()
        }
        report.keep("stragglers", {"virtual": reached})
    for name, figures in played.items():
        good = [figure for figure in figures if figure is not None]
        if not good:
            print(f"{name:<16}{'never':>8}")
            continue
        middle = np.mean(np.array(good, float), axis=0)
        whole = whole or float(middle[0])
        print(
            f"{name:<16}{middle[0]:>8.1f}{middle[0] / whole:>8.2f}{middle[1]:>10.1f}"
            f"{middle[2]:>9.1f}{middle[3]:>9.1f}{max(f.most_stale for f in good):>5}"
            f"   median {statistics.median(f.time for f in good):.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
