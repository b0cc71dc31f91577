"""A fifth of the peers send their changes with the sign flipped, four times as large.

At their own size two of ten only slow a mean down (0.8 - 0.2 of a step); at four times it stands
still. Real digits, the real task, the real way from updates to a version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from agent.data.settings import DataSettings
from agent.tasks.demo.mnist import Mnist
from coordinator.storage.run_events import RunSpec
from protocols.model.weights import Weights
from tests.coordinator.strategies.test_strategies import Table

PEERS, BAD, ROUNDS = 10, 2, 3
TIMES = 4
SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 20, "lr": 0.1}
ROBUST: dict[str, dict[str, Any]] = {
    "fedtrimmedavg": {"beta": 0.2},
    "multikrum": {"num_malicious_nodes": BAD, "num_nodes_to_select": 6},
}


@pytest.fixture(scope="module")
def accuracy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Any]:
    """Accuracy on the 1,000 held-out digits, with so many flipped peers."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("flipped")
    tasks = []
    for index in range(PEERS):
        task = Mnist()
        task.load(DataSettings(index=index, parts=PEERS, cache=str(folder)))
        tasks.append(task)
    judge = Mnist()
    judge.load(DataSettings(index=0, parts=1, cache=str(folder)))

    def accuracy(strategy: str, arguments: dict[str, Any], bad: int = BAD) -> float:
        spec = RunSpec(
            task="mnist",
            rounds=ROUNDS,
            quorum=PEERS,
            strategy=strategy,
            strategy_args=arguments,
            weighting="examples",
        )
        home = folder / f"{strategy}{bad}"
        table = Table(home, spec, tasks[0].init(1, SETTINGS))
        for number in range(1, ROUNDS + 1):
            base, updates = table.model(), {}
            for index, task in enumerate(tasks):
                settings = {**SETTINGS, "seed": 1, "round": number}
                made = dict(task.train(base, settings, lambda *_: None).weights)
                if index < bad:
                    flipped = {n: TIMES * np.subtract(base[n], made[n]) for n in made}
                    made = {n: np.add(base[n], flipped[n]) for n in made}
                updates[f"P{index}"] = Weights(made)
            table.open_round(updates)
            table.close_round()
        return judge.evaluate(table.model(), SETTINGS, lambda *_: None).metrics["accuracy"]

    return accuracy


def test_robust_strategies_hold_and_the_mean_does_not(
    accuracy_of: Callable[..., float],
) -> None:
    clean = accuracy_of("fedavg", {}, bad=0)
    assert clean > 0.8
    for strategy, arguments in ROBUST.items():
        assert accuracy_of(strategy, arguments) > clean - 0.03, strategy
    assert accuracy_of("fedavg", {}) < clean - 0.03
