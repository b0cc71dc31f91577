"""Strategies by name, and Flower's own classes fed with one reply in place of all."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from coordinator import aggregate, strategies
from protocols.errors import ExitCode, UnknownName, UsageFault
from protocols.weights import Weights

SIZES = (3, 40, 700)


@pytest.fixture(autouse=True)
def _flower_run() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3


def reply(kind: str, metrics: dict[str, float], array: object = None) -> Message:
    content = RecordDict({"metrics": MetricRecord(metrics)})
    if array is not None:
        content["arrays"] = ArrayRecord({"w": Array(np.asarray(array))})
    return Message(content, reply_to=Message(RecordDict(), 1, kind))


class Nodes(Grid):
    """A Grid that knows nodes and does nothing."""

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object: ...  # type: ignore[override]

    def create_message(self, *arguments: object, **options: object) -> Message:  # type: ignore[override]
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [7, 5, 6]

    def push_messages(self, messages: object) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: object) -> list[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: object, *, timeout: object = None) -> list[Message]:
        raise NotImplementedError


def test_a_strategy_is_flowers_own_class() -> None:
    assert strategies.names() == ["fedavg"]
    assert type(strategies.make("fedavg", {})) is FedAvg


def test_an_unknown_strategy_is_told_with_the_known_ones() -> None:
    for ask in (strategies.check, strategies.make):
        with pytest.raises(UnknownName, match="'fedmagic'") as caught:
            ask("fedmagic", {})
        assert caught.value.exit_code is ExitCode.USAGE
        assert "fedavg" in caught.value.hint
        with pytest.raises(UsageFault, match="no arguments"):
            ask("fedavg", {"server_lr": 1.0})


def test_checking_a_name_does_not_load_flower() -> None:
    """The command that starts a run checks the name before it asks the coordinator."""
    code = "import sys; from coordinator import strategies as s; s.check('fedavg', {}); "
    code += "sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_every_node_that_the_grid_offers_is_asked(kind: str) -> None:
    made = strategies.make("fedavg", {})
    configure = getattr(made, f"configure_{kind}")
    arrays = ArrayRecord({"w": Array(np.zeros(1))})
    messages = list(configure(4, arrays, ConfigRecord({"work": b"x"}), Nodes()))
    assert sorted(message.metadata.dst_node_id for message in messages) == [5, 6, 7]
    for message in messages:
        assert message.metadata.message_type == kind
        assert message.content.config_records["config"]["work"] == b"x"
        assert "arrays" in message.content


def test_one_reply_with_the_mean_stands_for_all() -> None:
    rng = np.random.default_rng(3)
    updates = [rng.normal(size=(20, 10)).astype(np.float32) for _ in SIZES]
    counts = dict(zip("ABC", SIZES, strict=True))
    share = aggregate.shares(counts, equal=False, cap=1.0)
    base = Weights({"w": np.zeros((20, 10), np.float32)})
    models = [Weights({"w": update}) for update in updates]
    mean = aggregate.weighted_mean(models, list(share.values()), base)
    ours, _ = strategies.make("fedavg", {}).aggregate_train(
        1, [reply("train", {"num-examples": sum(SIZES)}, mean["w"])]
    )
    all_of_them, _ = FedAvg().aggregate_train(
        1,
        [
            reply("train", {"num-examples": size}, update)
            for size, update in zip(SIZES, updates, strict=True)
        ],
    )
    assert all_of_them is not None
    np.testing.assert_allclose(ours["w"].numpy(), all_of_them["w"].numpy(), rtol=0, atol=1e-6)


def test_evaluations_are_averaged_by_examples() -> None:
    found = strategies.make("fedavg", {}).aggregate_evaluate(
        1,
        [
            reply("evaluate", {"accuracy": 1.0, "loss": 0.0, "num-examples": 1}),
            reply("evaluate", {"accuracy": 0.0, "loss": 4.0, "num-examples": 3}),
        ],
    )
    assert dict(found) == {"accuracy": 0.25, "loss": 3.0}
