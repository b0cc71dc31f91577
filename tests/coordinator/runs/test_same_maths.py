"""The same maths: what a fleet learns is what one machine with all the data would learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from protocols.model.weights import Weights
from tests.support.in_process_fleet import (
    CLASSES,
    Data,
    Fleet,
    first_weights,
    fleet_of,
    gradient_step,
    some_data,
)

SIZES = (30, 70, 200)


pytestmark = pytest.mark.usefixtures("coordinator_home")


def parts() -> list[Data]:
    return [some_data(size, seed) for seed, size in enumerate(SIZES)]


def plain_descent(rounds: int, seed: int) -> Weights:
    """Gradient descent on the union of the data."""
    union = Data(*(np.concatenate(arrays) for arrays in zip(*parts(), strict=True)))
    model = first_weights(union.x.shape[1], seed)
    for _ in range(rounds):
        model = gradient_step(model, union)
    return model


def check_close(found: Weights, expected: Weights, within: float = 1e-6) -> None:
    assert found.schema == expected.schema
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=within)


async def test_five_rounds_equal_gradient_descent_on_the_union(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *parts()) as fleet:
        run = await fleet.finished(fleet.start(rounds=5, quorum=3, seed=11))
        assert run.round == 5
        check_close(fleet.version(run.head), plain_descent(5, seed=11))
        # It is no accident of a model that stands still.
        with pytest.raises(AssertionError):
            check_close(fleet.version(run.head), plain_descent(4, seed=11), 1e-3)
        losses = [closed.metrics["loss"] for closed in run.history]
        assert losses == sorted(losses, reverse=True)
        assert run.best == run.history[-1]


async def test_equal_weighting_is_the_mean_of_the_peers(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *parts()) as fleet:
        run = await fleet.finished(fleet.start(rounds=1, quorum=3, weighting="equal"))
        updates = [agent.trainer.made[1] for agent in fleet.agents]
        mean = {name: np.mean([u[name] for u in updates], axis=0) for name in updates[0]}
        check_close(fleet.version(run.head), Weights(mean))


def by_flower(fleet: Fleet, number: int) -> dict[str, object]:
    """What Flower's own FedAvg makes of all the replies of a round."""
    replies = []
    for agent in fleet.agents:
        arrays = {
            name: Array(np.asarray(array))
            for name, array in agent.trainer.made[number].items()
            if array.dtype.kind == "f"
        }
        metrics = MetricRecord({"num-examples": len(agent.trainer.data.y)})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        replies.append(Message(content, reply_to=Message(RecordDict(), 1, "train")))
    aggregated, _ = FedAvg().aggregate_train(number, replies)
    assert aggregated is not None
    return {name: array.numpy() for name, array in aggregated.items()}


async def test_flowers_own_aggregation_of_all_replies_gives_the_same(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *parts()) as fleet:
        run = await fleet.finished(fleet.start(rounds=2, quorum=3, seed=3))
        found = fleet.version(run.head)
        for name, array in by_flower(fleet, 2).items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6)


def mixed(value: float) -> Weights:
    """One tensor of every kind."""
    values = np.array([value, -value, 2 * value, 0.0])
    return Weights(
        {
            "f64": values,
            "f32": values.astype(np.float32),
            "f16": values.astype(np.float16),
            "bf16": (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
            "scalar": np.array(value, np.float32),
            "empty": np.zeros((0, CLASSES), np.float32),
            "steps": np.array(int(value), np.int64),
            "mask": np.array([value > 2, True]),
        },
        ["bf16"],
    )


async def test_every_dtype_goes_through_a_round(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, some_data(10, 0), some_data(30, 1)) as fleet:
        for agent, value in zip(fleet.agents, (1.0, 5.0), strict=True):
            agent.trainer.first = lambda seed: mixed(0.0)
            agent.trainer.step = lambda model, data, value=value: mixed(value)  # type: ignore[misc]
            agent.trainer.loss = lambda model, data: 0.5
        run = await fleet.finished(fleet.start(rounds=2, quorum=2))
        found, expected = fleet.version(run.head), mixed(4.0)
        assert found.schema == expected.schema
        for name in ("f64", "f32", "f16", "bf16", "scalar", "empty"):
            np.testing.assert_array_equal(found[name], expected[name])
        assert int(found["steps"]) == 0  # what is no number of the model is not averaged
        assert found["mask"].tolist() == [False, True]
