"""DiLoCo: Nesterov's momentum at the server, and optimisers that go on at the peers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from agent.data.settings import DataSettings
from agent.tasks import Setting
from agent.tasks.demo.mnist import Mnist
from benchmarks.quality.fleet import fleet_of
from coordinator.storage.run_events import RunSpec
from coordinator.strategies.diloco_server import DiLoCo
from coordinator.transport.flower import Superlink
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights


def test_the_server_is_torchs_sgd_with_nesterovs_momentum() -> None:
    Superlink()  # Flower's messages belong to its run
    draw = np.random.default_rng(1)
    at = torch.tensor(draw.normal(size=5), requires_grad=True)
    optimiser = torch.optim.SGD([at], lr=0.7, momentum=0.9, nesterov=True)
    strategy, base = DiLoCo(), at.detach().numpy().copy()
    for number in range(4):
        change = draw.normal(size=5)
        arrays = ArrayRecord({"w": Array(base - change)})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        strategy.base = {"w": base}
        made, _ = strategy.aggregate_train(
            number, [Message(content, reply_to=Message(RecordDict(), 1, "train"))]
        )
        assert made is not None
        base = made["w"].numpy()
        at.grad = torch.tensor(change)
        optimiser.step()
        np.testing.assert_allclose(base, at.detach().numpy(), rtol=1e-12)


def trained(cache: Path, rounds: int, steps: int, **args: Setting) -> Weights:
    """One peer, full batches of AdamW: nothing but the optimiser tells the rounds apart."""
    settings: dict[str, Setting] = {
        "optimiser": "adamw",
        "lr": 0.01,
        "batch_size": "all",
        "epochs": steps,
    }
    spec = RunSpec(
        task="mnist",
        rounds=rounds,
        seed=3,
        settings=settings,
        strategy="diloco",
        strategy_args={"server_learning_rate": 1.0, "server_momentum": 0.0, **args},
    )
    with fleet_of([DataSettings(parts=20, cache=str(cache), device="cpu")]) as fleet:
        run = fleet.run(spec)
        assert run.state is RunState.FINISHED, run.ended_because
        return weights.load(fleet.lane.version_path(run.head))


def distance(one: Weights, other: Weights) -> float:
    return max(float(np.abs(np.subtract(one[name], other[name])).max()) for name in one)


def test_an_optimiser_goes_on_where_its_last_round_left_it(tmp_path: Path) -> None:
    at_once = trained(tmp_path, 1, 6)
    assert distance(trained(tmp_path, 3, 2), at_once) < 1e-5
    assert distance(trained(tmp_path, 3, 2, keep_optimiser=False), at_once) > 1e-3


def test_an_optimiser_of_another_kind_is_not_taken_over(tmp_path: Path) -> None:
    task = Mnist()
    task.load(DataSettings(parts=20, cache=str(tmp_path), device="cpu"))
    settings: dict[str, Setting] = {"optimiser": "adamw", "epochs": 1}
    base = task.init(1, {})
    first = task.train(base, settings, lambda *_: None).weights
    task.load_optimizer_state({"momentum_buffer output.bias": np.ones(10, np.float32)})
    again = task.train(base, settings, lambda *_: None).weights
    assert weights.digest(Weights(dict(first))) == weights.digest(Weights(dict(again)))
    task.load_optimizer_state(task.optimizer_state())
    third = task.train(base, settings, lambda *_: None).weights
    assert weights.digest(Weights(dict(first))) != weights.digest(Weights(dict(third)))
